"""Pretraining of SeRpEnt-Mamba language models: model, parallelism, training, checkpoints, evaluation.
Data flows one way: config -> data_pipeline -> model -> training -> checkpoint -> evaluation."""
from pathlib import Path

if not Path(__path__[0], "kernels").is_dir():  # a checkout without symbolic links has a one-line file there
    raise ImportError(
        f"{__path__[0]}/kernels is not a folder: it is a symbolic link to kernels/, which this copy of the project has lost; "
        "mend it with `ln -sfn ../kernels serpent_scale/kernels`"
    )
