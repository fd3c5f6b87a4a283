"""From text to batches.

sources (documents) -> gkachat.tokenizer -> shards (tokens on disk) -> packing (documents to rows) -> loader (batches).
conversations are for tuning: they are tokenized in memory, and the loader reads them like a shard. tasks makes some up,
and images has the data of the vision models.
"""
