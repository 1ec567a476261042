"""What a trained model is worth and what it has learned: perplexity in three modes, generation, its clocks, plots.
Works on a plain model read from a checkpoint, in one process without a DeepSpeed engine."""
