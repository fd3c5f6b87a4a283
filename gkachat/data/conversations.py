"""Conversations for tuning: their sources, their token format, and which tokens the model learns.

    conversations = load_conversations(config.chat, seed, facts)
    splits, counts = tokenize_conversations(conversations, tokenizer, sequence_len, val_fraction)
    Loader(splits["train"], ...)

A conversation is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]},
which may begin with a system message. Its tokens are

    <|bos|><|user_start|>...<|user_end|><|assistant_start|>...<|assistant_end|>

The model learns the assistant's text and end token, and nothing else. A system message is put before the first user
message. A hash of the question decides between train and val, so that no question of val is in train.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gkachat.config import ChatConfig
from gkachat.data.readers import find_files, read_files
from gkachat.data.shards import Documents
from gkachat.data.sources import hash_64, in_val, stream_dataset
from gkachat.data.tasks import generated
from gkachat.text import check_text, is_text
from gkachat.tokenizer import Tokenizer

CHAT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
CHUNK, CHUNKS_AHEAD = 64, 64  # conversations that a thread renders at a time, and how many of these are in work

Messages = Sequence[dict[str, str]]
"""Messages in order. Each has the keys `role` and `content`."""

Conversation = tuple[str, Messages]
"""A key that is the same for the same question, and the messages."""


@dataclass
class ChatSplit:
    """Tokenized conversations as the loader reads them: a single shard."""

    documents: Documents
    n_shards: int = 1

    def n_written(self) -> None:
        """Return None: all shards are there."""

    def shard(self, index: int, proceed: Callable[[], bool] = lambda: True) -> Documents | None:
        return self.documents if index == 0 else None

    def __iter__(self) -> Iterator[Documents]:
        yield self.documents


def load_conversations(config: ChatConfig, seed: int, facts: dict[str, str]) -> Iterator[Conversation]:
    """Read the conversations of a source. `facts` are what the model can say about itself.

    Raises ValueError or FileNotFoundError for a source that cannot be read or holds something else.
    """
    conversations = SOURCES[config.source](config, seed, facts)
    return conversations if config.conversations is None else islice(conversations, config.conversations)


def tokenize_conversations(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, sequence_len: int, val_fraction: float
) -> tuple[dict[str, ChatSplit], dict[str, int]]:
    """Return both splits, and counts of conversations. Raises ValueError for fewer than two different questions.

    Where the hashes put all questions into one split, the last of them goes to the other.
    A conversation that is longer than a row loses its end. It is dropped if none of the assistant's text is left, or if
    it is no text (`is_text`).
    """
    kept: dict[str, list[tuple[str, np.ndarray, np.ndarray]]] = {"train": [], "val": []}
    counts = {"conversations": 0, "truncated": 0, "dropped": 0}

    def texts() -> Iterator[Conversation]:
        for key, messages in conversations:
            if is_text(*(message["content"] for message in messages)):
                yield key, messages
            else:
                counts["conversations"] += 1
                counts["dropped"] += 1

    for key, tokens, mask in _rendered(texts(), tokenizer):
        counts["conversations"] += 1
        tokens, mask = tokens[1:], mask[1:]  # the loader puts BOS in front
        counts["truncated"] += len(tokens) > sequence_len
        tokens, mask = tokens[:sequence_len], mask[:sequence_len]
        if not mask.any():
            counts["dropped"] += 1
            continue
        kept["val" if is_val(key, val_fraction) else "train"].append((key, tokens, mask))
    for split, other in (("train", "val"), ("val", "train")):
        if not kept[split] and kept[other]:
            last = kept[other][-1][0]
            kept[split] = [row for row in kept[other] if row[0] == last]
            kept[other] = [row for row in kept[other] if row[0] != last]
    splits = {}
    for split, rows in kept.items():
        if not rows:
            counted = ", ".join(f"{n:,} {what}" for what, n in counts.items())
            raise ValueError(f"no conversation for {split} ({counted}): expected two different questions at least")
        _, ids, masks = zip(*rows, strict=True)
        tokens, offsets = np.concatenate(ids), np.cumsum([0, *map(len, ids)])
        splits[split] = ChatSplit(Documents(offsets, lambda tokens=tokens: tokens, np.concatenate(masks)))
    return splits, counts


def _rendered(
    conversations: Iterable[Conversation], tokenizer: Tokenizer
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield key, ids and mask of each conversation, in order. Threads render some while later ones are read."""

    def render_chunk(chunk: list[Conversation]) -> list[tuple[str, np.ndarray, np.ndarray]]:
        rendered = ((key, *render(tokenizer, messages)) for key, messages in chunk)
        return [(key, np.array(ids, np.uint16), np.array(mask)) for key, ids, mask in rendered]

    conversations, in_work = iter(conversations), deque()
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(conversations, CHUNK)):
            in_work.append(pool.submit(render_chunk, chunk))
            if len(in_work) > CHUNKS_AHEAD:
                yield from in_work.popleft().result()
        while in_work:
            yield from in_work.popleft().result()


