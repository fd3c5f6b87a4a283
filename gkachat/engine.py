"""Decoding: from a prompt's tokens to the tokens that follow.

engine = Engine(model, tokenizer)
for token in engine.generate(tokenizer.encode("def add("), max_tokens=64, temperature=0.8, seed=1): ...
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gkachat.gpt import GPT
from gkachat.tokenizer import Tokenizer


class Engine:
    """Generates with a model. Every step runs the whole context; what exceeds sequence_len is cut at the front."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.device = model.wte.weight.device

    @torch.inference_mode()
    def generate(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 42,
    ) -> Iterator[int]:
        """Yield up to `max_tokens` ids after BOS and `tokens`, ending before the model starts a new document.

        Args:
            temperature: 0 takes the most likely token each time.
            top_k: sample among so many likeliest only.
            top_p: sample among the likeliest that together reach this probability only.

        Raises ValueError for settings out of range.
        """
        checks = (
            (max_tokens >= 0, f"max_tokens: given {max_tokens}, expected 0 or more"),
            (temperature >= 0, f"temperature: given {temperature}, expected 0 or more"),
            (top_k is None or top_k >= 1, f"top_k: given {top_k}, expected 1 or more"),
            (top_p is None or 0 < top_p <= 1, f"top_p: given {top_p}, expected above 0, at most 1"),
        )
        if problems := [message for holds, message in checks if not holds]:
            raise ValueError("; ".join(problems))
        generator = torch.Generator(self.device).manual_seed(seed)
        bos, context = self.tokenizer.bos, list(tokens)
        for _ in range(max_tokens):
            # BOS stays in front: every row in training had one there.
            recent = [bos, *context[-(self.model.config.sequence_len - 1) :]]
            logits_V = self.model(torch.tensor([recent], device=self.device))[0, -1]
            # Padding of the vocabulary stands for nothing.
            token = sample(logits_V[: self.tokenizer.vocab_size], temperature, top_k, top_p, generator)
            if token == bos:
                return
            context.append(token)
            yield token

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text of tokens as they come; a character whose bytes are still on their way waits for them."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            if text := decoder.decode(self.tokenizer.decode_bytes([token])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


def sample(
    logits_V: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """Draw one id. Top-k is applied before top-p, both after the temperature."""
    if temperature == 0:
        return int(logits_V.argmax())
    # Sorted, both cuts are a prefix; the likeliest token always stays.
    probabilities, ids = (logits_V / temperature).softmax(dim=-1).sort(descending=True)
    probabilities, ids = probabilities[:top_k], ids[:top_k]
    if top_p is not None:
        probabilities = probabilities / probabilities.sum()
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
