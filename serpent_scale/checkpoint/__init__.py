"""Checkpoint folders: written atomically, hashed, verified before anything in them is read.
`store.py` saves, finds, loads and prunes; `slices.py` knows DeepSpeed's engine; `manifest.py` says whether a folder is whole."""
