"""What a trained model is worth: perplexity in three modes, generation, plots.
Works on a plain model read from a checkpoint, in one process without a DeepSpeed engine."""
