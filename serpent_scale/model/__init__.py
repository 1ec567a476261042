"""The language model: mixers, the stack of blocks, parameter and FLOP counts.
Nothing here knows of processes, ranks or files."""
