"""Checkpoint folders: written atomically, hashed, verified before anything in them is read.
`manifest.py` says whether a folder is whole; `store.py` saves, finds, loads and prunes."""
