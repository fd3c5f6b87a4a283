"""Helpers of the scripts: a config from the command line, its help, and errors as one line.

Importing torch takes seconds, for which neither `--help` nor a mistyped option need wait. A script's module therefore
imports what reads its options, and its `main` imports the rest once they are read. Types that come with torch, in the
signatures of a script's other functions, are imported under `TYPE_CHECKING`.
"""

import argparse
import dataclasses
import difflib
import errno
import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar, get_type_hints

from gkachat.checks import ConfigError
from gkachat.config import Config, TuningConfig
from gkachat.config_file import C, from_dict, hide, load_config, parse_args, parse_overrides, read_toml

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

RUN_FLAGS = {
    "resume": "Continue the run of this name from its newest sound checkpoint, or start it.",
    "overwrite": "Delete the run of this name and start anew.",
}


def run(main: Callable[..., int | None], description: str | None = None) -> None:
    """Call `main` and exit with its code. An error that the user can act on becomes one line on stderr and code 1.

    With a description, tyro makes the arguments of `main` from the command line.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open as long as the process)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # what a caller put in place of a stream
            stream.reconfigure(errors="backslashreplace")  # for characters that the terminal's encoding does not have
    try:  # also whatever is printed, as to a full disk
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by scripts/__init__.py
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if description is not None:
            options = {
                "prog": f"python -m scripts.{Path(sys.argv[0]).stem}",
                "description": _one_example_a_line(description),
            }
            bind = functools.wraps(main)(functools.partial(functools.partial, main))  # tyro must not call main itself
            main = parse_args(bind, sys.argv[1:], **options)
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except (ValueError, OSError, FloatingPointError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC) and error.filename is None:
            with suppress(OSError, ValueError):  # what is still to be printed, which Python would try once more
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            message += ": the disk that the output goes to, or that of temporary files, is full"
        if not isinstance(error, BrokenPipeError):
            print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:  # on a GPU torch raises its own RuntimeError, on a CPU a plain one
        reason = str(error).partition("\n")[0] or "no more to be had"
        if not isinstance(error, MemoryError) and not re.search("(out of|allocate|enough) memory", reason):
            raise
        print(f"error: out of memory ({reason}): give a smaller batch or model", file=sys.stderr)
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
    tree = read_toml(path) if path else {}
    try:
        return load_config(tree, overrides, cls), given
    except ConfigError as error:
        other = other_kind(tree, cls)
        raise ConfigError([f"{path or 'options'}: {other or error}"]) from None


def other_kind(tree: dict, cls: type) -> str | None:
    """Return what a TOML file is that has the fields of another kind of config than `cls`. None for any other file."""
    from gkachat.vision_config import VisionConfig

    if "sweep" in tree:
        return "a sweep file, which scripts.sweep reads"
    others = {
        Config: "a config of language models, which scripts.base_train reads",
        VisionConfig: "a config of image models, which scripts.vision_train reads",
        TuningConfig: "the config of a tuned run, which scripts.chat_sft makes from another run",
    }
    for kind in (cls, *others):
        with suppress(ConfigError):
            from_dict(kind, tree, check=False)
            return None if kind is cls else others[kind]
    return None


def split_args(
    args: list[str],
    first: str,
    description: str,
    flags: dict[str, str],
    cls: type = Config,
    fixed: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str | None, list[str], set[str]]:
    """Return the first argument (None if it is an option), the config overrides, and the flags that were given.

    `first` is what the help calls the first argument. `flags` maps the script's own switches to their help. `--help`
    prints usage, description, flags and every field with its value in the TOML file, and exits. `fixed` maps options
    that cannot apply, or their sections, to the reason. Raises ConfigError for them.
    """
    given = {flag for flag in flags if f"--{flag}" in args}
    args = [arg for arg in args if arg not in {f"--{flag}" for flag in given}]
    path = args.pop(0) if args and not args[0].startswith("-") else None
    if {"-h", "--help"} & set(args):
        usage = ["python -m", f"scripts.{Path(sys.argv[0]).stem}", first, *(f"[--{flag}]" for flag in flags)]
        text = _one_example_a_line(description) + "".join(f"\n\n--{flag:11}{text}" for flag, text in flags.items())
        tree = read_toml(path) if path and first == "[CONFIG.toml]" else {}
        defaults = hide(from_dict(cls, tree, check=False), fixed)
        parse_overrides(defaults, ["--help"], prog=" ".join(usage), description=text)
    for word in args:  # the fields of a config have a dot
        if re.match(r"--[a-z][^.=]*(=|$)", word):
            near = difflib.get_close_matches(word, [f"--{flag}" for flag in flags], n=1)
            raise ConfigError([f"Unrecognized options: {word}" + (f" (did you mean {near[0]}?)" if near else "")])
    names = [word.partition("=")[0][2:].replace("-", "_") for word in args if word.startswith("--")]
    if wrong := [(name, why) for name in names for option, why in fixed.items() if f"{name}.".startswith(f"{option}.")]:
        raise ConfigError([f"--{name}: cannot be set: {why}" for name, why in wrong])
    if given >= {"resume", "overwrite"}:
        raise ValueError("given --resume and --overwrite, expected one of them")
    return path, args, given


def check_names(args: list[str], cls: type = Config) -> None:
    """Raise ConfigError for a word that is no option of the config `cls`. Needs the standard library alone.

    `parse_config` checks values too, for which tyro must be installed.
    """
    known = list(_option_names(cls, "--"))
    if args and not args[0].startswith("-"):
        raise ConfigError([f"given {args[0]!r}, expected options"])
    for word in args:
        name = word.partition("=")[0]
        name = name[:2] + name[2:].replace("-", "_")  # as tyro reads it
        if re.match(r"-+[A-Za-z]", name) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError([f"unrecognized option {word}" + (f" (did you mean {near[0]}?)" if near else "")])


def _option_names(cls: type, prefix: str) -> Iterator[str]:
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _option_names(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def benchmark_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that all bench scripts share; `parse_benchmark` uses it.

    It is argparse's, because they run on GPU machines that have torch but none of the other dependencies.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m scripts.{Path(sys.argv[0]).stem}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto", help="a torch device, or auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="of activations")
    parser.add_argument("--rounds", type=positive, default=10, help="samples of each contestant")
    parser.add_argument("--threads", type=positive, help="CPU threads; by default all")
    parser.add_argument("--compile", action="store_true", help="compile what is timed with torch.compile")
    parser.add_argument("--out", type=os.path.expanduser, help="write OUT.json and OUT.md")
    return parser


def positive(text: str) -> int:
    """Read a positive integer, as an argparse type."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"given {text!r}, expected a number above 0")
    return int(text)


def parse_benchmark(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, "torch.device", "torch.dtype"]:
    """Parse the command line; return its options with the device and dtype they select."""
    options = parser.parse_args()
    import torch

    from gkachat.machine import pick_device, pick_dtype

    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    return options, device, pick_dtype(options.dtype, device)


def with_progress(items: Iterable[T], what: str, characters: Callable[[T], int], total: int | None) -> Iterator[T]:
    """Yield the items, with a progress bar that counts their characters out of `total` (None: unknown)."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    counter = TextColumn("{task.completed:,.0f} characters")
    with Progress(TextColumn(what), BarColumn(), counter, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(task, characters(item))
