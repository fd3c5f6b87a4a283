"""Conversations as a model reads them, and where they come from.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

    <|bos|><|user_start|>...<|user_end|><|assistant_start|>...<|assistant_end|>

What the assistant says is trained on, its end token with it, and nothing else. A system message, which may come first,
is put before the first thing the user says. A conversation is in train or in val by a hash of what it asks: what is
asked in val is not asked in train.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gkachat.config import ChatConfig
from gkachat.data.shards import Documents
from gkachat.data.tasks import generated
from gkachat.tokenizer import Tokenizer

Messages = Sequence[dict[str, str]]


def check(messages: Any, where: str = "messages") -> Messages:
    """Raises ValueError for what is not a conversation: turns of user and assistant, one system message before them."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{where}: given {messages!r:.80}, expected a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{where}, message {number}: expected an object with texts 'role' and 'content'")
        turn = number - (messages[0]["role"] == "system")
        expected = ("user", "assistant")[turn % 2] if turn >= 0 else "system"
        if message["role"] != expected:
            raise ValueError(f"{where}, message {number}: given role {message['role']!r}, expected {expected!r}")
    if len(messages) == 1 and messages[0]["role"] == "system":
        raise ValueError(f"{where}: given a system message alone, expected a user's after it")
    return messages


def render(tokenizer: Tokenizer, messages: Messages) -> tuple[list[int], list[bool]]:
    """Ids, BOS first, and of each whether it is the assistant's. Raises ValueError for what is not a conversation."""
    ids, mask, before = [tokenizer.bos], [False], ""
    for message in check(messages):
        role, content = message["role"], message["content"]
        if role == "system":
            before = f"{content}\n\n"
            continue
        said, before = tokenizer.encode(before + content), ""
        ids += [tokenizer.special[f"<|{role}_start|>"], *said, tokenizer.special[f"<|{role}_end|>"]]
        mask += [False, *[role == "assistant"] * (len(said) + 1)]
    return ids, mask


def prompt(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Ids, BOS first, after which an assistant's answer is due."""
    return [*render(tokenizer, messages)[0], tokenizer.special["<|assistant_start|>"]]


def conversations(config: ChatConfig, seed: int, facts: dict[str, str]) -> Iterator[tuple[str, Messages]]:
    """(what is asked, messages) of a source; `facts` is what the model knows about itself. ValueError, OSError."""
    found = SOURCES[config.source](config, seed, facts)
    return found if config.conversations is None else islice(found, config.conversations)


def _generated(config: ChatConfig, seed: int, facts: dict[str, str]) -> Iterator[tuple[str, Messages]]:
    return islice(generated(seed, facts), 40_000)


def _files(config: ChatConfig, seed: int, facts: dict[str, str]) -> Iterator[tuple[str, Messages]]:
    for name in config.files:
        if not Path(name).is_file():
            raise FileNotFoundError(f"chat.files: no file {name}")
        with open(name, encoding="utf-8") as file:
            try:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        where = f"{name}, line {number}"
                        try:
                            row = json.loads(line)
                        except (json.JSONDecodeError, RecursionError) as error:
                            raise ValueError(f"{where}: not JSON ({error})") from None
                        if not isinstance(row, dict) or "messages" not in row:
                            raise ValueError(f'{where}: expected an object {{"messages": [...]}}')
                        yield _keyed(check(row["messages"], where))
            except UnicodeDecodeError as error:
                raise ValueError(f"{name}: not UTF-8 at byte {error.start} of a part; convert it") from None


def _huggingface(config: ChatConfig, seed: int, facts: dict[str, str]) -> Iterator[tuple[str, Messages]]:
    """The three sets, row by row in turns, shuffled within a buffer."""
    import datasets

    def rows(name: str, subset: str | None, split: str) -> Iterator[dict]:
        try:
            stream = datasets.load_dataset(name, subset, split=split, streaming=True)
            yield from stream.shuffle(seed=seed, buffer_size=10_000)
        except Exception as error:  # the hub client raises a dozen unrelated types
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot read {name} from the Hugging Face hub: {first}") from error

    def smoltalk() -> Iterator[Messages]:
        for row in rows("HuggingFaceTB/smol-smoltalk", None, "train"):
            yield row["messages"]

    def mmlu() -> Iterator[Messages]:
        for row in rows("cais/mmlu", "auxiliary_train", "train"):
            row = row.get("train", row)
            yield _turn(multiple_choice(row["question"], row["choices"]), "ABCD"[row["answer"]])

    def gsm8k() -> Iterator[Messages]:
        for row in rows("openai/gsm8k", "main", "train"):
            yield _turn(row["question"], row["answer"])

    sources = [smoltalk(), mmlu(), gsm8k()]
    while sources:
        for source in list(sources):
            if (messages := next(source, None)) is None:
                sources.remove(source)
            else:
                yield _keyed(check(messages))


SOURCES = {"generated": _generated, "files": _files, "huggingface": _huggingface}


def multiple_choice(question: str, choices: Sequence[str]) -> str:
    """How a question is asked whose answer is a letter."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in zip("ABCDEFGHIJ", choices, strict=False))])


def _turn(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _keyed(messages: Messages) -> tuple[str, Messages]:
    return next(m["content"] for m in messages if m["role"] == "user"), messages


def is_val(key: str, fraction: float) -> bool:
    """Whether what is asked so belongs to val."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest()) < fraction * 2**64


@dataclass
class ChatSplit:
    """Conversations as the loader reads them: one shard, which fits memory."""

    documents: Documents
    n_shards: int = 1

    def shard(self, index: int) -> Documents | None:
        return self.documents if index == 0 else None

    def __iter__(self) -> Iterator[Documents]:
        yield self.documents


@dataclass
class Tokenized:
    splits: dict[str, ChatSplit]
    counts: dict[str, int] = field(default_factory=dict)


def tokenize(
    found: Iterable[tuple[str, Messages]], tokenizer: Tokenizer, sequence_len: int, val_fraction: float
) -> Tokenized:
    """Both splits, ready to be packed into rows. Raises ValueError where one stays empty.

    A conversation longer than a row loses its end; one that has nothing of the assistant's left is dropped. Both are
    counted.
    """
    ids, masks, lengths = ({"train": [], "val": []} for _ in range(3))
    counts = {"conversations": 0, "truncated": 0, "dropped": 0}
    for key, messages in found:
        counts["conversations"] += 1
        said, mask = (part[1:] for part in render(tokenizer, messages))  # the loader puts BOS in front
        counts["truncated"] += len(said) > sequence_len
        said, mask = said[:sequence_len], mask[:sequence_len]
        if not any(mask):
            counts["dropped"] += 1
            continue
        split = "val" if is_val(key, val_fraction) else "train"
        ids[split].append(np.array(said, np.uint16))
        masks[split].append(np.array(mask))
        lengths[split].append(len(said))
    splits = {}
    for split in ids:
        if not ids[split]:
            raise ValueError(f"no conversation for {split} ({counts}): give more, or another chat.val_fraction")
        tokens, scored = np.concatenate(ids[split]), np.concatenate(masks[split])
        offsets = np.concatenate(([0], np.cumsum(lengths[split])))
        splits[split] = ChatSplit(Documents(offsets, lambda tokens=tokens: tokens, scored))
    return Tokenized(splits, counts)
