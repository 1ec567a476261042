"""From text to tokens: sources are tokenised into WebDataset shards with an index, and read back as a stream of windows
whose order is a pure function of a sample's number."""
