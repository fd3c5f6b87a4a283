"""Shared by the scripts: a config from the command line, its help, and errors as one line."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from gkachat.config import Config, ConfigError
from gkachat.config_file import C, load_config, parse_overrides, read_toml, unchecked

T = TypeVar("T")

RUN_FLAGS = {
    "resume": "Continue the run of this name from its newest sound checkpoint, or start it.",
    "overwrite": "Delete the run of this name and start anew.",
}


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its code. An error that the user can act on becomes one line on stderr and code 1."""
    try:
        sys.exit(main())
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def parse_config(
    args: list[str], description: str, flags: dict[str, str] | None = None, cls: type[C] = Config
) -> tuple[C, set[str]]:
    """Return the config of `[CONFIG.toml] [--flag ...] [--section.field value ...]` and the flags that were given.

    `flags` maps the script's own switches to their help. `--help` prints the help and exits.
    """
    path, overrides, given = split_args(args, "[CONFIG.toml]", description, flags or {}, cls)
    try:
        return load_config(path, overrides, cls), given
    except ConfigError as error:
        raise ConfigError([f"{path or 'options'}: {error}"]) from None


def split_args(
    args: list[str], first: str, description: str, flags: dict[str, str], cls: type = Config
) -> tuple[str | None, list[str], set[str]]:
    """Return the first argument (None if it is an option), the config overrides, and the flags that were given.

    `first` is what the help calls the first argument. `--help` prints the help and exits.
    """
    given = {flag for flag in flags if f"--{flag}" in args}
    args = [arg for arg in args if arg not in {f"--{flag}" for flag in given}]
    path = args.pop(0) if args and not args[0].startswith("-") else None
    if {"-h", "--help"} & set(args):
        print_help(first, path if first == "[CONFIG.toml]" else None, description, flags, cls)
    return path, args, given


def check_flags(given: set[str]) -> None:
    """Raise ValueError if both --resume and --overwrite were given."""
    if len(given) > 1:
        raise ValueError("given --resume and --overwrite, expected one of them")


def print_help(first: str, path: str | None, description: str, flags: dict[str, str], cls: type = Config) -> None:
    """Print usage, description, flags and every field with its value in the TOML file at `path`, and exit."""
    usage = ["python -m", f"scripts.{Path(sys.argv[0]).stem}", first, *(f"[--{flag}]" for flag in flags)]
    # tyro joins the lines of a paragraph, except those that do not start with a letter.
    examples = re.sub(r"\n+(?=(?:python|torchrun|bash) )", "\n  ", description.strip())
    options = "".join(f"\n--{flag:11}{text}" for flag, text in flags.items())
    defaults = unchecked(cls, read_toml(path) if path else {})
    parse_overrides(defaults, ["--help"], prog=" ".join(usage), description=examples + options)


def with_progress(items: Iterable[T], what: str, characters: Callable[[T], int], total: int | None) -> Iterator[T]:
    """Yield the items, with a progress bar that counts their characters out of `total` (None: unknown)."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    counter = TextColumn("{task.completed:,.0f} characters")
    with Progress(TextColumn(what), BarColumn(), counter, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(task, characters(item))


def benchmark_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that all benchmarks share. It is argparse's, because they need only torch."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--rounds", type=positive, default=10, help="measurements of each contestant, in turns")
    parser.add_argument("--threads", type=positive, help="CPU threads; all by default")
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    return parser


def positive(text: str) -> int:
    """Return the integer above 0 that `text` spells, for argparse."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"given {text!r}, expected a number above 0")
    return int(text)


def parse_benchmark(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Any, Any]:
    """Parse the command line. Return the options, the torch device and the torch dtype."""
    import torch  # takes seconds

    from gkachat.machine import pick_device, pick_dtype

    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    return options, device, pick_dtype(options.dtype, device)
