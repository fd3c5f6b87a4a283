"""Byte-level BPE: trained with `tokenizers`, stored as its JSON, run through tiktoken.

    tokenizer = train_tokenizer(texts, vocab_size=32768)
    tokenizer.save(directory); tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode("text")           # never a special token, whatever the text says
    ids = [tokenizer.bos, *ids]

Ids: the 256 bytes and the merges in the order they were learned, special tokens last.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from gkachat.files import write_text

BOS = "<|bos|>"
SPECIAL_TOKENS = (
    BOS,  # starts every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the Python tool ...
    "<|python_end|>",
    "<|output_start|>",  # ... and reads what it printed
    "<|output_end|>",
)

# GPT-4's split pattern with numbers cut into at most two digits instead of three: a small vocabulary has better uses.
SPLIT_PATTERN = (
    r"(?i:'(?:[sdmt]|ll|ve|re))|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s+"
)

LONGEST_PIECE = 500_000  # characters that are encoded at a time
FILE_NAME = "tokenizer.json"


class Tokenizer:
    """Text to ids and back, from the JSON of a `tokenizers` byte-level BPE."""

    def __init__(self, json_text: str):
        self.json_text = json_text
        stored = json.loads(json_text)
        to_byte = _byte_of_letter()
        self.special = {token["content"]: token["id"] for token in stored["added_tokens"]}
        ranks = {
            bytes(to_byte[letter] for letter in token): rank
            for token, rank in stored["model"]["vocab"].items()
            if token not in self.special
        }
        n_tokens = len(ranks) + len(self.special)
        if {*ranks.values(), *self.special.values()} != set(range(n_tokens)):
            raise ValueError(f"ids of its {n_tokens} tokens are not 0 to {n_tokens - 1}")
        if any(bytes([byte]) not in ranks for byte in range(256)):
            raise ValueError("not every byte has a token")
        self.encoding = tiktoken.Encoding(
            name="gkachat", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special
        )
        self.vocab_size = self.encoding.n_vocab
        self.bos = self.special[BOS]

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Raises FileNotFoundError where there is none, ValueError where the file is not one of ours."""
        path = Path(directory) / FILE_NAME
        if not path.exists():
            raise FileNotFoundError(f"no tokenizer at {path}; train one with python -m scripts.tok_train CONFIG")
        try:
            return cls(path.read_text())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path} is not a gkachat tokenizer ({error!r}); train it anew") from None

    def save(self, directory: str | Path) -> None:
        write_text(Path(directory) / FILE_NAME, self.json_text)

    @property
    def sha256(self) -> str:
        """What shards and checkpoints remember this tokenizer by."""
        return hashlib.sha256(self.json_text.encode()).hexdigest()

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text, or of any bytes; text that spells a special token is encoded as the text it is."""
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError:  # lone surrogates have no UTF-8; their bytes still round-trip
                return self.encode(text.encode(errors="surrogatepass"))
            return [id for piece in _pieces(text) for id in self.encoding.encode_ordinary(piece)]
        ids = []
        while text:
            try:
                return ids + self.encode(text.decode())
            except UnicodeDecodeError as error:
                ids += self.encode(text[: error.start].decode())
                ids += (self.encoding.encode_single_token(text[i : i + 1]) for i in range(error.start, error.end))
                text = text[error.end :]
        return ids

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """`encode` of valid text into uint16, without Python's integers in between: several times faster."""
        pieces = [self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in _pieces(text)]
        return np.concatenate(pieces).astype(np.uint16) if pieces else np.empty(0, np.uint16)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self.encoding.decode_bytes(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, with U+FFFD for what is not UTF-8."""
        return self.decode_bytes(ids).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int32: how many bytes of text each id stands for; 0 for special tokens."""
        special = set(self.special.values())
        lengths = (0 if i in special else len(self.decode_bytes([i])) for i in range(self.vocab_size))
        return np.fromiter(lengths, dtype=np.int32, count=self.vocab_size)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from texts. Raises ValueError when the texts are empty.

    A corpus too small for so many merges gives a smaller vocabulary.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainable

    counter = _Counted(texts)
    bpe = Trainable(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(counter, trainer)
    if not counter.characters:
        raise ValueError("the tokenizer was given no text to learn from")
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    return Tokenizer(bpe.to_str())


class _Counted:
    def __init__(self, texts: Iterable[str]):
        self.texts, self.characters = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.characters += len(text)
            yield text


def _pieces(text: str) -> list[str]:
    """The text itself, or pieces of it: a run of a million spaces overflows the stack of tiktoken's regex."""
    return [text[i : i + LONGEST_PIECE] for i in range(0, len(text), LONGEST_PIECE)]


def _byte_of_letter() -> dict[str, int]:
    """The byte behind each letter of a byte-level vocabulary.

    Printable Latin-1 letters stand for their own byte; the other bytes, in order, for the letters from U+0100 on
    (GPT-2's convention, which `tokenizers` follows).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
