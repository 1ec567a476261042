"""Pretraining under DeepSpeed: optimizer groups and schedule, DeepSpeed's settings, the loop, metrics.
`trainer.py` is the loop; read it first."""
