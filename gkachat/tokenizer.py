"""Byte-level BPE tokenizer: trained with `tokenizers`, stored as its JSON, run through tiktoken.

    tokenizer = train_tokenizer(texts, vocab_size=32768)
    tokenizer.save(directory)
    tokenizer = Tokenizer.load(directory)
    ids = [tokenizer.bos, *tokenizer.encode("text")]

The ids of bytes and merges come first, in the order in which they were learned. Special tokens come last. Text never
becomes a special token, even if it spells one.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gkachat.files import write_text
from gkachat.text import list_near

BOS = "<|bos|>"
# Nothing uses the last four. They stay because tokenizers, shards and checkpoints that exist count their ids.
SPECIAL_TOKENS = (
    BOS,  # starts every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)

# GPT-4's split pattern, but with at most two digits a token instead of three. In a small vocabulary, tokens for every
# three-digit number would take the place of more useful ones.
SPLIT_PATTERN = (
    r"(?i:'(?:[sdmt]|ll|ve|re))|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s+"
)

LONE_SURROGATE = re.compile("([\ud800-\udfff])")  # has no UTF-8, but JSON can spell it
CHUNK_CHARS = 500_000  # tiktoken's regex overflows its stack on a run of a million spaces
LEARNED_CHARS = 1000  # of a word: the time to learn from longer ones, as in DNA or base64, grows with their square
FILE_NAME = "tokenizer.json"


class Tokenizer:
    """Converts text to token ids and back. `special` maps names of special tokens to ids; `vocab_size` counts them."""

    def __init__(self, json_text: str):
        """`json_text` is the content of a tokenizer.json. Raises ValueError if ids have gaps or a byte has no token."""
        self.json_text = json_text
        stored = json.loads(json_text)
        letter_to_byte = _letter_to_byte()
        self.special = {token["content"]: token["id"] for token in stored["added_tokens"]}
        ranks = {
            bytes(letter_to_byte[letter] for letter in token): rank
            for token, rank in stored["model"]["vocab"].items()
            if token not in self.special
        }
        n_tokens = len(ranks) + len(self.special)
        if {*ranks.values(), *self.special.values()} != set(range(n_tokens)):
            raise ValueError(f"the ids of its {n_tokens} tokens are not 0 to {n_tokens - 1}")
        if any(bytes([byte]) not in ranks for byte in range(256)):
            raise ValueError("some byte has no token")
        import tiktoken  # here, since scripts.bench_decode runs on machines without it

        self.encoding = tiktoken.Encoding(
            name="gkachat", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special
        )
        self.vocab_size = self.encoding.n_vocab
        self.bos = self.special[BOS]

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read what `save` wrote. Raises FileNotFoundError if it is missing, ValueError if it is damaged."""
        path = Path(directory) / FILE_NAME
        if not path.exists():
            known = sorted(found.parent.name for found in path.parents[1].glob(f"*/{FILE_NAME}"))
            raise FileNotFoundError(
                f"no tokenizer at {path}; train one with python -m scripts.tok_train and the same config and options; "
                f"there are: {list_near(path.parent.name, known)}"
            )
        try:
            return cls(path.read_text("utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path} is not a gkachat tokenizer ({error!r}); train it again") from None

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json into a directory, which is made if needed."""
        write_text(Path(directory) / FILE_NAME, self.json_text)

    @property
    def sha256(self) -> str:
        """Hash by which shards and checkpoints identify their tokenizer."""
        return hashlib.sha256(self.json_text.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Special tokens in it are encoded as plain text, lone surrogates as their bytes."""
        ids = []
        for part in LONE_SURROGATE.split(text):
            if LONE_SURROGATE.match(part):
                data = part.encode(errors="surrogatepass")
                ids += [self.encoding.encode_single_token(bytes([byte])) for byte in data]
            else:
                for chunk in _chunks(part):
                    ids += self.encoding.encode_ordinary(chunk)
        return ids

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Return the ids of valid UTF-8 text as uint16. Several times faster than `encode`, which makes Python ints."""
        chunks = [self.encoding.encode_to_numpy(chunk, disallowed_special=()) for chunk in _chunks(text)]
        return np.concatenate(chunks).astype(np.uint16) if chunks else np.empty(0, np.uint16)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of the ids, which need not be valid UTF-8."""
        return self.encoding.decode_bytes(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Return the number of bytes of each token, (vocab_size,) int32. Special tokens have none."""
        special = set(self.special.values())
        lengths = (0 if i in special else len(self.decode_bytes([i])) for i in range(self.vocab_size))
        return np.fromiter(lengths, dtype=np.int32, count=self.vocab_size)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary from texts; too small a corpus gives a smaller one. Raises ValueError if there is no text."""
    from tokenizers import Tokenizer as BPE
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizer(LEARNED_CHARS)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = filter(None, texts)
    if (first := next(texts, None)) is None:
        raise ValueError("the tokenizer was given no text to learn from")
    bpe.train_from_iterator(itertools.chain([first], texts), trainer)
    bpe.pre_tokenizer = pre_tokenizer()
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    return Tokenizer(bpe.to_str())


def pre_tokenizer(max_chars: int | None = None) -> Any:
    """Return what splits texts into words for `tokenizers`; words longer than `max_chars` become several."""
    from tokenizers import Regex, pre_tokenizers

    patterns = [SPLIT_PATTERN, *([rf"[\s\S]{{1,{max_chars}}}"] if max_chars else [])]
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _chunks(text: str) -> list[str]:
    return [text[i : i + CHUNK_CHARS] for i in range(0, len(text), CHUNK_CHARS)]


def _letter_to_byte() -> dict[str, int]:
    """Return the byte behind each letter of a byte-level vocabulary, by GPT-2's convention that `tokenizers` follows.

    Printable Latin-1 letters stand for their own byte. Letters from U+0100 on stand for the other bytes, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(other)}
