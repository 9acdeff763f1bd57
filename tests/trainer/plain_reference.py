"""Loss and gradient of one step as a textbook has them: one sequence at a time, all logits, no packing, one process.

Nothing of trainer/ is used here, so that a mistake there cannot hide. Options have the names of GRPOConfig.

Shapes: N sequences of a group, S of the batch, t trained tokens of one sequence.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atroposlib.wire.columns import Group

DEFAULTS: dict[str, Any] = {
    "advantage_scale": "none",
    "loss_type": "ppo_clip",
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "dual_clip_c": None,
    "cispo_cap": 5.0,
    "dppo_low": 0.2,
    "dppo_high": 0.2,
    "loss_aggregation": "token_mean",
    "max_completion_length": None,
    "correction": "tis",
    "is_cap": 2.0,
    "mis_low": 0.5,
    "mis_high": 5.0,
    "overlong": "mask",
    "temperature": 1.0,
    "beta": 0.0,
    "kl_estimator": "k2",
    "kl_placement": "loss",
    "entropy_coef": 0.0,
    # Not an option of ours: what TRL does with use_bias_correction_kl.
    "kl_times_ratio": False,
}


def temperature_of(group: Group, i: int, otherwise: float) -> float:
    """What sequence i was sampled at."""
    override = (group.overrides[i] if group.overrides else None) or {}
    value: float = override.get("temperature", (group.generation_params or {}).get("temperature", otherwise))
    return value


def logprobs_of(lm: Any, ids: Sequence[int], *, temperature: float) -> tuple[Tensor, Tensor]:
    """[L - 1] logprobs of all tokens but the first, and [L - 1] entropies there, nats, float64."""
    logits_LV = lm(input_ids=torch.tensor([ids])).logits[0, :-1].double() / temperature
    all_LV = torch.log_softmax(logits_LV, dim=-1)
    entropies_L = -(all_LV.exp() * all_LV).sum(-1)
    return all_LV.gather(-1, torch.tensor(ids)[1:, None])[:, 0], entropies_L


def advantages_of(groups: Sequence[Group], scale: str) -> list[np.ndarray[Any, Any]]:
    """For each group its [N] advantages."""
    centred = [group.scores - group.scores.mean() for group in groups]
    match scale:
        case "none":
            return centred
        case "group_std":
            return [c / (g.scores.std(ddof=1) + 1e-4) for c, g in zip(centred, groups, strict=True)]
        case "batch_std":
            return [c / (np.concatenate(centred).std() + 1e-6) for c in centred]
        case "loo":
            others = [(g.scores.sum() - g.scores) / (len(g.scores) - 1) for g in groups]
            return [g.scores - o for g, o in zip(groups, others, strict=True)]
    raise ValueError(scale)


@dataclass(frozen=True)
class Answer:
    """What one step has, or should have."""

    loss: float
    gradients: dict[str, Tensor]
    passes: tuple[int, ...] = ()
    """Of a trainer: the tokens of each forward pass of this rank."""


def plain_step(lm: Any, groups: Sequence[Group], options: dict[str, Any], *, start: Any = None) -> Answer:
    """Loss and gradient of the batch under options of GRPOConfig.

    Args:
        start: the policy at the start of the step, where that is not `lm` itself.
    """
    o = {**DEFAULTS, **options}
    if o["loss_type"] == "dr_grpo":
        o |= {"loss_type": "ppo_clip", "advantage_scale": "none", "loss_aggregation": "constant"}
    sums: list[list[tuple[Tensor, int]]] = []
    for group, advantages in zip(groups, advantages_of(groups, o["advantage_scale"]), strict=True):
        sums.append([_sequence(lm, start, group, i, float(advantages[i]), o) for i in range(group.n_sequences)])
    loss = _aggregated(sums, o)
    lm.zero_grad()
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in lm.named_parameters()}
    lm.zero_grad()
    return Answer(float(loss.detach()), gradients)


def two_plain_steps(lm: Any, groups: Sequence[Group], options: dict[str, Any]) -> Answer:
    """The mean loss of two steps of gradient descent over the same batch, and the gradient of the second."""
    first = plain_step(lm, groups, options)
    moved = copy.deepcopy(lm)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter -= options["learning_rate"] * first.gradients[name]
    second = plain_step(moved, groups, options, start=lm)
    return Answer((first.loss + second.loss) / 2, second.gradients)


def _aggregated(sums: list[list[tuple[Tensor, int]]], o: dict[str, Any]) -> Tensor:
    """Of each sequence's (sum of its trained tokens' losses, their number); a masked sequence is (0, 0)."""
    flat = [pair for group in sums for pair in group]
    match o["loss_aggregation"]:
        case "token_mean":
            return _total(flat) / sum(count for _, count in flat)
        case "sequence_mean":
            return _total((s / max(n, 1), n) for s, n in flat) / len(flat)
        case "constant":
            return _total(flat) / (len(flat) * int(o["max_completion_length"]))
        case "prompt_mean":
            means = [_total(group) / max(sum(n for _, n in group), 1) for group in sums]
            return torch.stack(means).mean()
    raise ValueError(o["loss_aggregation"])


def _total(pairs: Any) -> Tensor:
    return torch.stack([value for value, _ in pairs]).sum()


def _sequence(lm: Any, start: Any, group: Group, i: int, advantage: float, o: dict[str, Any]) -> tuple[Tensor, int]:
    span = slice(int(group.cu_seqlens[i]), int(group.cu_seqlens[i + 1]))
    override = (group.overrides[i] if group.overrides else None) or {}
    is_cut = bool(group.finish_reasons) and group.finish_reasons[i] == "length"
    if is_cut and o["overlong"] == "mask":
        return torch.zeros((), dtype=torch.float64), 0
    ids = group.tokens[span].tolist()
    logprobs, entropies = logprobs_of(lm, ids, temperature=temperature_of(group, i, o["temperature"]))
    before = logprobs.detach()
    if start is not None:
        before = logprobs_of(start, ids, temperature=temperature_of(group, i, o["temperature"]))[0].detach()
    trained = torch.from_numpy(group.loss_mask[span][1:] != 0)

    def column(values: Any) -> Tensor:
        return torch.from_numpy(values[span][1:]).double()[trained]

    advantages = torch.full_like(logprobs[trained], advantage) if group.advantages is None else column(group.advantages)
    if override.get("set_advantage_to_zero"):
        advantages = torch.zeros_like(advantages)
    losses = _token_losses(
        logprobs[trained],
        before[trained],
        column(group.inference_logprobs),
        None if group.ref_logprobs is None else column(group.ref_logprobs),
        advantages,
        o,
        is_sft=bool(override.get("sft")),
    )
    losses = losses - o["entropy_coef"] * entropies[trained]
    return losses.sum(), int(trained.sum())


def _token_losses(
    lp: Tensor,
    before: Tensor,
    engine: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    o: dict[str, Any],
    *,
    is_sft: bool,
) -> Tensor:
    """[t] loss of each token of one sequence, without entropy."""
    if is_sft:
        return -lp
    kl = torch.zeros_like(lp)
    if o["beta"] and ref is not None:
        kl = _kl(lp if o["kl_placement"] == "loss" else before, ref, o["kl_estimator"])
    if o["kl_placement"] == "reward":
        advantages = advantages - o["beta"] * kl
    start = engine if o["correction"] == "bypass" else before
    if o["kl_times_ratio"]:
        kl = kl * (lp - start).exp()
    losses = _objective(lp, start, advantages, o) * _weights(before - engine, o)
    return losses + o["beta"] * kl if o["kl_placement"] == "loss" else losses


def _kl(lp: Tensor, ref: Tensor, estimator: str) -> Tensor:
    d = lp - ref
    return {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[estimator]


def _weights(log_ratio: Tensor, o: dict[str, Any]) -> Tensor:
    """[t] or scalar off-policy weight."""
    low, high, cap = o["mis_low"], o["mis_high"], o["is_cap"]
    match o["correction"]:
        case "tis":
            return log_ratio.exp().clamp(max=cap)
        case "seq_tis":
            return log_ratio.sum().exp().clamp(max=cap)
        case "mis":
            ratio = log_ratio.exp()
            return torch.where((ratio < low) | (ratio > high), 0.0, ratio)
        case "seq_mis":
            ratio = log_ratio.mean().exp()
            return ratio if low <= float(ratio) <= high else torch.zeros_like(ratio)
    return torch.ones_like(log_ratio)


def _objective(lp: Tensor, start: Tensor, a: Tensor, o: dict[str, Any]) -> Tensor:
    """[t] loss of each token, before the off-policy weight."""
    ratio = (lp - start).exp()
    match o["loss_type"]:
        case "reinforce":
            return -(lp - lp.detach()).exp() * a
        case "cispo":
            return -ratio.detach().clamp(max=o["cispo_cap"]) * a * lp
        case "dppo":
            moved = lp.detach().exp() - start.exp()
            is_out = ((a > 0) & (moved > o["dppo_high"])) | ((a <= 0) & (moved < -o["dppo_low"]))
            return torch.where(is_out, 0.0, -ratio * a)
        case "gspo":
            # The sequence's ratio in value; each token's own gradient (GSPO-token, which equals GSPO for one advantage).
            mean = (lp - start).detach().mean().exp()
            ratio = mean * (lp - lp.detach()).exp()
    objective = torch.minimum(ratio * a, ratio.clamp(1 - o["epsilon_low"], 1 + o["epsilon_high"]) * a)
    if o["dual_clip_c"] is not None:
        objective = torch.where(a < 0, torch.maximum(objective, o["dual_clip_c"] * a), objective)
    return -objective


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, of all gradients together."""
    assert found.keys() == expected.keys()
    missed = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    return math.sqrt(missed / sum(float(each.double().square().sum()) for each in expected.values()))
