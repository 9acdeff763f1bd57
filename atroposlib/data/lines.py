"""Lines of JSON files, plain or compressed, one at a time: files may be larger than memory, and may have been cut."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from atroposlib.data.entries import Entry
from atroposlib.data.registry import Row
from atroposlib.errors import DataError

HALF_A_PAIR = "half of a surrogate pair (\\ud800 to \\udfff) stands alone in a string; no text can hold it"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BROKEN_ARCHIVE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


def read_lines(path: Path) -> Iterator[Entry]:
    """Each line of a file as a row; empty lines are passed over.

    A compressed file that was cut, or is broken, gives what can be read of it and then an entry that says so.

    Raises:
        DataError: the file cannot be opened or read.
    """
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _entry(f"{path}, line {number}", line)
    except _BROKEN_ARCHIVE as error:
        problem = f"the archive is broken or was cut here: {error}; write the file again"
        yield Entry(f"{path}, line {number + 1}", None, problem)
    except OSError as error:
        raise DataError(f"cannot read the data set {str(path)!r}: {error}") from error


def parse_object(text: bytes | str) -> Row:
    """A line as an object.

    Raises:
        DataError: it is not JSON, not an object, or holds characters that no text can be made of.
    """
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at character {error.pos}; write one object a line") from error
    # Not UTF-8, nested too deep, or a number with too many digits: of no use either.
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}; write one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"a row is an object, not {type(row).__name__}")
    if may_hold_half_a_pair(text) and holds_half_a_pair(row):
        raise DataError(HALF_A_PAIR)
    return cast(Row, row)


def _entry(place: str, line: bytes) -> Entry:
    try:
        return Entry(place, parse_object(line.strip()))
    except DataError as error:
        is_half = not line.endswith(b"\n") and "not JSON" in str(error)
        hint = " (the last line: was the file cut while it was written?)" if is_half else ""
        return Entry(place, None, f"{error}{hint}", line.decode("utf-8", "replace").rstrip("\n"))


def may_hold_half_a_pair(text: bytes | str) -> bool:
    """Whether JSON escapes any surrogate: cheap, so that few rows need the closer look."""
    return _SURROGATE.search(text if isinstance(text, bytes) else text.encode("utf-8", "replace")) is not None


def holds_half_a_pair(row: Any) -> bool:
    """Whether a string holds half of a surrogate pair, which no tokenizer or file takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _opened(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return cast(BinaryIO, lzma.open(path, "rb")) if path.suffix == ".xz" else path.open("rb")
