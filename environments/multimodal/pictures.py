"""Pictures of coloured squares, drawn here and written as PNG with the standard library alone."""

from __future__ import annotations

import base64
import random
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Colour: TypeAlias = tuple[int, int, int]
"""Red, green and blue, 0 to 255 each."""

COLOURS: Mapping[str, Colour] = {"red": (220, 40, 40), "green": (40, 160, 70), "blue": (50, 80, 220)}
BACKGROUND: Colour = (255, 255, 255)
CELLS = 4
"""Squares in a row, and rows."""
CELL_PX = 28
"""Of which SQUARE_PX are coloured. 28 is the patch that Qwen's vision models merge into one token."""
SQUARE_PX = 20
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EIGHT_BIT_RGB = (8, 2, 0, 0, 0)


def draw_squares(counts: Mapping[str, int]) -> bytes:
    """A PNG with that many squares of each colour, at places that depend on the counts alone.

    Raises:
        ValueError: there are more squares than cells.
    """
    squares = [COLOURS[name] for name, count in sorted(counts.items()) for _ in range(count)]
    if len(squares) > CELLS**2:
        raise ValueError(f"a picture has room for {CELLS**2} squares, not for {len(squares)}")
    places = random.Random(repr(sorted(counts.items()))).sample(range(CELLS**2), k=len(squares))
    cells = dict(zip(places, squares, strict=True))
    size = CELLS * CELL_PX
    return png([[_pixel(cells, x, y) for x in range(size)] for y in range(size)])


def png(rows: Sequence[Sequence[Colour]]) -> bytes:
    """An 8-bit RGB image as a file.

    Args:
        rows: of equal length, from the top.
    Source: PNG specification, third edition, sections 5, 7 and 11.
    """
    # Filter 0 before each row: its bytes stand as they are.
    raw = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in rows)
    header = struct.pack(">II5B", len(rows[0]), len(rows), *_EIGHT_BIT_RGB)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(raw, 9)) + _chunk(b"IEND", b"")


def data_url(image: bytes) -> str:
    """As the content part of a chat message takes it."""
    return f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}"


def _pixel(cells: Mapping[int, Colour], x: int, y: int) -> Colour:
    is_inside = x % CELL_PX < SQUARE_PX and y % CELL_PX < SQUARE_PX
    return cells.get(y // CELL_PX * CELLS + x // CELL_PX, BACKGROUND) if is_inside else BACKGROUND


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
