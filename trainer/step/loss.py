"""The loss of one micro batch: from logprobs to a number with a gradient, and what it is made of. Pure.

Every part is a plain sum over tokens of what the token counts times its loss, so that how the batch is cut into micro
batches and ranks changes nothing.

Shapes: M trained tokens of the micro batch, K candidates of a teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from atroposlib.wire.layout import PADDING_LOGPROB
from trainer.batches.micro_batch import MicroBatch
from trainer.batches.step_batch import StepBatch
from trainer.losses.corrections import CorrectionRule, correction_weights
from trainer.losses.distillation import topk_jsd
from trainer.losses.divergence import KlEstimator, KlPlacement, kl_estimate
from trainer.losses.objectives import Objective, token_losses
from trainer.losses.ratios import LOG_RATIO_LIMIT

if TYPE_CHECKING:
    from trainer.config.grpo import GRPOConfig

GkdMode = Literal["jsd", "policy_gradient"]


@dataclass(frozen=True)
class LossRule:
    """What the loss is made of. See GRPOConfig for each."""

    objective: Objective = field(default_factory=Objective)
    correction: CorrectionRule = field(default_factory=CorrectionRule)
    beta: float = 0.0
    kl_estimator: KlEstimator = "k2"
    kl_placement: KlPlacement = "loss"
    entropy_coef: float = 0.0
    distill_coef: float = 0.0
    distill_beta: float = 0.5
    gkd_mode: GkdMode = "jsd"

    def skips_zero_advantages(self, batch: StepBatch) -> bool:
        """Whether a sequence with the advantage zero adds nothing to the gradient."""
        return not (self.beta or self.entropy_coef or self.has_teacher(batch))

    def has_teacher(self, batch: StepBatch) -> bool:
        """Whether the batch brings a teacher's candidates that are used."""
        return self.distill_coef > 0 and batch.candidates > 0


def rule_of(config: GRPOConfig) -> LossRule:
    """What a configuration asks for."""
    return LossRule(
        Objective(
            config.loss_type,
            config.epsilon_low,
            config.epsilon_high,
            config.dual_clip_c,
            config.cispo_cap,
            config.dppo_low,
            config.dppo_high,
        ),
        CorrectionRule(config.correction, config.is_cap, config.mis_low, config.mis_high),
        config.beta,
        config.kl_estimator,
        config.kl_placement,
        config.entropy_coef,
        config.distill_coef,
        config.distill_beta,
        config.gkd_mode,
    )


@dataclass(frozen=True)
class MicroLoss:
    """A micro batch's part of the loss of its optimizer step. All but `total` carry no gradient."""

    total: Tensor
    """Scalar to be minimised: policy + supervised + beta kl + distill_coef distill - entropy_coef entropy."""
    policy: Tensor
    """Scalar part of the policy gradient."""
    supervised: Tensor
    """Scalar part of the tokens that are learnt as they are."""
    kl: Tensor
    """Scalar, nats, before beta: the estimate that is placed in the loss or in the reward."""
    distill: Tensor
    """Scalar, nats, before distill_coef: divergence from the teacher, or lp_policy - lp_teacher of the sampled tokens."""
    before_M: Tensor
    """[M] logprobs under the policy at the start of the step."""
    weights_M: Tensor
    """[M] off-policy weights."""
    is_bounded_M: Tensor
    """[M] bool: the correction capped the weight, or made it 0."""
    is_policy_M: Tensor
    """[M] bool: tokens that have a policy gradient."""
    ratio_M: Tensor
    clipped_low_M: Tensor
    clipped_high_M: Tensor
    """[M] see TokenLosses."""


