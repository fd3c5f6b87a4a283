"""Helpers of the scripts: a config from the command line, its help, and errors as one line."""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from gkachat.config import Config, ConfigError
from gkachat.config_file import C, from_dict, load_config, parse_args, parse_overrides, read_toml

T = TypeVar("T")

RUN_FLAGS = {
    "resume": "Continue the run of this name from its newest sound checkpoint, or start it.",
    "overwrite": "Delete the run of this name and start anew.",
}


def run(main: Callable[..., int | None], description: str | None = None) -> None:
    """Call `main` and exit with its code. An error that the user can act on becomes one line on stderr and code 1.

    With a description, tyro makes the arguments of `main` from the command line.
    """
    try:
        if description is not None:
            options = {
                "prog": f"python -m scripts.{Path(sys.argv[0]).stem}",
                "description": _one_example_a_line(description),
            }
            bind = functools.wraps(main)(functools.partial(functools.partial, main))  # tyro must not call main itself
            main = parse_args(bind, sys.argv[1:], **options)
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


def _one_example_a_line(description: str) -> str:
    """Indent example commands. tyro joins the lines of a paragraph, except those that do not start with a letter."""
    return re.sub(r"\n+(?=(?:python|torchrun|bash) )", "\n  ", description.strip())


def parse_config(
    args: list[str], description: str, flags: dict[str, str] | None = None, cls: type[C] = Config
) -> tuple[C, set[str]]:
    """Return the config of `[CONFIG.toml] [--flag ...] [--section.field value ...]` and the flags, as `split_args`."""
    path, overrides, given = split_args(args, "[CONFIG.toml]", description, flags or {}, cls)
    try:
        return load_config(path, overrides, cls), given
    except ConfigError as error:
        raise ConfigError([f"{path or 'options'}: {error}"]) from None


def split_args(
    args: list[str], first: str, description: str, flags: dict[str, str], cls: type = Config
) -> tuple[str | None, list[str], set[str]]:
    """Return the first argument (None if it is an option), the config overrides, and the flags that were given.

    `first` is what the help calls the first argument. `flags` maps the script's own switches to their help. `--help`
    prints usage, description, flags and every field with its value in the TOML file, and exits.
    """
    given = {flag for flag in flags if f"--{flag}" in args}
    args = [arg for arg in args if arg not in {f"--{flag}" for flag in given}]
    path = args.pop(0) if args and not args[0].startswith("-") else None
    if {"-h", "--help"} & set(args):
        usage = ["python -m", f"scripts.{Path(sys.argv[0]).stem}", first, *(f"[--{flag}]" for flag in flags)]
        text = _one_example_a_line(description) + "".join(f"\n--{flag:11}{text}" for flag, text in flags.items())
        tree = read_toml(path) if path and first == "[CONFIG.toml]" else {}
        parse_overrides(from_dict(cls, tree, check=False), ["--help"], prog=" ".join(usage), description=text)
    if given >= {"resume", "overwrite"}:
        raise ValueError("given --resume and --overwrite, expected one of them")
    return path, args, given


def with_progress(items: Iterable[T], what: str, characters: Callable[[T], int], total: int | None) -> Iterator[T]:
    """Yield the items, with a progress bar that counts their characters out of `total` (None: unknown)."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    counter = TextColumn("{task.completed:,.0f} characters")
    with Progress(TextColumn(what), BarColumn(), counter, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(task, characters(item))
