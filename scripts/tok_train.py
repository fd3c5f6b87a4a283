"""Train the tokenizer on the train split of a config's source.

python -m scripts.tok_train configs/laptop.toml
"""

import sys
import time
from collections.abc import Iterator
from itertools import accumulate

from gkachat.config import Config, home
from gkachat.data.shards import MANIFEST, read_manifest
from gkachat.data.sources import Corpus
from gkachat.tokenizer import FILE_NAME, train_tokenizer
from scripts.cli import parse_config, run, with_progress

WHOLE_BELOW = 1_000_000  # characters


def training_texts(config: Config) -> Iterator[str]:
    """Yield the start of each training document until they have tokenizer.train_chars characters.

    Documents are whole where their starts have fewer than WHOLE_BELOW characters, as with a single long document.
    """
    left, doc_chars = config.tokenizer.train_chars, config.tokenizer.doc_chars
    starts = (min(len(text), doc_chars) for split, text in Corpus(config.data) if split == "train")
    if all(total < WHOLE_BELOW for total in accumulate(starts)):
        doc_chars = left
    for split, text in Corpus(config.data):
        if split == "train":
            text = text[: min(left, doc_chars)]
            left -= len(text)
            yield text
            if left <= 0:
                return


def main() -> None:
    config, flags = parse_config(sys.argv[1:], __doc__, {"overwrite": "Replace a tokenizer that exists."})
    directory = home() / "tokenizer" / config.data_name
    if (directory / FILE_NAME).exists() and "overwrite" not in flags:
        print(f"tokenizer {directory} exists; --overwrite trains it again")
        return
    start = time.perf_counter()
    texts = with_progress(training_texts(config), "reading", len, config.tokenizer.train_chars)
    tokenizer = train_tokenizer(texts, config.tokenizer.vocab_size)
    tokenizer.save(directory)
    print(f"tokenizer {directory}: {tokenizer.vocab_size:,} tokens in {time.perf_counter() - start:.1f} s")
    shards = home() / "tokens" / config.data_name
    if (shards / MANIFEST).exists() and read_manifest(shards).tokenizer_sha256 != tokenizer.sha256:
        print(f"{shards} was made with the tokenizer before; scripts.data_prep --reread makes it again")


if __name__ == "__main__":
    run(main)
