"""Tokenize a config's source into shards. An interrupted run continues where it stopped when it is run again.

python -m scripts.data_prep configs/laptop.toml
"""

import sys
import time
from itertools import islice
from pathlib import Path

from gkachat.config import Config, home
from gkachat.data.shards import MANIFEST, SPLITS, Manifest, read_manifest, write_shards
from gkachat.data.sources import Corpus, file_stamp, source_options
from gkachat.files import free_disk, lock
from gkachat.tokenizer import Tokenizer
from scripts.cli import parse_config, run, with_progress

SAMPLE = 200  # documents that the disk space is estimated from


def announce_disk(corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> None:
    """Print the disk space that the shards need. Raises OSError if there is less."""
    texts = [text for _, text in islice(corpus, SAMPLE)]
    characters, tokens = sum(map(len, texts)), sum(len(tokenizer.encode_to_numpy(text)) for text in texts)
    bytes_per_char = (2 * tokens + 8 * len(texts)) / characters
    free, existing = free_disk(directory)
    free /= 2**30
    total = corpus.config.max_chars
    if total is None:
        print(f"disk: about {bytes_per_char:.2f} bytes per character; {free:,.3g} GiB free at {existing}", flush=True)
        return
    need = bytes_per_char * total / 2**30
    print(f"disk: about {need:,.3g} GiB for {total:,} characters; {free:,.3g} GiB are free at {existing}", flush=True)
    if need > free:
        raise OSError(
            f"shards of {total:,} characters take about {need:,.3g} GiB, {free:,.3g} GiB are free at {existing}: "
            "free some, set GKACHAT_HOME, or lower data.max_chars"
        )


def changed_since(manifest: Manifest, config: Config) -> str:
    """Return what to add to a line about a corpus whose files have changed since it was made."""
    try:
        now = file_stamp(config.data)
    except FileNotFoundError:  # they are no longer needed
        return ""
    if not manifest.files or now == manifest.files:
        return ""
    return f", and data.files has changed: {manifest.files['number']:,} files then, {now['number']:,} now"


def main() -> None:
    flags = {"reread": "Read the source again although all shards exist, and replace those that differ."}
    config, flags = parse_config(sys.argv[1:], __doc__, flags)
    tokenizer = Tokenizer.load(home() / "tokenizer" / config.data_name)
    directory = home() / "tokens" / config.data_name
    corpus, start, reread = Corpus(config.data), time.perf_counter(), "reread" in flags
    before = read_manifest(directory) if (directory / MANIFEST).exists() else None
    if before is None:
        announce_disk(corpus, tokenizer, directory)

    shards = write_shards(
        with_progress(corpus, "tokenizing", lambda document: len(document[1]), config.data.max_chars),
        tokenizer,
        directory,
        source=source_options(config.data),
        shard_chars=config.data.shard_chars,
        dropped=lambda: {reason: n for reason, n in corpus.counts.items() if reason != "kept"},
        files=lambda: file_stamp(config.data),
        reread=reread,
    )
    busy = f"{directory} is being written by another scripts.data_prep: wait for it, or stop it"
    with lock(directory, busy=busy):  # two processes must never write one manifest
        for shard, reused in shards:
            seconds, told = time.perf_counter() - start, ", was there" if reused else ""
            print(f"{shard.name} {shard.tokens:,} tokens{told} | {seconds:.0f} s", flush=True)
    if corpus.cut:
        print("all documents fell into one split: the last was cut at a line end into train and val")
    manifest = read_manifest(directory)
    for split in SPLITS:
        docs, tokens, n_bytes = (manifest.total(split, what) for what in ("documents", "tokens", "bytes"))
        print(f"{split}: {docs:,} documents, {tokens:,} tokens, {n_bytes:,} bytes, {n_bytes / tokens:.2f} per token")
    if before and before.complete and not corpus.counts:  # no document was read
        print(
            f"all of it was there: the source was not read again; --reread does that{changed_since(manifest, config)}"
        )
    print("dropped: " + ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in manifest.dropped.items()))


if __name__ == "__main__":
    run(main)
