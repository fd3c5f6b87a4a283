"""Models: the GPT, its loss, its size in parameters and FLOPs, and a vision transformer of the same blocks."""
