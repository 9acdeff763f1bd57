"""A model and a batch with which mistakes show: ragged, cut, mixed, and with logprobs that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from atroposlib.wire.columns import Group, build_group
from tests.trainer.fakes import VOCABULARY, tiny_llama
from tests.trainer.plain_reference import DEFAULTS, logprobs_of, temperature_of


def sharp_llama(seed: int = 0) -> Any:
    """The tiny Llama with weights that make its logprobs differ. The same with every version of torch and transformers."""
    lm = tiny_llama()
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(lm.named_parameters()):
            noise = torch.from_numpy(generator.normal(size=tuple(parameter.shape))).float()
            parameter.copy_(1.0 + 0.1 * noise if "norm" in name else 0.3 * noise)
    return lm


@dataclass(frozen=True)
class Spoken:
    """One sequence of a batch under construction: its prompt, and its completion as runs (sampled by the policy?, length)."""

    prompt: int
    runs: tuple[tuple[bool, int], ...]


GROUPS: tuple[tuple[Spoken, ...], ...] = (
    tuple(Spoken(6, ((True, length),)) for length in (1, 12, 5, 3)),
    (Spoken(2, ((True, 4), (False, 3), (True, 5))), Spoken(2, ((True, 2),)), Spoken(2, ((True, 9),))),
    tuple(Spoken(9, ((True, length),)) for length in (7, 2, 2, 10, 4)),
)
"""Ragged. In the second group the environment speaks in between."""


def mixed_groups(lm: Any) -> list[Group]:
    """The batch: ragged and shared prompts, cut and unsignalled and supervised sequences, own advantages, temperatures.

    Engine and reference logprobs lie around the model's own, so that caps and clips act on some tokens.
    """
    generator = np.random.default_rng(1)
    columns = [_columns(lm, generator, spoken) for spoken in GROUPS]
    facts: list[dict[str, Any]] = [
        {"generation_params": {"temperature": 0.7}, "finish_reasons": ("stop", "length", "stop", "stop")},
        {"advantages": generator.normal(size=_tokens(GROUPS[1])).astype(np.float32),
         "overrides": [None, {"temperature": 1.3}, {"sft": True}]},
        {"overrides": [None, None, {"set_advantage_to_zero": True}, None, None]},
    ]  # fmt: skip
    rewards = [(1.0, 0.0, 0.25, 0.5), (1.0, 0.0, 0.0), (0.0, 2.0, 0.0, 1.0, 0.3)]
    return [
        build_group(group_id=f"group{i}", env_id=0, scores=list(rewards[i]), **columns[i], **facts[i])
        for i in range(len(GROUPS))
    ]


def scored_by(reference: Any, groups: Sequence[Group]) -> list[Group]:
    """The groups with the reference's logprobs, each at the temperature of its sequence."""
    found = []
    for group in groups:
        rows = []
        for i in range(group.n_sequences):
            ids = group.tokens[group.cu_seqlens[i] : group.cu_seqlens[i + 1]].tolist()
            logprobs = logprobs_of(reference, ids, temperature=temperature_of(group, i, DEFAULTS["temperature"]))[0]
            rows.append(np.concatenate([[0.0], logprobs.detach().numpy()]))
        found.append(replace(group, ref_logprobs=np.concatenate(rows).astype(np.float32)))
    return found


def _tokens(group: Sequence[Spoken]) -> int:
    return sum(each.prompt + sum(length for _, length in each.runs) for each in group)


def _columns(lm: Any, generator: np.random.Generator, group: Sequence[Spoken]) -> dict[str, Any]:
    prompt = generator.integers(1, VOCABULARY, size=group[0].prompt).tolist()
    tokens, masks, engine, reference = [], [], [], []
    for each in group:
        mask = [0] * each.prompt + [int(is_sampled) for is_sampled, length in each.runs for _ in range(length)]
        ids = prompt + generator.integers(1, VOCABULARY, size=len(mask) - each.prompt).tolist()
        known = logprobs_of(lm, ids, temperature=1.0)[0].detach().numpy()
        own = np.concatenate([[0.0], known])
        tokens.append(ids)
        masks.append(mask)
        engine.append(np.where(mask, own + generator.normal(scale=0.5, size=len(ids)), 0.0).tolist())
        reference.extend((own + generator.normal(scale=0.3, size=len(ids))).tolist())
    return {
        "tokens": tokens,
        "loss_masks": masks,
        "inference_logprobs": engine,
        "versions": [[(0 if bit else -1, 1) for bit in mask] for mask in masks],
        "ref_logprobs": np.array(reference, dtype=np.float32),
    }
