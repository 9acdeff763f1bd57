"""Plan which tensors travel together and where each lies in its bucket. Pure; both sides use it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

# A view of another dtype must start at a multiple of its item size; this also suits vector loads.
ALIGNMENT_BYTES = 64

PIECE_ITEMS = 32768
"""Elements that are converted at once. So few that torch does it in this thread: its others take many times longer to wake
than the work does when a server is on the same cores. And the processor's cache still holds them for what comes next."""

_ITEM_BYTES = {
    "float64": 8, "int64": 8,
    "float32": 4, "int32": 4,
    "bfloat16": 2, "float16": 2, "int16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as the receiver must rebuild it: HF checkpoint name, torch dtype name, shape."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the contiguous tensor.

        Raises:
            ValueError: the dtype is none that can be transferred.
        """
        if self.dtype_name not in _ITEM_BYTES:
            raise ValueError(
                f"tensor {self.name!r} is {self.dtype_name!r}, not one of {', '.join(sorted(_ITEM_BYTES))}"
            )
        return prod(self.shape) * _ITEM_BYTES[self.dtype_name]


@dataclass(frozen=True)
class Slot:
    """A tensor's place in its bucket."""

    spec: TensorSpec
    offset_bytes: int

    @property
    def end_bytes(self) -> int:
        """First byte behind the tensor."""
        return self.offset_bytes + self.spec.size_bytes


@dataclass(frozen=True)
class Bucket:
    """Tensors laid end to end in one flat buffer of bytes."""

    slots: tuple[Slot, ...]

    @property
    def size_bytes(self) -> int:
        """Length of the buffer."""
        return max((slot.end_bytes for slot in self.slots), default=0)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What lies in it, in order."""
        return tuple(slot.spec for slot in self.slots)


def lay_out(specs: Sequence[TensorSpec]) -> Bucket:
    """Put the tensors into one bucket, in the order given."""
    slots: list[Slot] = []
    end_bytes = 0
    for spec in specs:
        slots.append(Slot(spec, _aligned(end_bytes)))
        end_bytes = slots[-1].end_bytes
    return Bucket(tuple(slots))


def plan_buckets(specs: Iterable[TensorSpec], *, capacity_bytes: int) -> Iterator[Bucket]:
    """Cut a stream of tensors into buckets of at most `capacity_bytes`, in order; a larger one travels alone.

    Lazy: it has read one tensor beyond the bucket that it yields, never more.
    """
    together: list[TensorSpec] = []
    end_bytes = 0
    for spec in specs:
        if together and _aligned(end_bytes) + spec.size_bytes > capacity_bytes:
            yield lay_out(together)
            together, end_bytes = [], 0
        together.append(spec)
        end_bytes = _aligned(end_bytes) + spec.size_bytes
    if together:
        yield lay_out(together)


def _aligned(offset_bytes: int) -> int:
    return -(-offset_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
