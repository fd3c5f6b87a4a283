"""Build a `Config` from a TOML file and command-line overrides, and write one as TOML.

config = load_config("configs/laptop.toml", ["--model.attention", "gka"])

tyro parses the overrides (`--section.field value` or `--section.field=value`) and prints the help. `from_dict` checks
names and types, and the dataclasses check their values.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gkachat.checks import ConfigError
from gkachat.config import Config
from gkachat.text import decode, expand

TOO_LARGE = "given a number of more than 64 bits, expected one below 2^63"
MAX_MESSAGE = 300  # characters of an error of the command line, which may quote an argument of any length
NO_TYPE = r"(Error parsing \S+): no type matching (\S+) could be instantiated from \['?(.*?)'?\]"  # tyro's message
C = TypeVar("C")
T = TypeVar("T")


def load_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = (), cls: type[C] = Config
) -> C:
    """Return the config of a TOML file, or of its tables (None: all defaults), with `overrides` laid over it.

    Raises FileNotFoundError for a missing file, and ConfigError that names each invalid field.
    """
    tree = read_toml(source) if isinstance(source, str | Path) else source or {}
    defaults = from_dict(cls, tree, check=False)
    values = dataclasses.asdict(parse_overrides(defaults, overrides) if overrides else defaults)
    if "tokenizer" in values and values["model"]["vocab_size"] is None:
        values["model"]["vocab_size"] = values["tokenizer"]["vocab_size"]
    config = from_dict(cls, values)
    if "tokenizer" in values and config.model.vocab_size < config.tokenizer.vocab_size:
        expected = f"at least tokenizer.vocab_size {config.tokenizer.vocab_size}"
        raise ConfigError([f"model.vocab_size: given {config.model.vocab_size}, expected {expected}"])
    return config


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the tables of a TOML file. Raises FileNotFoundError, or ConfigError if it is not TOML."""
    try:
        return tomllib.loads(decode(expand(path).read_bytes()))
    except FileNotFoundError:
        shipped = sorted(f"configs/{found.name}" for found in Path(__file__).parents[1].glob("configs/*.toml"))
        raise FileNotFoundError(f"no config file {path}; there are: {', '.join(shipped)}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or a number of thousands of digits
        raise ConfigError([f"{path}: not valid TOML: {error}"]) from None


def to_toml(config: Any) -> str:
    """Return the config as TOML that `load_config` reads back. Fields that are None are left out."""
    import tomli_w  # benchmarks import this file where only torch is installed

    def without_none(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {name: without_none(value) for name, value in node.items() if value is not None}

    return tomli_w.dumps(without_none(dataclasses.asdict(config)))


def from_dict(cls: type[C], tree: dict[str, Any], check: bool = True) -> C:
    """Return the dataclass `cls` built from nested dicts, as TOML and JSON have them.

    With `check=False`, values are neither checked nor derived: fields that are None stay None.
    Raises ConfigError that lists every unknown, ill-typed or invalid field.
    """
    problems: list[str] = []
    config = _build(cls, tree, "", problems, check)
    if problems:
        raise ConfigError(problems)
    return config


def parse_overrides(defaults: C, overrides: Sequence[str], **options: Any) -> C:
    """Return `defaults`, which are unchecked, with overrides laid over them. `options` are those of tyro.cli."""
    import tyro  # takes a quarter of a second, and most configs come without overrides

    flags = (tyro.conf.FlagConversionOff,)  # --field true, not --field and --no-field
    return parse_args(type(defaults), overrides, default=defaults, config=flags, use_underscores=True, **options)


def hide(defaults: C, names: Iterable[str], prefix: str = "") -> C:
    """Return defaults whose options in `names`, such as "model" or "train.protocol", do not show in the help."""
    import tyro

    hints, values, shown = get_type_hints(type(defaults)), dict(vars(defaults)), {}
    for name in values:
        if prefix + name in names:
            shown[name] = tyro.conf.Suppress[hints[name]]
        elif any(other.startswith(f"{prefix}{name}.") for other in names):
            values[name] = hide(values[name], names, f"{prefix}{name}.")
            shown[name] = type(values[name])
    cls = type(defaults)
    names = {"__annotations__": shown, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), names)(**values)


def kind_of(tree: Mapping[str, Any]) -> str:
    """Return what a config's tables, of TOML or of meta.json, belong to: a language, tuned language or image model."""
    if "patch_size" in str(tree.get("model")):
        return "image model"
    return "tuned language model" if "chat" in tree else "language model"


def parse_args(target: Callable[..., T], args: Sequence[str], **options: Any) -> T:
    """Return what `tyro.cli` makes of the arguments. `--help` prints the help and exits.

    Raises ConfigError, of one line, for the first option that is unknown or ill-typed.
    """
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(target, args=args, registry=_rules(), **options)
    except SystemExit as exit:
        if not exit.code:  # --help
            raise
        raise ConfigError([_first_line(box.getvalue())]) from None


def _rules() -> Any:
    """Return the tyro rules of words, whole numbers, paths and tuples.

    true, false and none are written as in TOML, whole numbers have at most 64 bits, and ~ in a path is expanded. The
    help shows an empty tuple as none.
    """
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry, words = ConstructorRegistry(), {bool: {"true": True, "false": False}, NoneType: {"none": None}}

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        values = words.get(info.type)
        return values and PrimitiveConstructorSpec(
            nargs=1,
            metavar="{" + ",".join(values) + "}",
            instance_from_str=lambda texts: values[texts[0]],
            is_instance=lambda value: type(value) is info.type,
            str_from_instance=lambda value: [str(value).lower()],
            choices=tuple(values),
        )

    @registry.primitive_rule
    def int_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type is not int:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=lambda texts: _whole(texts[0]),
            is_instance=lambda value: type(value) is int,
            str_from_instance=lambda value: [str(value)],
        )

    @registry.primitive_rule
    def path_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda texts: expand(texts[0]),
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    @registry.primitive_rule
    def tuple_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type_origin is not tuple:
            return None
        item, _ = get_args(info.type)  # of a tuple of any length
        spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(item, info.markers))
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar=f"[{spec.metavar} [{spec.metavar} ...]]",
            instance_from_str=lambda texts: tuple(spec.instance_from_str([text]) for text in texts),
            is_instance=lambda value: isinstance(value, tuple) and all(map(spec.is_instance, value)),
            str_from_instance=lambda value: [spec.str_from_instance(one)[0] for one in value] or ["none"],
            choices=spec.choices,
        )

    return registry