def check_messages(messages: Any, where: str = "messages") -> Messages:
    """Return the messages. Content that is a list of parts, as OpenAI has it, becomes one text.

    Raises ValueError unless user and assistant alternate after at most one system message.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{where}: given {messages!r:.80}, expected a list of messages")
    messages = [_join_parts(message, f"{where}, message {n}") for n, message in enumerate(messages)]
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{where}, message {number}: expected an object with texts 'role' and 'content'")
        turn = number - (messages[0]["role"] == "system")
        expected = ("user", "assistant")[turn % 2] if turn >= 0 else "system"
        if message["role"] != expected:
            raise ValueError(f"{where}, message {number}: given role {message['role']!r}, expected {expected!r}")
    if len(messages) == 1 and messages[0]["role"] == "system":
        raise ValueError(f"{where}: given a system message alone, expected a user message after it")
    return messages


def _join_parts(message: Any, where: str) -> Any:
    """Return a message with its parts of text joined by line ends, and `developer`, OpenAI's newer name, as `system`.

    Raises ValueError for parts of another type.
    """
    if isinstance(message, dict) and message.get("role") == "developer":
        message = message | {"role": "system"}
    if not isinstance(message, dict) or not isinstance(parts := message.get("content"), list):
        return message
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
            given = repr(part["type"]) if isinstance(part, dict) and "type" in part else f"{part!r:.80}"
            raise ValueError(f"{where}, part {number}: given {given}, expected {{'type': 'text', 'text': ...}}")
    return message | {"content": "\n".join(part["text"] for part in parts)}


def check_history(messages: Any) -> list[dict[str, str]]:
    """Return messages that a user message can follow. Raises ValueError for anything else."""
    if not isinstance(messages, list):
        raise ValueError(f"given {messages!r:.80}, expected a list of messages")
    history = list(check_messages([*messages, {"role": "user", "content": ""}]))[:-1]
    for message in history:
        check_text(message["content"])
    return history


def render(tokenizer: Tokenizer, messages: Messages) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation, BOS first, and for each id whether the model learns it."""
    ids, mask, system = [tokenizer.bos], [False], ""
    for message in check_messages(messages):
        role, content = message["role"], message["content"]
        if role == "system":
            system = f"{content}\n\n"
            continue
        text, system = tokenizer.encode(system + content), ""
        ids += [tokenizer.special[f"<|{role}_start|>"], *text, tokenizer.special[f"<|{role}_end|>"]]
        mask += [False, *[role == "assistant"] * (len(text) + 1)]
    return ids, mask


def render_prompt(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the ids of a conversation, BOS first, after which the assistant's answer comes next."""
    return [*render(tokenizer, messages)[0], tokenizer.special["<|assistant_start|>"]]


def is_val(key: str, val_fraction: float) -> bool:
    """Return whether conversations with this key belong to val."""
    return in_val(hash_64(key.encode()), val_fraction)


def chat_files(config: ChatConfig) -> list[Path]:
    """Return the files that chat.files names. Raises FileNotFoundError or ValueError as `find_files` does."""
    return find_files(config.files, CHAT_SUFFIXES, "chat.files")


def _generated(config: ChatConfig, seed: int, facts: dict[str, str]) -> Iterator[Conversation]:
    return islice(generated(seed, facts), 40_000)


def _files(config: ChatConfig, seed: int, facts: dict[str, str]) -> Iterator[Conversation]:
    def check(row: Any, where: str) -> Conversation:
        if not isinstance(row, dict) or "messages" not in row:
            given = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f'{where}: given {given}, expected an object {{"messages": [...]}}')
        return _with_key(check_messages(row["messages"], where))

    return read_files(chat_files(config), "messages", check)


def _huggingface(config: ChatConfig, seed: int, facts: dict[str, str]) -> Iterator[Conversation]:
    """Yield a conversation of each of three datasets in turns, until all of them end."""
    datasets = [map(read, stream_dataset(name, subset, "train", shuffle_seed=seed)) for name, subset, read in DATASETS]
    while datasets:
        for dataset in list(datasets):
            if (messages := next(dataset, None)) is None:
                datasets.remove(dataset)
            else:
                yield _with_key(check_messages(messages))


SOURCES = {"generated": _generated, "files": _files, "huggingface": _huggingface}


def _turn(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _with_key(messages: Messages) -> Conversation:
    return next(m["content"] for m in messages if m["role"] == "user"), messages


def _multiple_choice(row: dict[str, Any]) -> Messages:
    choices = (f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))
    return _turn("\n".join([row["question"], *choices]), "ABCD"[row["answer"]])


DATASETS = [
    ("HuggingFaceTB/smol-smoltalk", None, lambda row: row["messages"]),
    ("cais/mmlu", "auxiliary_train", lambda row: _multiple_choice(row.get("train", row))),
    ("openai/gsm8k", "main", lambda row: _turn(row["question"], row["answer"])),
]
