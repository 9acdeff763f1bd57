"""The sizes of the groups that are sent."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Self

TARGET_REQUEST_BYTES = 2_500_000
COLUMN_BYTES_PER_TOKEN = 9


class ShapeError(argparse.ArgumentTypeError, ValueError):
    """A shape that cannot be read; argparse shows its text."""


@dataclass(frozen=True)
class Shape:
    """A group: how many sequences, how many tokens each."""

    sequences: int
    tokens_each: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """`8x512` is 8 sequences of 512 tokens."""
        sequences, _, tokens_each = text.partition("x")
        if not (sequences.isdigit() and tokens_each.isdigit() and int(sequences) and int(tokens_each)):
            raise ShapeError(f"shape {text!r}: write sequences x tokens of each, for example 8x512")
        return cls(int(sequences), int(tokens_each))

    def __str__(self) -> str:
        return f"{self.sequences}x{self.tokens_each}"

    @property
    def tokens(self) -> int:
        """Tokens of a whole group."""
        return self.sequences * self.tokens_each

    @property
    def groups_per_batch(self) -> int:
        """Groups of a request and of a batch: the largest power of two within 2.5 MB of columns, at most 256."""
        fitting = TARGET_REQUEST_BYTES // (self.tokens * COLUMN_BYTES_PER_TOKEN)
        return min(256, 1 << max(0, fitting.bit_length() - 1))


def parse_shapes(text: str) -> list[Shape]:
    """Comma-separated shapes."""
    return [Shape.parse(part) for part in text.split(",")]
