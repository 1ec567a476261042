"""What a trained model is worth: perplexity in three modes, generation, plots.
Works on a plain model read from a checkpoint; DeepSpeed is not needed."""
