"""Pretraining of SeRpEnt-Mamba language models: model, parallelism, training, checkpoints, evaluation.
Data flows one way: config -> data_pipeline -> model -> training -> checkpoint -> evaluation."""
