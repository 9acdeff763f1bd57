"""Where new weights come from: the trainer's model, however it lies on the ranks, under the names that engines know.

Gathering is done before anything is sent: collectives of sharded parameters and those of a transfer group, interleaved,
wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from trainer.policy.logprobs import PackedPolicy
from trainer.weight_sync.transports.base import NamedWeights

ADAPTER = "default"
"""What the trained adapter is called inside the model."""
BUCKET_NUMEL = 2**25
"""Elements that are gathered together; a larger parameter is gathered alone."""


class WeightSource(Protocol):
    """The weights of the policy, for one publication."""

    def gather(self) -> NamedWeights | None:
        """The weights on rank 0, None on the others. Every rank calls this at the same point of its step.

        What rank 0 gets can be gone through any number of times until the next optimizer step begins.
        """


@dataclass(frozen=True)
class Piece:
    """One tensor for an engine."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    """What it is made of; whole while `make` runs."""
    make: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        """Elements of its parameters."""
        return sum(map(full_numel, self.parameters))


def weight_source(
    model: nn.Module, *, is_rank_0: bool, dtype: torch.dtype | None = None, adapter_only: bool = False
) -> WeightSource:
    """The source for a model. Make it when the model is on its ranks: after DeepSpeed has it.

    Args:
        dtype: of floating-point weights where they are copied anyway; None leaves them as they are.
        adapter_only: the LoRA adapter under peft's names. Otherwise the whole model, an adapter merged into it.
    """
    lm = hugging_face_model(model)
    pieces = list(adapter_pieces(lm) if adapter_only else checkpoint_pieces(lm))
    if is_partitioned(lm):
        return PartitionedSource(pieces, is_rank_0=is_rank_0, dtype=dtype)
    return ModuleSource(pieces, is_rank_0=is_rank_0)


class ModuleSource:
    """A model that is whole on every rank: plain, DDP, ZeRO-1 and ZeRO-2. Copies nothing."""

    def __init__(self, pieces: Sequence[Piece], *, is_rank_0: bool) -> None:
        self._weights = LiveWeights(pieces)
        self._is_rank_0 = is_rank_0

    def gather(self) -> NamedWeights | None:
        """See WeightSource."""
        return self._weights if self._is_rank_0 else None


class LiveWeights:
    """The weights as they are when they are gone through."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces

    @torch.no_grad()
    def _tensor(self, piece: Piece) -> Tensor:
        return piece.make()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for piece in self._pieces:
            yield piece.name, self._tensor(piece)


class PartitionedSource:
    """A model split over the ranks by ZeRO-3. Rank 0 keeps a copy in host memory, the devices one bucket at a time.

    Args:
        dtype: of the copy.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        *,
        is_rank_0: bool,
        dtype: torch.dtype | None = None,
        bucket_numel: int = BUCKET_NUMEL,
    ) -> None:
        self._buckets = list(in_buckets(pieces, limit=bucket_numel))
        self._is_rank_0 = is_rank_0
        self._dtype = dtype
        self._staged: dict[str, Tensor] = {}

    @torch.no_grad()
    def gather(self) -> NamedWeights | None:
        """See WeightSource. What an earlier call returned is written over."""
        for bucket in self._buckets:
            with whole(parameter for piece in bucket for parameter in piece.parameters):
                if self._is_rank_0:
                    for piece in bucket:
                        self._stage(piece)
        return list(self._staged.items()) if self._is_rank_0 else None

    def _stage(self, piece: Piece) -> None:
        tensor = piece.make()
        if piece.name not in self._staged:
            dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
            self._staged[piece.name] = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        self._staged[piece.name].copy_(tensor)


def in_buckets(pieces: Iterable[Piece], *, limit: int) -> Iterator[list[Piece]]:
    """Pieces in their order, in lists of at most `limit` elements, or of one piece."""
    bucket: list[Piece] = []
    numel = 0
    for piece in pieces:
        if bucket and numel + piece.numel > limit:
            yield bucket
            bucket, numel = [], 0
        bucket.append(piece)
        numel += piece.numel
    if bucket:
        yield bucket


def checkpoint_pieces(lm: Any) -> Iterator[Piece]:
    """The whole model under its Hugging Face checkpoint names, a LoRA adapter merged in.

    A tied output layer comes once, under the name of the embedding.
    """
    layers = _lora_layers(lm)
    for name, parameter in lm.named_parameters():
        owner, _, rest = name.rpartition(".base_layer.")
        if owner in layers and rest == "weight":
            yield _merged(f"{owner}.weight", parameter, layers[owner])
        elif not _is_adapters(name):
            yield Piece(name.replace(".base_layer.", "."), (parameter,), parameter.detach)


def adapter_pieces(lm: Any) -> Iterator[Piece]:
    """The LoRA adapter under the names of a peft folder."""
    for name, parameter in lm.named_parameters():
        if _is_adapters(name):
            yield Piece(f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}", (parameter,), parameter.detach)


def hugging_face_model(model: nn.Module) -> Any:
    """The model inside its wrappers (DDP, DeepSpeed, torch.compile, PackedPolicy, peft)."""
    while True:
        inner = _inside(model)
        if inner is None:
            return model
        model = inner


def has_adapter(lm: Any) -> bool:
    """Whether the model carries an adapter."""
    return bool(getattr(lm, "peft_config", None))


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has split the parameters over the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Make split parameters whole meanwhile. Every rank enters it at the same point, with the same parameters."""
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        return nullcontext()
    import deepspeed

    return cast("AbstractContextManager[Any]", deepspeed.zero.GatheredParameters(split))


def full_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where this rank holds a part of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, PackedPolicy):
        return cast(nn.Module, model.lm)
    for name in ("module", "_orig_mod"):
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return inner
    # peft's own wrapper; a model that got its adapter without one has no such method.
    unwrap = getattr(model, "get_base_model", None)
    return cast(nn.Module, unwrap()) if callable(unwrap) else None


def _lora_layers(lm: Any) -> dict[str, Any]:
    if not has_adapter(lm):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer)}


def _is_adapters(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _merged(name: str, base: nn.Parameter, layer: Any) -> Piece:
    def make() -> Tensor:
        change: Tensor = layer.get_delta_weight(ADAPTER)
        return (base.float() + change.float()).to(base.dtype)

    factors = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
    return Piece(name, (base, *factors), make)
