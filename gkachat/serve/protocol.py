"""OpenAI's objects: what requests may say, and how texts are written.

docs/server.md lists what is supported. A parameter that would change the answer and is not supported is an error.
"""

import codecs
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gkachat.checks import ConfigError
from gkachat.inference.engine import TokenOutput
from gkachat.inference.sampling import TOP_LOGPROBS, Sampling
from gkachat.serve.errors import ApiError
from gkachat.tokenizer import Tokenizer

# Parameters that may be sent as long as they ask for nothing.
NEUTRAL = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "modalities": ["text"],
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
}
WITHOUT_EFFECT = {  # on the answer, as there are no tools, no accounts and no tiers
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
}  # fmt: skip
MAX_STOPS = 4
FINISH_REASONS = {"bos": "stop", "stop": "stop", "max_tokens": "length", "sequence_len": "length"}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False
    """Without effect: chunks are as long as their text."""
    continuous_usage_stats: bool = False
    """Usage so far in every chunk, as vLLM gives it."""


class TextRequest(BaseModel):
    """Parameters that both kinds of completion share. null stands for the default."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    max_tokens: int | None = None
    temperature: float = Field(1.0, allow_inf_nan=False)
    top_p: float = Field(1.0, allow_inf_nan=False)
    n: int = Field(1, ge=1)
    seed: int | None = None
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # Not OpenAI's: as other servers of open models name them.
    top_k: int | None = Field(None, le=2**24)  # exact in the float32 of its tensor
    min_p: float | None = Field(None, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, allow_inf_nan=False)
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("top_k") in (0, -1):  # other servers' words for no limit
            del given["top_k"]
        for name in given.keys() - cls.model_fields.keys() - WITHOUT_EFFECT:
            if name not in NEUTRAL or given[name] != NEUTRAL[name]:
                raise ApiError(400, f"{name}: given {given[name]!r:.80}, which is not supported", param=f"{name:.80}")
        return given

    def sampling(self, max_tokens: int) -> list[Sampling]:
        """Return the settings of each of the n texts, whose seeds are seed, seed + 1, ... Raises ApiError."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stop) > MAX_STOPS:
            raise ApiError(400, f"stop: given {len(stop)} texts, expected at most {MAX_STOPS}", param="stop")
        seed = random.getrandbits(32) if self.seed is None else self.seed
        top = self.n_top_logprobs()
        try:
            return [
                Sampling(
                    max_tokens, self.temperature, self.top_k, self.top_p if self.top_p != 1 else None, self.min_p,
                    self.repetition_penalty, seed + i, stop, logprobs=top is not None, top_logprobs=top or 0,
                )
                for i in range(self.n)
            ]  # fmt: skip
        except ConfigError as error:
            raise ApiError(400, str(error), param=error.problems[0].split(":")[0]) from None

    def n_top_logprobs(self) -> int | None:
        """Return how many likeliest tokens are to be shown beside each token; None: no log-probabilities."""
        raise AssertionError(f"{type(self).__name__} must define n_top_logprobs")


class CompletionRequest(TextRequest):
    """Body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = 16
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)

    def n_top_logprobs(self) -> int | None:
        return self.logprobs


class ChatRequest(TextRequest):
    """Body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=TOP_LOGPROBS)
    truncation: str = Field("disabled", pattern="^(disabled|auto)$")  # of OpenAI's responses
    """auto: leave out the oldest turns of a conversation that is too long."""

    def n_top_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: expected logprobs true with it", param="top_logprobs")
        return self.top_logprobs if self.logprobs else None


class AttentionRequest(BaseModel):
    """Body of /attention: the ids of a text, BOS first."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    tokens: list[int] = Field(min_length=1)


class Placed(NamedTuple):
    """A token of a text, and the number of characters before it."""

    output: TokenOutput
    offset: int


class CompletionFormat:
    """How /v1/completions writes a text."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    @staticmethod
    def content(text: str) -> dict[str, Any]:
        return {"text": text}

    delta = content

    @staticmethod
    def logprobs(tokenizer: Tokenizer, tokens: Sequence[Placed]) -> dict[str, Any]:
        def top(output: TokenOutput) -> dict[str, float]:
            return {token_text(tokenizer, id): logprob for id, logprob in output.top_logprobs}

        return {
            "tokens": [token_text(tokenizer, output.token) for output, _ in tokens],
            "token_logprobs": [output.logprob for output, _ in tokens],
            "top_logprobs": [top(output) for output, _ in tokens],
            "text_offset": [offset for _, offset in tokens],
        }


class ChatFormat:
    """How /v1/chat/completions writes a text."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @staticmethod
    def content(text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    @staticmethod
    def delta(text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    @staticmethod
    def logprobs(tokenizer: Tokenizer, tokens: Sequence[Placed]) -> dict[str, Any]:
        def entry(id: int, logprob: float | None) -> dict[str, Any]:
            data = tokenizer.decode_bytes([id])
            return {"token": token_text(tokenizer, id), "bytes": [*data], "logprob": logprob}

        def with_top(output: TokenOutput) -> dict[str, Any]:
            return {**entry(output.token, output.logprob), "top_logprobs": [entry(*top) for top in output.top_logprobs]}

        return {"content": [with_top(output) for output, _ in tokens]}


Format = type[CompletionFormat] | type[ChatFormat]


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """Return a token as text; bytes that are not a whole character are escaped."""
    return tokenizer.decode_bytes([id]).decode(errors="backslashreplace")


class Text:
    """One text of an answer, as it grows."""

    def __init__(self, index: int, tokenizer: Tokenizer, format: Format, request: TextRequest):
        self.index, self.tokenizer, self.format = index, tokenizer, format
        self.shows_logprobs, self.shows_ids = request.n_top_logprobs() is not None, request.return_token_ids
        self.text, self.finished = "", ""
        self.tokens: list[Placed] = []
        self._utf8, self._offset = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0

    def add(self, output: TokenOutput) -> dict[str, Any] | None:
        """Add an output. Return the choice of its chunk in a stream, or None if it shows nothing."""
        self.text, self.finished = self.text + output.text, output.finished
        new = [] if output.token is None else [Placed(output, self._offset)]
        if new and self.shows_logprobs:
            self._offset += len(self._utf8.decode(self.tokenizer.decode_bytes([output.token])))
        self.tokens += new
        shows = output.text or output.finished or (new and (self.shows_logprobs or self.shows_ids))
        return self._choice(self.format.delta(output.text), new) if shows else None

    def whole(self) -> dict[str, Any]:
        """Return the choice of a complete answer."""
        return self._choice(self.format.content(self.text), self.tokens)

    def _choice(self, content: dict[str, Any], tokens: Sequence[Placed]) -> dict[str, Any]:
        choice = {"index": self.index, **content, "finish_reason": FINISH_REASONS.get(self.finished)}
        choice["logprobs"] = self.format.logprobs(self.tokenizer, tokens) if self.shows_logprobs else None
        if self.shows_ids:
            choice["token_ids"] = [output.token for output, _ in tokens]
        return choice
