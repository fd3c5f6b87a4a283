"""Chat with one model: the conversation so far, cut to the model's context, and streamed answers.

session = ChatSession.from_run("d4_gka_chat")
for text in session.ask("What is 34 + 57?", Sampling(max_tokens=64)):
    print(text, end="", flush=True)
session.stats    # run, tokens_read, tokens_left_out, tokens_written, seconds, finished
"""

import bisect
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gkachat.checkpoint import find_run, load_model
from gkachat.data.conversations import Messages, render_prompt
from gkachat.inference.engine import Engine, Request
from gkachat.inference.quantize import for_inference
from gkachat.inference.sampling import Sampling
from gkachat.machine import pick_device, pick_dtype


class ChatSession:
    """A model and its conversation.

    A run that was tuned on conversations answers the last message. Any other run continues the text of all messages,
    and ignores the system message.
    """

    def __init__(self, engine: Engine, name: str, step: int, is_tuned: bool):
        self.engine, self.name, self.step, self.is_tuned = engine, name, step, is_tuned
        self.system = ""
        self.messages: list[dict[str, str]] = []
        self.stats: dict[str, Any] = {}
        """Figures of the last answer."""
        # An answer that was cut within a character does not encode back to its tokens, so these are kept by its text.
        self._answer_tokens: dict[str, list[int]] = {}

    @classmethod
    def from_run(
        cls, run: str | Path, *, step: int | None = None, device: str = "auto", int8: bool = False
    ) -> "ChatSession":
        """Load the checkpoint of a run, by default the last. Raises FileNotFoundError or ValueError if it cannot."""
        run_dir, torch_device = find_run(run), pick_device(device)
        model, tokenizer, meta = load_model(run_dir, torch_device, step)
        model = for_inference(model, pick_dtype("auto", torch_device), int8)
        return cls(Engine(model, tokenizer), run_dir.name, meta["step"], is_tuned="chat" in meta["config"])

    def ask(self, text: str, sampling: Sampling) -> Iterator[str]:
        """Stream the answer to a user message; both become part of the conversation.

        If the iterator is closed early, the conversation keeps what has been answered so far.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        self.messages.append({"role": "user", "content": text})
        answer = ""
        try:
            for part in self.answer([*system, *self.messages], sampling):
                answer += part
                yield part
        finally:
            self.messages.append({"role": "assistant", "content": answer})

    def answer(self, messages: Messages, sampling: Sampling) -> Iterator[str]:
        """Stream the answer to any messages, whatever the conversation is. Sets `stats`, also when closed early."""
        ids, start = self.prompt_tokens(messages, sampling.max_tokens), time.perf_counter()
        left_out = len(self.encode(messages)) - len(ids)
        text, tokens, finished = "", [], ""
        try:
            for output in self.engine.run([self.request(ids, sampling)], rows=1):
                tokens += [] if output.token is None else [output.token]
                text, finished = text + output.text, output.finished
                yield output.text
        finally:
            self._answer_tokens[text] = tokens
            self.stats = {
                "run": self.name, "tokens_read": len(ids), "tokens_left_out": left_out, "tokens_written": len(tokens),
                "seconds": round(time.perf_counter() - start, 3), "finished": finished or "interrupted",
            }  # fmt: skip

    def request(self, ids: Sequence[int], sampling: Sampling) -> Request:
        """Return the request for the answer to a prompt, BOS first. A tuned run stops at the end of its answer."""
        if self.is_tuned:
            sampling = dataclasses.replace(sampling, stop_tokens=tuple(self.engine.tokenizer.special.values()))
        return Request(ids[1:], sampling)  # the engine puts BOS in front

    def prompt_tokens(self, messages: Messages, max_tokens: int) -> list[int]:
        """Return the ids of the messages, BOS first, cut so that `max_tokens` fit behind them in the context.

        The prompt keeps at least half of the context. The oldest turns are left out whole, the system message stays;
        if the last message alone is too long, its end stays.
        """
        context = self.engine.model.config.sequence_len
        limit, messages = context - min(max_tokens, context // 2), list(messages)
        oldest = 1 if messages[0]["role"] == "system" else 0

        def without(n_turns: int) -> list[int]:
            return self.encode(messages[:oldest] + messages[oldest + 2 * n_turns :])

        # A client may send thousands of turns, so the first number of turns that fits is searched in halves.
        turns = range((len(messages) - oldest - 1) // 2)
        ids = without(bisect.bisect_left(turns, True, key=lambda n: len(without(n)) <= limit))
        n_head = 2 if self.is_tuned else 1  # BOS, and the token that starts the user's text
        return ids if len(ids) <= limit else ids[:n_head] + ids[len(ids) - limit + n_head :]

    def encode(self, messages: Messages) -> list[int]:
        """Return the ids of the messages, BOS first, whatever their number."""
        tokenizer = self.engine.tokenizer
        if self.is_tuned:
            return render_prompt(tokenizer, messages)
        texts = [message["content"] for message in messages if message["role"] != "system"]
        return [
            tokenizer.bos,
            *(id for text in texts for id in self._answer_tokens.get(text) or tokenizer.encode(text)),
        ]
