"""Generation from a trained model: the engine, its decode step, sampling, and quantization."""

from gkachat.inference.engine import Engine, Request, TokenOutput
from gkachat.inference.sampling import Sampling

__all__ = ["Engine", "Request", "Sampling", "TokenOutput"]
