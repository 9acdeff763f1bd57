"""The reference policy, which the policy is kept close to: none, the model without its adapter, or a model of its own.

Its logprobs are taken on the policy's own micro batches, before the step's first optimizer step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.config.grpo import GRPOConfig
from trainer.policy.loading import build_policy, prepare_partitioned
from trainer.policy.logprobs import PackedPolicy
from trainer.run.setup import load_named
from trainer.weight_sync.sources import has_adapter, is_partitioned, whole

log = logging.getLogger(__name__)

WEIGHTS_FILE = "reference.safetensors"


class Reference(Protocol):
    """Where the reference's logprobs come from."""

    def in_use(self, policy: Any) -> AbstractContextManager[Any]:
        """Gives the model to score with meanwhile. Every rank enters it at the same point.

        Args:
            policy: the model in training, in its wrappers.
        """


class AdapterOff:
    """The policy without its LoRA adapter."""

    def __init__(self, policy: PackedPolicy) -> None:
        self._lm = policy.lm

    @contextmanager
    def in_use(self, policy: Any) -> Iterator[Any]:
        """See Reference."""
        self._lm.disable_adapters()
        try:
            yield policy
        finally:
            self._lm.enable_adapters()


class OwnCopy:
    """A model beside the policy.

    Args:
        reference: as the policy is loaded.
        device: where it is used.
        is_offloaded: it lies in host memory between its uses.
        partition: makes an engine of it, where the policy is split over the ranks (ZeRO-3).
    """

    def __init__(
        self,
        reference: PackedPolicy,
        *,
        device: torch.device,
        is_offloaded: bool = False,
        partition: Callable[[PackedPolicy], nn.Module] | None = None,
    ) -> None:
        reference.requires_grad_(requires_grad=False)
        reference.eval()
        self._reference = reference
        self._device = device
        # A split model is as large as its share, and DeepSpeed knows where its pieces are.
        self._is_offloaded = is_offloaded and partition is None
        self._model: nn.Module = reference if partition is None else partition(reference)
        if partition is None and not self._is_offloaded:
            reference.to(device)

    @contextmanager
    def in_use(self, policy: Any) -> Iterator[Any]:
        """See Reference."""
        del policy
        if self._is_offloaded:
            self._reference.to(self._device)
        try:
            yield self._model
        finally:
            if self._is_offloaded:
                self._reference.to("cpu")

    @torch.no_grad()
    def mix_in(self, policy: PackedPolicy, *, alpha: float) -> None:
        """reference = alpha * policy + (1 - alpha) * reference, one parameter after the other. Every rank calls this."""
        mine = dict(self._reference.lm.named_parameters())
        for name, parameter in policy.lm.named_parameters():
            own = mine[name]
            with whole([parameter]), _writable(own):
                own.lerp_(parameter.to(own.device, own.dtype), alpha)

    def save(self, folder: Path, *, is_writer: bool) -> None:
        """Write its weights into a checkpoint: a reference that moves is not where it began. Every rank calls this."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._reference.lm.named_parameters():
            with whole([parameter]):
                if is_writer:
                    tensors[name] = parameter.detach().cpu().clone()
        if is_writer:
            save_file(tensors, folder / WEIGHTS_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take over what `save` wrote; nothing where the checkpoint has none. Every rank calls this."""
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            log.warning("%s has no %s: the reference starts again from its first weights", folder, WEIGHTS_FILE)
            return
        tensors = load_file(path)
        for name, parameter in self._reference.lm.named_parameters():
            with _writable(parameter):
                parameter.copy_(tensors[name])


def own_policy(config: GRPOConfig, policy: PackedPolicy, ref_model: Any) -> PackedPolicy | None:
    """The model of the reference, as it is before any training; None where it needs none of its own.

    Args:
        ref_model: a causal language model or its name, instead of config.ref_model_name_or_path.
    """
    name = ref_model if isinstance(ref_model, str) else config.ref_model_name_or_path
    if config.beta == 0:
        return None
    if ref_model is not None and not isinstance(ref_model, str):
        return build_policy(ref_model, logprob_chunk_size=config.logprob_chunk_size)
    if name is not None or (is_partitioned(policy) and not has_adapter(policy.lm)):
        return load_named(config, name or config.model_name_or_path, is_trained=False)
    return None if has_adapter(policy.lm) else deepcopy(policy)


def reference_of(
    config: GRPOConfig, policy: PackedPolicy, own: PackedPolicy | None, *, deepspeed_config: dict[str, Any] | None
) -> AdapterOff | OwnCopy | None:
    """The reference of a run whose model is on its device. Every rank calls this.

    Args:
        own: what own_policy said.
        deepspeed_config: of the policy's engine, if it has one.
    """
    if config.beta == 0:
        return None
    if own is None:
        return AdapterOff(policy)
    partition = None
    if deepspeed_config is not None and not is_partitioned(policy):
        # DeepSpeed has cast the policy, and does not autocast.
        own.to(next(policy.parameters()).dtype)
    if deepspeed_config is not None and is_partitioned(policy):
        partition = partial(_in_engine, config=deepspeed_config, device=config.device)
    return OwnCopy(own, device=config.device, is_offloaded=config.offload_untrained_models, partition=partition)


def _in_engine(reference: PackedPolicy, *, config: dict[str, Any], device: torch.device) -> nn.Module:
    """An engine that shares the policy's partitioning and trains nothing."""
    import deepspeed

    options = {key: value for key, value in config.items() if key not in ("optimizer", "scheduler")}
    engine: nn.Module = deepspeed.initialize(model=reference, config=deepcopy(options))[0]
    prepare_partitioned(reference, device)
    engine.eval()
    return engine


def _writable(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """Make a split parameter whole, and split again what rank 0 has made of it."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return cast("AbstractContextManager[Any]", deepspeed.zero.GatheredParameters([parameter], modifier_rank=0))
