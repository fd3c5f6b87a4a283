"""Names that other projects import, and how they are called."""

import torch

from gkachat.attention import gaussian_kernel_attention
from gkachat.checkpoint import load_model
from gkachat.eval.bpb import evaluate_bpb
from gkachat.eval.core import evaluate_core
from gkachat.inference import Engine
from gkachat.model import GPT, GPTConfig


def test_a_model_gives_logits_and_a_loss():
    config = GPTConfig(depth=2, attention="gka", vocab_size=64, sequence_len=32, window_pattern="SL")
    model, idx = GPT(config), torch.randint(64, (2, 32))
    logits, loss = model(idx), model(idx, idx)
    assert logits.shape == (2, 32, 64) and logits.dtype == loss.dtype == torch.float32 and loss.ndim == 0


def test_the_operator_takes_its_documented_options():
    x, rope = torch.randn(2, 16, 2, 8), (torch.ones(16, 4), torch.zeros(16, 4))
    options = {"window": 4, "causal": True, "include_self": True, "backend": "auto"}
    y = gaussian_kernel_attention(x, torch.ones(2), rope=rope, **options)
    torch.testing.assert_close(y, gaussian_kernel_attention(x, torch.ones(2), **options))  # rotated by no angle


def test_the_other_names_can_be_called():
    assert all(callable(name) for name in (load_model, evaluate_bpb, evaluate_core, Engine.generate))
