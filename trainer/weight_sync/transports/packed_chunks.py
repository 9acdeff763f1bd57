"""Cut weights into the chunks that vLLM's own engines unpack, and fill those chunks. Runs on any device.

Their tensors lie end to end without padding, unlike those of `buckets`.
Source: vLLM 0.32, vllm/distributed/weight_transfer/packed_tensor.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from trainer.weight_sync.errors import WeightSyncError
from trainer.weight_sync.transports.base import NamedWeights
from trainer.weight_sync.transports.buckets import TensorSpec


@dataclass(frozen=True)
class Chunk:
    """Tensors that travel together, end to end in one flat buffer of bytes."""

    specs: tuple[TensorSpec, ...]

    @property
    def sizes_bytes(self) -> list[int]:
        """Of each tensor, in order."""
        return [spec.size_bytes for spec in self.specs]

    @property
    def size_bytes(self) -> int:
        """Length of the buffer."""
        return sum(self.sizes_bytes)

    @property
    def columns(self) -> dict[str, list[object]]:
        """Names, dtypes and shapes as an update_info carries them."""
        return columns(self.specs)


def columns(specs: Iterable[TensorSpec]) -> dict[str, list[object]]:
    """Describe tensors in the words of vLLM's update_info."""
    described = list(specs)
    return {
        "names": [spec.name for spec in described],
        "dtype_names": [spec.dtype_name for spec in described],
        "shapes": [list(spec.shape) for spec in described],
    }


def specs_of(weights: NamedWeights, *, dtype: torch.dtype) -> list[TensorSpec]:
    """Describe the weights as they are sent: floating-point ones as `dtype`, others as they are."""
    return [
        TensorSpec(
            name,
            str(dtype if tensor.is_floating_point() else tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
        )
        for name, tensor in weights
    ]


def chunks_within(specs: Iterable[TensorSpec], *, capacity_bytes: int) -> list[Chunk]:
    """Cut into chunks of at most `capacity_bytes`, in order; a larger tensor travels alone.

    Raises:
        WeightSyncError: a tensor would begin where its dtype cannot.
    """
    chunks: list[Chunk] = []
    together: list[TensorSpec] = []
    filled_bytes = 0
    for spec in specs:
        if together and filled_bytes + spec.size_bytes > capacity_bytes:
            chunks.append(_checked(together))
            together, filled_bytes = [], 0
        together.append(spec)
        filled_bytes += spec.size_bytes
    return [*chunks, _checked(together)] if together else chunks


def chunks_past(specs: Iterable[TensorSpec], *, capacity_bytes: int) -> list[Chunk]:
    """Cut where vLLM's NCCL receiver cuts by itself: behind the tensor with which a chunk exceeds `capacity_bytes`.

    Raises:
        WeightSyncError: a tensor would begin where its dtype cannot.
    """
    chunks: list[Chunk] = []
    together: list[TensorSpec] = []
    filled_bytes = 0
    for spec in specs:
        together.append(spec)
        filled_bytes += spec.size_bytes
        if filled_bytes > capacity_bytes:
            chunks.append(_checked(together))
            together, filled_bytes = [], 0
    return [*chunks, _checked(together)] if together else chunks


def fill(chunk: Chunk, pairs: Iterator[tuple[str, torch.Tensor]], buffer: torch.Tensor) -> None:
    """Copy the next tensors of `pairs` into the chunk's buffer (uint8, any device), converting on the way.

    Raises:
        WeightSyncError: they are not those that the chunk was planned for. The engine would load others under
            their names.
    """
    end_bytes = 0
    for spec in chunk.specs:
        name, tensor = next(pairs, ("nothing", torch.empty(0)))
        if (name, tuple(tensor.shape)) != (spec.name, spec.shape):
            raise WeightSyncError(
                f"the weights changed while they were sent: {spec.name!r} {list(spec.shape)} was announced, "
                f"{name!r} {list(tensor.shape)} came; give the same weights at every pass"
            )
        start_bytes, end_bytes = end_bytes, end_bytes + spec.size_bytes
        place = buffer[start_bytes:end_bytes].view(getattr(torch, spec.dtype_name))
        place.view(spec.shape).copy_(tensor.detach())


def _checked(specs: list[TensorSpec]) -> Chunk:
    offset_bytes = 0
    for spec in specs:
        if offset_bytes % getattr(torch, spec.dtype_name).itemsize:
            raise WeightSyncError(
                f"{spec.name!r} ({spec.dtype_name}) would begin at byte {offset_bytes} of its chunk, where vLLM cannot "
                "read it; weight_sync.transport=gloo aligns tensors of different dtypes"
            )
        offset_bytes += spec.size_bytes
    return Chunk(tuple(specs))
