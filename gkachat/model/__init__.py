"""Models: the GPT, its loss, its size in parameters and FLOPs, and a vision transformer of the same blocks."""

from gkachat.config import GKAConfig, GPTConfig
from gkachat.model.gpt import GPT

__all__ = ["GPT", "GKAConfig", "GPTConfig"]
