"""The garbage collector, told what a long-lived process knows: what is there once the work flows will stay."""

from __future__ import annotations

import gc

THRESHOLDS = (20_000, 20, 100)
"""A group is thousands of objects and no cycles: the default of 700 would look for cycles all the time."""


def settle_memory() -> None:
    """Take everything that exists out of the collector's sight; call once, when modules and data are loaded.

    A full collection walks over every object of every package, tenths of a second in which no rollout moves.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
