"""From text to batches: sources, shards, loader."""
