"""Checkpoint folders, written atomically, hashed, verified before anything in them is read: `store.py`, by the `manifest.py`.
`layouts.py` reads and writes the model folders of other projects."""