def micro_loss(
    micro: MicroBatch,
    logprobs_M: Tensor,
    entropies_M: Tensor,
    candidate_logprobs_MK: Tensor | None,
    rule: LossRule,
) -> MicroLoss:
    """The loss of a micro batch.

    Args:
        logprobs_M: [M] of the targets under the weights being trained; carries the gradient.
        entropies_M: [M] nats; carries the gradient where entropy_coef is not 0.
        candidate_logprobs_MK: [M, K] of the teacher's candidates under the weights being trained; None without a teacher.
    """
    counts_M, is_policy_M = micro.loss_weights_M, ~micro.is_supervised_M
    now_M = logprobs_M.detach()
    before_M = now_M if micro.proximal_logprobs_M is None else micro.proximal_logprobs_M
    weights_M, is_bounded_M = _corrected(micro, before_M, rule.correction)
    # The policy that acted, from which the objective measures.
    old_M = _engine_logprobs(micro, before_M) if rule.correction.measures_from_engine else before_M
    kl_M = _kl(micro, logprobs_M, old_M, rule)
    distill_M, signal_M = _distillation(micro, logprobs_M, candidate_logprobs_MK, rule)
    advantages_M = micro.advantages_M + rule.distill_coef * signal_M
    if rule.kl_placement == "reward":
        advantages_M = advantages_M - rule.beta * kl_M
    tokens = token_losses(
        logprobs_M,
        old_M,
        advantages_M,
        weights_M,
        micro.sequence_M,
        rule.objective,
        is_sampled_M=is_policy_M,
    )
    policy = (torch.where(is_policy_M, tokens.losses_M, 0.0) * counts_M).sum()
    supervised = (torch.where(is_policy_M, 0.0, -logprobs_M) * counts_M).sum()
    kl, distill = (kl_M * counts_M).sum(), (distill_M * counts_M).sum()
    total = policy + supervised
    if rule.kl_placement == "loss":
        total = total + rule.beta * kl
    if not is_policy_gradient(micro, rule):
        total = total + rule.distill_coef * distill
    if rule.entropy_coef:
        total = total - rule.entropy_coef * (entropies_M * counts_M).sum()
    return MicroLoss(
        total,
        policy.detach(),
        supervised.detach(),
        kl.detach(),
        distill.detach(),
        before_M,
        weights_M,
        is_bounded_M,
        is_policy_M & (counts_M > 0),
        tokens.ratio_M,
        tokens.clipped_low_M,
        tokens.clipped_high_M,
    )


def _corrected(micro: MicroBatch, before_M: Tensor, rule: CorrectionRule) -> tuple[Tensor, Tensor]:
    """Weights, and whether a bound decided them. Tokens without logprobs of an engine have the weight 1."""
    engine_M = _engine_logprobs(micro, before_M)
    weights_M = correction_weights(before_M, engine_M, micro.sequence_M, rule, is_sampled_M=~micro.is_supervised_M)
    match rule.correction:
        case "tis" | "seq_tis":
            is_bounded_M = weights_M >= rule.is_cap
        case "mis" | "seq_mis":
            is_bounded_M = weights_M == 0
        case "bypass" | "none":
            is_bounded_M = torch.zeros_like(micro.is_supervised_M)
    return weights_M, is_bounded_M


def _engine_logprobs(micro: MicroBatch, before_M: Tensor) -> Tensor:
    """[M] of the targets; as the policy has them where no engine said them: a label was not sampled."""
    is_known_M = micro.has_inference_logprobs_M & ~micro.is_supervised_M
    return torch.where(is_known_M, micro.inference_logprobs_M, before_M)


def _kl(micro: MicroBatch, logprobs_M: Tensor, old_M: Tensor, rule: LossRule) -> Tensor:
    """[M] nats; 0 where there is no reference, and for supervised tokens."""
    if rule.beta == 0 or micro.ref_logprobs_M is None:
        return torch.zeros_like(old_M)
    # In the reward it is a constant, of the policy that acted.
    policy_M = logprobs_M if rule.kl_placement == "loss" else old_M
    return torch.where(micro.is_supervised_M, 0.0, kl_estimate(policy_M, micro.ref_logprobs_M, rule.kl_estimator))


def is_policy_gradient(micro: MicroBatch, rule: LossRule) -> bool:
    """Whether the teacher's logprobs act as advantages, and no distribution is compared."""
    ids_MK = micro.distill_token_ids_MK
    # One candidate is no distribution: what it says is the logprob of one token.
    return ids_MK is not None and (rule.gkd_mode == "policy_gradient" or ids_MK.shape[1] == 1)


def _distillation(
    micro: MicroBatch, logprobs_M: Tensor, candidate_logprobs_MK: Tensor | None, rule: LossRule
) -> tuple[Tensor, Tensor]:
    """[M] divergence from the teacher, and [M] advantage that the teacher gives; each 0 where there is none."""
    nothing_M = torch.zeros_like(micro.advantages_M)
    ids_MK, teacher_MK = micro.distill_token_ids_MK, micro.distill_logprobs_MK
    if rule.distill_coef == 0 or ids_MK is None or teacher_MK is None:
        return nothing_M, nothing_M
    is_there_MK = teacher_MK > PADDING_LOGPROB / 2
    if is_policy_gradient(micro, rule):
        is_target_MK = is_there_MK & (ids_MK == micro.target_ids_M[:, None])
        teacher_M = teacher_MK.masked_fill(~is_target_MK, -torch.inf).amax(-1)
        difference_M = (teacher_M - logprobs_M.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        signal_M = torch.where(is_target_MK.any(-1), difference_M, 0.0)
        return -signal_M, signal_M
    if candidate_logprobs_MK is None:
        raise ValueError("gkd_mode=jsd needs the policy's logprobs of the teacher's candidates")
    divergence_M = topk_jsd(candidate_logprobs_MK, teacher_MK, is_there_MK, beta=rule.distill_beta)
    return torch.where(is_there_MK.any(-1), divergence_M, 0.0), nothing_M
