"""Remembers, per group, what the engine said about each sequence, so that authors need not carry it by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

from atroposlib.type_definitions import VersionRuns
from atroposlib.wire.packing import packed


@dataclass(frozen=True)
class Origin:
    """What the engine reported for one sequence."""

    logprobs: list[float]
    versions: VersionRuns
    finish_reason: str


Origins: TypeAlias = dict[bytes, list[Origin]]
"""By token ids: sequences with the same ids were sampled apart, and each has its own origin, in that order."""

_origins: ContextVar[Origins | None] = ContextVar("atropos_origins", default=None)


@contextmanager
def remember_origins() -> Iterator[Origins]:
    """Within this block (child tasks included) every sequence of a managed session leaves its origin here."""
    origins: Origins = {}
    token = _origins.set(origins)
    try:
        yield origins
    finally:
        _origins.reset(token)


def remember(tokens: list[int], origin: Origin) -> None:
    """Note where a sequence comes from; nothing happens outside remember_origins."""
    origins = _origins.get()
    if origins is not None:
        origins.setdefault(sequence_key(tokens), []).append(origin)


def sequence_key(tokens: list[int]) -> bytes:
    """The token ids themselves: two sequences are the same only if every id is."""
    return packed(tokens, "i")
