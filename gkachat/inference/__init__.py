"""Generation from a trained model: the engine, the decode step it repeats, sampling, and quantization."""

from gkachat.inference.engine import Engine, Prefix, Request, TokenOutput
from gkachat.inference.sampling import Sampling

__all__ = ["Engine", "Prefix", "Request", "Sampling", "TokenOutput"]
