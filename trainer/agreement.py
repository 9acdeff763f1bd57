"""All ranks go on together, or none does: what one rank could not do is known to all before a collective needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from trainer.errors import RankError

T = TypeVar("T")

_STOP = ""
"""A rank that has nothing, and no complaint either."""


def agreed(make: Callable[[], T | None], *, ranks: int) -> T | None:
    """What `make` gives, if it gives something on every rank. Every rank calls this at the same point.

    `make` may wait for the network, and must have a deadline: the others wait here for it.

    Returns:
        None on every rank where some rank has None: it was told to stop.
    Raises:
        Exception: what `make` raised on this rank.
        RankError: it failed on another rank, which is named with its reason.
    """
    if ranks == 1:
        return make()
    result, error = None, None
    try:
        result = make()
    except Exception as caught:
        # Anything: the others must hear of it before this rank ends.
        error = caught
    heard = exchanged(_verdict(result, error), ranks=ranks)
    if error is not None:
        raise error
    failed = next(((rank, text) for rank, text in enumerate(heard) if text), None)
    if failed is not None:
        raise RankError(*failed)
    return None if _STOP in heard else result


def together(do: Callable[[], T], *, ranks: int) -> T:
    """Do something on every rank. Where it fails on one, it fails on all; see agreed."""
    done: list[T] = []

    def make() -> list[T]:
        done.append(do())
        return done

    agreed(make, ranks=ranks)
    return done[0]


def exchanged(mine: str | None, *, ranks: int) -> list[str | None]:
    """What each rank says, in their order. Every rank calls this at the same point."""
    if ranks == 1:
        return [mine]
    heard: list[str | None] = [None] * ranks
    torch.distributed.all_gather_object(heard, mine)
    return heard


def _verdict(result: object, error: Exception | None) -> str | None:
    if error is not None:
        return str(error) or type(error).__name__
    return _STOP if result is None else None
