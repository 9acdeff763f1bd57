"""Which batch sizes can be filled with whole groups of given sizes: exact arithmetic on bit sets."""

from __future__ import annotations

from collections.abc import Iterable


def reachable_sums(sizes: Iterable[int], limit: int) -> int:
    """Bit n of the result is set where n <= limit is a sum of the sizes, each used any number of times."""
    mask = (1 << (limit + 1)) - 1
    sums = 1
    for size in {size for size in sizes if 0 < size <= limit}:
        # Doubling the shift adds 1, 2, 4, ... more groups of this size at a time.
        step = size
        while step <= limit:
            sums |= (sums << step) & mask
            step *= 2
    return sums


def can_fill(sizes: Iterable[int], batch_size: int) -> bool:
    """Whether whole groups of these sizes can sum to batch_size exactly."""
    return bool(reachable_sums(sizes, batch_size) >> batch_size & 1)


def batch_sizes_near(sizes: Iterable[int], batch_size: int) -> list[int]:
    """The nearest batch sizes that can be filled: one below where there is one, and one above."""
    smallest = min(sizes)
    sums = reachable_sums(sizes, batch_size + smallest)
    below = [n for n in range(batch_size, 0, -1) if sums >> n & 1][:1]
    above = next(n for n in range(batch_size, batch_size + smallest + 1) if sums >> n & 1)
    return sorted({*below, above})


def divisors_near(batch_size: int, group_size: int, count: int = 3) -> list[int]:
    """The group sizes nearest to this one that divide batch_size."""
    divisors = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
    return sorted(sorted(divisors, key=lambda size: abs(size - group_size))[:count])
