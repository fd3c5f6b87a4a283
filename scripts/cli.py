"""What the scripts share: a config from the command line, help made from its fields, errors as one line."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from gkachat.config import Config, ConfigError
from gkachat.config_file import C, load_config

T = TypeVar("T")

RUN_FLAGS = {
    "resume": "go on with the run of this name from its newest sound checkpoint, or begin it",
    "overwrite": "delete the run of this name and start anew",
}


def check_flags(given: set[str]) -> None:
    """Raises ValueError for both of them."""
    if len(given) > 1:
        raise ValueError("given --resume and --overwrite, expected one of them")


def run(main: Callable[[], int | None]) -> None:
    """Exit with main's code; an error the user can do something about becomes one line on stderr and exit code 1."""
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


def config_from_args(
    args: list[str], description: str, flags: dict[str, str] | None = None, cls: type[C] = Config
) -> tuple[C, set[str]]:
    """`[CONFIG.toml] [--flag ...] [--section.field value ...]` as a config and the flags that were given.

    `flags` are a script's own switches and what they do.
    """
    path, args, given = split_args(args, flags or {})
    if {"-h", "--help"} & set(args):
        print_help("[CONFIG.toml]", load_config(path, cls=cls), description, flags or {})
    try:
        return load_config(path, args, cls), given
    except ConfigError as error:
        raise ConfigError([f"{path or 'options'}: {error}"]) from None


def split_args(args: list[str], flags: dict[str, str]) -> tuple[str | None, list[str], set[str]]:
    """What comes first, if it is no option; the options; the flags among them."""
    given = {flag for flag in flags if f"--{flag}" in args}
    args = [arg for arg in args if arg not in {f"--{flag}" for flag in given}]
    first = args.pop(0) if args and not args[0].startswith("-") else None
    return first, args, given


def with_progress(items: Iterable[T], what: str, characters: Callable[[T], int], total: int | None) -> Iterator[T]:
    """The same items, with a bar on the terminal that counts their characters; `total` None: not known."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    counter = TextColumn("{task.completed:,.0f} characters")
    with Progress(TextColumn(what), BarColumn(), counter, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(task, characters(item))


def benchmark_parser(description: str) -> argparse.ArgumentParser:
    """What all benchmarks ask. Python's own parser: they run where only torch is installed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--rounds", type=positive, default=10, help="how often each takes its turn")
    parser.add_argument("--threads", type=positive, help="of a CPU; by default all")
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    return parser


def positive(text: str) -> int:
    """For argparse."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"given {text!r}, expected a number above 0")
    return int(text)


def parse_benchmark(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Any, Any]:
    """Its options, with the torch device and dtype that they come to."""
    import torch  # takes seconds

    from gkachat.machine import pick_device, pick_dtype

    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    return options, device, pick_dtype(options.dtype, device)


def print_help(first: str, config: Config, description: str, flags: dict[str, str]) -> None:
    """Every field with what it does and its value in `config`; ends the program."""
    import tyro

    print(f"usage: {first} {' '.join(f'[--{flag}]' for flag in flags)} [--section.field value ...]\n")
    print(description.strip() + "\n")
    for flag, text in flags.items():
        print(f"  --{flag}  {text}")
    tyro.cli(
        type(config),
        default=config,
        args=["--help"],
        prog="",
        config=(tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes),
        use_underscores=True,
    )