def _whole(text: str) -> int:
    """Return the whole number that a text spells. Raises ValueError for any other text."""
    try:
        value = int(text)
    except ValueError:  # Python reads no number of thousands of digits
        raise ValueError(TOO_LARGE if text.isdecimal() else f"given {text!r}, expected a whole number") from None
    if not _fits(value):
        raise ValueError(TOO_LARGE)
    return value


def _fits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def _first_line(box: str) -> str:
    """Return the message of an error that tyro framed and wrapped, and the option it suggests, as one line."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()]
    _, message, *rest = re.split(r"^(?:[╭╰─].*|-{10,})$", "\n".join(lines), flags=re.MULTILINE)  # title, message, ...
    suggested = re.search(r"Perhaps you meant:\s+(--\S+)", "".join(rest))
    flat = " ".join(message.strip().split("\n\n")[0].split())
    if no_type := re.match(NO_TYPE, flat):
        option, kinds, given = no_type.groups()
        is_number = given.replace(" ", "").isdecimal()  # tyro broke it into lines
        flat = f"{option}: " + (TOO_LARGE if is_number else f"given {given!r}, expected {kinds}")
    flat = textwrap.shorten(flat, MAX_MESSAGE, placeholder=" ...")
    return flat + (f" (did you mean {suggested[1]}?)" if suggested else "")


@functools.cache
def _without_post_init(cls: type) -> type:
    """Return a subclass of a dataclass whose instances, also those that tyro makes, hold their fields as given."""
    names = {"__post_init__": lambda self: None, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), names)


def _build(cls: type, tree: Any, prefix: str, problems: list[str], check: bool) -> Any:
    """Return `cls` built from nested dicts. None, and more `problems`, if something is wrong."""
    if not isinstance(tree, dict):
        problems.append(f"{prefix.rstrip('.')}: given {tree!r}, expected a table")
        return None
    kinds, values, before = get_type_hints(cls), {}, len(problems)
    for name in tree:
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            problems.append(f"{prefix}{name}: unknown field" + (f" (did you mean {prefix}{near[0]}?)" if near else ""))
    for name, kind in kinds.items():
        if dataclasses.is_dataclass(kind):
            values[name] = _build(kind, tree.get(name, {}), f"{prefix}{name}.", problems, check)
        elif name in tree:
            try:
                values[name] = _convert(tree[name], kind)
            except TypeError as error:
                problems.append(f"{prefix}{name}: {error}")
    if len(problems) > before:
        return None
    try:
        return (cls if check else _without_post_init(cls))(**values)
    except ConfigError as error:
        problems += [prefix + problem for problem in error.problems]
        return None


def _convert(value: Any, kind: Any) -> Any:
    """Return a TOML value as the type `kind` of a field. Raises TypeError if it has another type."""
    if type(value) is int and not _fits(value):
        raise TypeError(TOO_LARGE)
    origin, kinds = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for one in kinds:
            with contextlib.suppress(TypeError):
                return _convert(value, one)
    elif origin is Literal:
        if isinstance(value, str) and value in kinds:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(item, kinds[0]) for item in value)
    elif kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    elif type(value) is kind:
        return value
    name = kind.__name__ if origin is None else str(kind).replace("typing.", "")
    raise TypeError(f"given {value!r}, expected {name}")
