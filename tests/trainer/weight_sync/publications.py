"""What tests of publications share, whichever engine they publish to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

WEIGHTS = {f"layer.{i}.weight": torch.full((16, 8), float(i)) for i in range(6)}
BUCKET_MIB = 600 / 2**20  # two tensors of 16 x 8 bfloat16


class FakeServer(Protocol):
    """What FakeVllm and FakeSglang have in common."""

    PAUSE: str
    JOIN: str
    UPDATE: str
    """The routes that pause it, bring it into the trainer's group, and bring it a bucket."""
    url: str
    version: str
    is_paused: bool
    is_updating: bool
    weights: dict[str, torch.Tensor]
    calls: list[str]
    """Path of each."""
    faults: dict[str, Callable[[], object]]
    """By path: what happens there first."""

    def restart(self) -> None: ...

    def die(self) -> None: ...


FakeT = TypeVar("FakeT", bound=FakeServer)


@contextmanager
def serving(*fakes: FakeT) -> Iterator[list[FakeT]]:
    try:
        yield list(fakes)
    finally:
        for fake in fakes:
            fake.die()


def urls_of(fakes: Sequence[FakeServer]) -> list[str]:
    return [fake.url for fake in fakes]


def runs(fake: FakeServer, version: str, weights: Mapping[str, torch.Tensor] = WEIGHTS) -> bool:
    """Whether its update has ended and it generates with these weights under this version."""
    return generates(fake, version, weights) and not fake.is_updating


def generates(fake: FakeServer, version: str, weights: Mapping[str, torch.Tensor] = WEIGHTS) -> bool:
    """Whether it generates, with these weights, and calls them by this version."""
    same = all(torch.equal(fake.weights[name], tensor.bfloat16()) for name, tensor in weights.items())
    return same and fake.version == version and not fake.is_paused


def broken() -> None:
    """A fault: the call fails."""
    raise RuntimeError("broken")


def at_call(number: int, action: Callable[[], object]) -> Callable[[], None]:
    """A fault that acts at its `number`th call only."""
    calls = iter(range(1, 1_000_000))

    def act() -> None:
        if next(calls) == number:
            action()

    return act
