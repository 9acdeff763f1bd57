"""Sequences of an optimizer step from the three numbers that other trainers ask for. No torch.

B = b A P: B sequences a step over all ranks, b a pass of one rank, A passes of a rank, P ranks. Our passes are packed by
tokens (max_tokens_per_micro_batch), so b and A name B and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from atroposlib.errors import ConfigError


@dataclass(frozen=True)
class BatchSizes:
    """Three numbers that agree."""

    batch_size: int
    """B: sequences of one optimizer step, over all ranks."""
    per_device: int
    """b: sequences of one pass of one rank, nominally."""
    accumulation: int
    """A: passes of one rank, nominally."""


def resolve_batch(
    *,
    batch_size: int | None,
    per_device: int | None,
    accumulation: int | None,
    ranks: int,
    group_size: int | None = None,
    default: int = 64,
) -> BatchSizes:
    """Derive what is not given.

    Two of the three give the third; all three are checked; only b means A = 1; only A means b = 1; only B means b = 1 and as
    many passes as that takes, the last one not full.

    Args:
        batch_size: B, or None.
        per_device: b, or None.
        accumulation: A, or None.
        ranks: P.
        group_size: B must be a multiple of it: a group is never split.
        default: B where nothing is given.
    Raises:
        ConfigError: a number below 1, or no whole number fits; names the nearest values that do.
    """
    given = {"batch_size": batch_size, "per_device_train_batch_size": per_device}
    for name, value in (given | {"gradient_accumulation_steps": accumulation}).items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, is {value}")
    if per_device is None and accumulation is None:
        sizes = _from_batch(batch_size or default, ranks)
    elif batch_size is None:
        b, a = per_device or 1, accumulation or 1
        sizes = BatchSizes(b * a * ranks, b, a)
    else:
        sizes = _checked(batch_size, per_device, accumulation, ranks, group_size)
    check_groups(sizes.batch_size, group_size)
    return sizes


def check_groups(batch_size: int, group_size: int | None) -> None:
    """Refuse a batch that would split a group.

    Raises:
        ConfigError: names the nearest batch sizes that do not.
    """
    if group_size is not None and batch_size % group_size:
        raise ConfigError(
            f"batch_size={batch_size} is no multiple of group_size={group_size}, and a group is never split; "
            f"nearest valid batch_size: {_nearest(batch_size, group_size)}"
        )


def _from_batch(batch_size: int, ranks: int) -> BatchSizes:
    return BatchSizes(batch_size, 1, math.ceil(batch_size / ranks))


def _checked(
    batch_size: int, per_device: int | None, accumulation: int | None, ranks: int, group_size: int | None
) -> BatchSizes:
    """B with b, A or both."""
    name = "per_device_train_batch_size" if per_device is not None else "gradient_accumulation_steps"
    divisor = (per_device if per_device is not None else accumulation or 1) * ranks
    quotient, rest = divmod(batch_size, divisor)
    if rest:
        step = math.lcm(divisor, group_size or 1)
        fitting = [str(n) for n in range(1, batch_size // ranks + 1) if batch_size % (n * ranks) == 0]
        raise ConfigError(
            f"batch_size={batch_size} is no multiple of {name}={divisor // ranks} x {ranks} ranks; nearest valid "
            f"batch_size: {_nearest(batch_size, step)}; valid {name} for {batch_size}: {', '.join(fitting) or 'none'}"
        )
    if per_device is None:
        return BatchSizes(batch_size, quotient, accumulation or 1)
    if accumulation not in (None, quotient):
        raise ConfigError(
            f"batch_size={batch_size}, per_device_train_batch_size={per_device} and gradient_accumulation_steps="
            f"{accumulation} contradict each other on {ranks} ranks: gradient_accumulation_steps={quotient} or "
            f"batch_size={per_device * (accumulation or 1) * ranks} would fit; or give only batch_size"
        )
    return BatchSizes(batch_size, per_device, quotient)


def _nearest(batch_size: int, step: int) -> str:
    below = batch_size // step * step
    return f"{below} or {below + step}" if below else str(below + step)
