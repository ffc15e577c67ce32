"""A corpus, from documents on the disk to batches of tokens."""
