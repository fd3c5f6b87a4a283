"""Generation from a trained model: engine, decode step, sampling, quantization."""
