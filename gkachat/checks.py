"""Checks of options: what is wrong with each, in one error.

require(self, depth=(self.depth > 0, "1 or more"), **at_least(0, self, "seed", "keep_every"))
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

DIRECTORY_NAME = "a directory name, not a path, that does not start with - or ~"


class ConfigError(ValueError):
    """Invalid options. `problems` has one line per problem, each starting with the name of its field."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


Checks = dict[str, tuple[bool, str]]  # name of a field -> (whether its value is valid, what is expected)


def require(config: Any, **checks: tuple[bool, str]) -> None:
    """Raise one ConfigError that lists every field whose check failed, and numbers that are not finite or too large."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            checks[name] = False, "a finite number"
        if isinstance(value, int) and abs(value) >= 2**63:
            checks[name] = False, "a number below 2^63"
    wrong = [f.name for f in dataclasses.fields(config) if f.name in checks and not checks[f.name][0]]
    if wrong:
        raise ConfigError([f"{name}: given {values[name]!r:.200}, expected {checks[name][1]}" for name in wrong])


def at_least(least: int, config: Any, *names: str) -> Checks:
    """Return checks that these fields are None or at least `least`."""
    values = {name: getattr(config, name) for name in names}
    return {name: (value is None or value >= least, f"{least} or more") for name, value in values.items()}


def is_directory_name(name: str) -> bool:
    """Return whether `name` can name a directory, also on a command line: it is no path, and no option."""
    return name not in (".", "..") and not name.startswith(("-", "~")) and not set(name) & set("/\\\0")
