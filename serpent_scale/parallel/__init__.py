"""Processes: who this rank is, whichever launcher started it, and the few collectives the rest needs.
`processes.py` is all of it."""
