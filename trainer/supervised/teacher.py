"""The teacher of GKD: a model beside the student, whole on every rank, never trained.

Shapes: M learnt tokens of a pass, H the teacher's hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from atroposlib.errors import ConfigError
from trainer.batches.packing import pack
from trainer.methods import check_required
from trainer.policy.loading import build_policy
from trainer.policy.logprobs import PackedPolicy, hidden_at
from trainer.supervised.config import GKDConfig
from trainer.supervised.examples import Example
from trainer.supervised.passes import Pass, build_pass
from trainer.supervised.tokenizers import load_tokenizer


class Teacher:
    """What the trainer asks of the teacher.

    Args:
        policy: the model.
        tokenizer: its own.
    """

    def __init__(self, policy: PackedPolicy, tokenizer: Any) -> None:
        policy.requires_grad_(requires_grad=False)
        policy.eval()
        self.policy = policy
        self.tokenizer = tokenizer
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Precision of its passes."""

    @property
    def lm(self) -> Any:
        """The causal language model."""
        return self.policy.lm

    @torch.no_grad()
    def hidden(self, each: Pass) -> Tensor:
        """[M, H] hidden states in the places that predict the learnt tokens of a pass, on the teacher's device."""
        each = each.to(self.lm.device)
        with self.autocast():
            return hidden_at(
                self.lm,
                each.input_ids_1T,
                each.position_ids_1T,
                each.segments_1T,
                each.segments_1T,
                each.target_positions_M,
            )

    @torch.no_grad()
    def logprobs(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]], *, max_tokens: int) -> list[list[float]]:
        """For each prompt and completion, the logprobs of the completion's tokens, nats.

        Args:
            texts: ids of the teacher's own tokenizer; of a prompt at least one.
            max_tokens: of a pass; a longer text gets one of its own.
        """
        examples = [_scored(prompt, completion) for prompt, completion in texts]
        found: list[list[float]] = [[] for _ in texts]
        device = self.lm.device
        for plan in pack([len(example.tokens_L) for example in examples], capacity=max_tokens):
            with self.autocast():
                logprobs_M = score(
                    self.policy, build_pass([examples[i] for i in plan], weight=1.0).to(device)
                ).logprobs_M
            sizes = [examples[i].trained_tokens for i in plan]
            for i, part in zip(plan, torch.split(logprobs_M, sizes), strict=True):
                assert len(part) == len(texts[i][1]), "a completion comes after a prompt of at least one token"
                found[i] = part.tolist()
        return found


def score(model: Any, each: Pass) -> Any:
    """A pass of a PackedPolicy, in its wrappers or not, at temperature 1."""
    return model(
        each.input_ids_1T,
        each.position_ids_1T,
        each.segments_1T,
        each.segments_1T,
        each.target_positions_M,
        each.target_ids_M,
        torch.ones_like(each.weights_M),
    )


def teacher_tokenizer(config: GKDConfig) -> Any:
    """The teacher's tokenizer.

    Raises:
        ConfigError: there is none.
    """
    check_required(config, "teacher_model_name_or_path")
    return load_tokenizer(
        config.teacher_tokenizer_name_or_path or config.teacher_model_name_or_path,
        key="teacher_tokenizer_name_or_path",
        trust_remote_code=bool(
            (config.teacher_model_init_kwargs or {}).get("trust_remote_code", config.trust_remote_code)
        ),
    )


def load_teacher(config: GKDConfig, tokenizer: Any, *, lm: Any = None) -> Teacher:
    """The teacher that a configuration names, on its device.

    Args:
        tokenizer: its own.
        lm: a causal language model in memory, instead of the one that is named.
    Raises:
        ConfigError: there is no such model, or its logprobs cannot be computed here.
    """
    options = dict(config.teacher_model_init_kwargs or {})
    with _not_partitioned():
        if lm is None:
            check_required(config, "teacher_model_name_or_path")
            lm = _load(config, options)
        policy = build_policy(lm, logprob_chunk_size=config.logprob_chunk_size)
    if "device_map" not in options:
        policy.to(config.device)
    return Teacher(policy, tokenizer)


def _load(config: GKDConfig, options: dict[str, Any]) -> Any:
    name = config.teacher_model_name_or_path
    dtype = options.pop("torch_dtype", options.pop("dtype", config.torch_dtype))
    defaults = {"attn_implementation": config.attn_implementation, "trust_remote_code": config.trust_remote_code}
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch.")),
            **{**defaults, **options},
        )
    except (OSError, ValueError, ImportError, AttributeError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"cannot load teacher_model_name_or_path={name!r}: {first}\n"
            "hint: give a folder with config.json and model.safetensors, or the id of a model on the Hub"
        ) from error


@contextmanager
def _not_partitioned() -> Iterator[None]:
    """While a configuration of ZeRO-3 is alive, transformers splits what it loads; the teacher stays whole."""
    from transformers.integrations import deepspeed as integration

    alive = integration._hf_deepspeed_config_weak_ref
    config = alive() if alive is not None else None
    if config is None:
        yield
        return
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(config)


def _scored(prompt: Sequence[int], completion: Sequence[int]) -> Example:
    tokens_L = np.array([*prompt, *completion], dtype=np.int32)
    is_trained_L = np.arange(len(tokens_L)) >= max(1, len(prompt))
    return Example(tokens_L, is_trained_L)
