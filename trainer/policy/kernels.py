"""Fused kernels of liger_kernel for norms, rotary embeddings and MLPs. Imports it only to apply it."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from atroposlib.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config.grpo import GRPOConfig

_OUTPUT_LAYER = ("cross_entropy", "fused_linear_cross_entropy")
"""Kernels that replace a model's own loss."""


def check(config: GRPOConfig, *, has_cuda: bool) -> None:
    """The kernels can run, and have something to replace.

    Raises:
        ConfigError: names what use_liger_kernel needs.
    """
    chosen = config.liger_kernel_config or {}
    if chosen and not config.use_liger_kernel:
        raise ConfigError("liger_kernel_config chooses among kernels: give use_liger_kernel=true as well")
    for name in _OUTPUT_LAYER:
        if chosen.get(name):
            raise ConfigError(
                f"liger_kernel_config.{name} would replace the loss that the model computes itself, which is never called: "
                "logprobs come from the hidden states, logprob_chunk_size tokens at a time, and the logits of all tokens "
                "never exist; leave it"
            )
    if not config.use_liger_kernel:
        return
    if not has_cuda:
        raise ConfigError(
            "use_liger_kernel: its kernels are written in Triton and run on CUDA, which is not there; leave it"
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("use_liger_kernel needs a package that is not installed: pip install liger-kernel")


def use_kernels(lm: Any, config: GRPOConfig) -> None:
    """Put the kernels that a configuration asks for into a Hugging Face model, in place.

    Raises:
        ConfigError: there are none for a model of this type.
    """
    if config.use_liger_kernel:
        apply_liger(lm, config.liger_kernel_config or {})


@contextmanager
def hidden_from_transformers(config: GRPOConfig) -> Iterator[None]:
    """Between two points of its training: the kernels are in place, and it would put them into our wrapper, in vain."""
    is_wanted, config.use_liger_kernel = config.use_liger_kernel, False
    try:
        yield
    finally:
        config.use_liger_kernel = is_wanted


def apply_liger(lm: Any, chosen: Mapping[str, bool]) -> None:
    """Put liger's kernels into a Hugging Face model, in place, except those of the output layer.

    Args:
        chosen: switches by kernel; those left out are on.
    Raises:
        ConfigError: there are none for a model of this type.
    """
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    kind = lm.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(f"use_liger_kernel: liger_kernel has no kernels for a model of type {kind!r}; leave it")
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[kind]
    taken = set(inspect.signature(apply).parameters) - {"model"}
    if unknown := sorted(set(chosen) - taken):
        raise ConfigError(
            f"liger_kernel_config.{unknown[0]} is no kernel for a model of type {kind!r}; there are "
            f"{', '.join(sorted(taken - set(_OUTPUT_LAYER)))}"
        )
    apply(model=lm, **{**chosen, **{name: False for name in _OUTPUT_LAYER if name in taken}})
