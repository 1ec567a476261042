"""Checkpoint folders, written atomically, hashed, verified before use: `store.py`, with `slices.py` for DeepSpeed's engine and
`manifest.py` for whether a folder is whole. `layouts.py` reads and writes the model folders of other projects."""
