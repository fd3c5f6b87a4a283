"""Tokenize a config's source into shards; run again, it goes on where it stopped.

python -m scripts.data_prep configs/laptop.toml
"""

import dataclasses
import sys
import time

from gkachat.config import home
from gkachat.data.shards import SPLITS, Shard, write_shards
from gkachat.data.sources import Corpus
from gkachat.tokenizer import Tokenizer
from scripts.cli import config_from_args, run, with_progress


def main() -> None:
    config, flags = config_from_args(sys.argv[1:], __doc__, {"reread": "read the source again though all is there"})
    tokenizer = Tokenizer.load(home() / "tokenizer" / config.data_name)
    directory = home() / "tokens" / config.data_name
    corpus, start = Corpus(config.data), time.perf_counter()

    def progress(shard: Shard, reused: bool) -> None:
        seconds = time.perf_counter() - start
        print(f"{shard.name} {shard.tokens:,} tokens{', was there' if reused else ''} | {seconds:.0f} s", flush=True)

    manifest = write_shards(
        with_progress(corpus, "tokenizing", lambda document: len(document[1]), config.data.max_chars),
        tokenizer,
        directory,
        source=dataclasses.asdict(config.data) | {"files": list(config.data.files)},
        shard_chars=config.data.shard_chars,
        dropped=lambda: {reason: n for reason, n in corpus.counts.items() if reason != "kept"},
        progress=progress,
        reread="reread" in flags,
    )
    for split in SPLITS:
        docs, tokens, n_bytes = (manifest.total(split, what) for what in ("documents", "tokens", "bytes"))
        print(f"{split}: {docs:,} documents, {tokens:,} tokens, {n_bytes:,} bytes, {n_bytes / tokens:.2f} a token")
    print("dropped: " + ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in manifest.dropped.items()))


if __name__ == "__main__":
    run(main)
