"""Lay weights end to end in one flat tensor of bytes, as SGLang takes them apart again: no gaps, one dtype a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trainer.weight_sync.transports.base import NamedWeights
from trainer.weight_sync.transports.buckets import TensorSpec


@dataclass(frozen=True)
class FlatBucket:
    """Tensors of one dtype, so that none of them begins between two items."""

    specs: tuple[TensorSpec, ...]
    flat: torch.Tensor
    """[bytes] uint8."""

    def parts(self) -> Iterator[torch.Tensor]:
        """Yield each tensor by itself, a view, in order."""
        start = 0
        for spec in self.specs:
            end = start + spec.size_bytes
            yield self.flat[start:end].view(getattr(torch, spec.dtype_name)).view(spec.shape)
            start = end


def flat_buckets(
    weights: NamedWeights, *, capacity_bytes: int, dtype: torch.dtype, device: torch.device
) -> Iterator[FlatBucket]:
    """Cut a stream of weights into buckets of at most `capacity_bytes`, in order; a larger tensor travels alone.

    Args:
        dtype: that floating-point weights are converted to.
        device: where the buckets are built.
    """
    together: list[tuple[str, torch.Tensor]] = []
    size_bytes = 0
    for name, tensor in weights:
        sent_as = dtype if tensor.is_floating_point() else tensor.dtype
        tensor = tensor.detach().to(device=device, dtype=sent_as)
        is_full = size_bytes + tensor.nbytes > capacity_bytes
        if together and (is_full or together[0][1].dtype != sent_as):
            yield _flat(together)
            together, size_bytes = [], 0
        together.append((name, tensor))
        size_bytes += tensor.nbytes
    if together:
        yield _flat(together)


def _flat(named: list[tuple[str, torch.Tensor]]) -> FlatBucket:
    specs = tuple(
        TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in named
    )
    return FlatBucket(specs, torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in named]))
