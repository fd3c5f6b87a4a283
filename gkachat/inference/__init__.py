"""Generation from a trained model: the engine, its decode step, sampling, and quantization."""
