"""From text to batches.

sources (documents) -> gkachat.tokenizer -> shards (tokens on disk) -> packing (documents to rows) -> loader (batches).
conversations are for tuning: tuning tokenizes them once, and the loader reads them like a shard. tasks makes some up,
and images has the data of the vision models.
"""
