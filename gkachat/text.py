"""Text and JSON as people have them: what every reader of text in this package accepts, and what it says otherwise.

    text = decode(path.read_bytes())
    for line in lines(file): value = parse_json(line)

Text is Unicode that has a UTF-8 encoding (`is_text`). A byte-order mark is dropped.
"""

import codecs
import difflib
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is its beginning
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
CONVERT = "convert it to UTF-8 (iconv -f {} -t UTF-8)"


def encoding_of(start: bytes) -> str:
    """Return the encoding that the byte-order mark at the start of a file names, or else UTF-8."""
    return next((encoding for mark, encoding in BOMS.items() if start.startswith(mark)), "utf-8")


def decode(data: bytes) -> str:
    """Return bytes as text, without their byte-order mark. Raises ValueError for other encodings and NUL characters."""
    encoding = encoding_of(data[:4])
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"not {name} at byte {error.start}; {CONVERT.format('ENCODING')} or leave it out") from None
    if "\0" in text:
        where = "as in UTF-16 without a byte-order mark or in binary data"
        raise ValueError(f"NUL characters, {where}; {CONVERT.format('UTF-16LE')} or leave it out")
    return text


def lines(file: BinaryIO) -> Iterable[bytes]:
    """Return the lines of a buffered binary file, each to be decoded by itself; UTF-16 and UTF-32 become UTF-8."""
    encoding = encoding_of(file.peek(4)[:4])
    if encoding.startswith("utf-8"):
        return file
    return (line.encode() for line in io.TextIOWrapper(file, encoding, newline="\n"))


def parse_json(data: bytes | str) -> Any:
    """Return the value of a JSON text. Raises ValueError for anything else, however hostile it is, and for NaN."""
    try:
        return JSON.decode(decode(data) if isinstance(data, bytes) else data)
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos}); is it truncated?") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError("not JSON (a number of thousands of digits)") from None
        raise


def _refuse(name: str) -> None:
    raise ValueError(f"not JSON ({name} is no JSON number)")


JSON = json.JSONDecoder(parse_constant=_refuse)


def is_text(*texts: str) -> bool:
    """Return whether texts have a UTF-8 encoding. JSON can spell half of a surrogate pair, which has none."""
    try:
        return all(text.encode() is not None for text in texts)
    except UnicodeEncodeError:
        return False


def check_text(text: str) -> str:
    """Return a text. Raises ValueError if it has no UTF-8 encoding."""
    if not is_text(text):
        raise ValueError("half of a surrogate pair, which is no text")
    return text


def visible(text: str) -> str:
    """Return a text with control characters as escapes, except line ends and tabs: a terminal would obey them."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def expand(path: str | os.PathLike[str]) -> Path:
    """Return a path with ~ expanded, which a shell does not do in a TOML file or after `=`."""
    return Path(os.path.expanduser(path))


def list_near(name: str, known: Sequence[str], most: int = 10) -> str:
    """Return the known names as one line: all of them, or, if they are more than `most`, those similar to `name`."""
    if len(known) <= most:
        return ", ".join(known) or "none"
    near = dict.fromkeys([*difflib.get_close_matches(name, known, most), *(one for one in known if name in one)])
    shown = [*near][:most] or known[:most]
    return f"{', '.join(shown)} and {len(known) - len(shown):,} more"


def list_some(problems: Sequence[str], most: int = 10) -> str:
    """Return problems as one line, of which all above `most` are only counted."""
    more = [f"and {len(problems) - most:,} more"] if len(problems) > most else []
    return "; ".join([*problems[:most], *more])
