"""The passes of one step: scores before its first optimizer step, then forward and backward over packed micro batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.batches.micro_batch import MicroBatch, RankShare
from trainer.policy.logprobs import CandidateScores, TokenScores
from trainer.policy.reference import Reference
from trainer.reporting.metrics import TokenSums
from trainer.step.gradient_accumulation import GradientAccumulation
from trainer.step.loss import LossRule, is_policy_gradient, micro_loss
from trainer.step.out_of_memory import within_memory

if TYPE_CHECKING:
    from trainer.config.grpo import GRPOConfig

Minibatches = Sequence[Sequence[MicroBatch]]


class StepPasses:
    """Runs one rank's passes. Every rank calls the same methods with as many micro batches.

    Args:
        accelerator: of accelerate: knows how gradients are synchronised and how backward is called.
        config: of the run.
        rule: the loss.
        reference: None without one.
    """

    def __init__(
        self,
        accelerator: Any,
        config: GRPOConfig,
        rule: LossRule,
        *,
        is_deepspeed: bool,
        reference: Reference | None,
    ) -> None:
        self._accelerator = accelerator
        self._config = config
        self._rule = rule
        self._accumulation = GradientAccumulation(accelerator, config, is_deepspeed=is_deepspeed)
        self._reference = reference

    def prepared(self, model: Any, share: RankShare, *, optimizer_steps: int) -> Minibatches:
        """The share with the logprobs that the loss compares with: the reference's, and those at the start of the step.

        Whether a pass is needed is asked of the whole batch, so that every rank answers alike.

        Args:
            optimizer_steps: with one, the weights at the start are those of the pass itself, and no pass is made.
        Raises:
            PassMemoryError: a pass does not fit into memory.
        """
        minibatches: Minibatches = share.minibatches
        batch, is_bypassed = share.batch, self._rule.correction.measures_from_engine
        model.eval()
        if optimizer_steps > 1 and (not is_bypassed or batch.lacks_inference_logprobs):
            minibatches = [[self._with_proximal(model, micro) for micro in each] for each in minibatches]
        if self._reference is not None and batch.lacks_ref_logprobs:
            with self._reference.in_use(model) as reference:
                minibatches = [[self._with_reference(reference, micro) for micro in each] for each in minibatches]
        model.train()
        return minibatches

    def accumulate(self, model: Any, micro_batches: Sequence[MicroBatch], sums: TokenSums) -> None:
        """Add up the gradients of one optimizer step; they are synchronised once, with the last pass.

        Raises:
            PassMemoryError: a pass does not fit into memory.
        """
        # Our loss is already a share of the whole batch's.
        self._accumulation.run(
            model, micro_batches, lambda micro: self._loss(model, micro.to(self._config.device), sums)
        )

    def _loss(self, model: Any, micro: MicroBatch, sums: TokenSums) -> Tensor:
        wants_candidates = micro.distill_token_ids_MK is not None and not is_policy_gradient(micro, self._rule)
        scores = forward(
            model,
            micro,
            candidate_ids_MK=micro.distill_token_ids_MK if wants_candidates else None,
            entropy_grad=self._rule.entropy_coef != 0,
        )
        loss = micro_loss(micro, scores.logprobs_M, scores.entropies_M, scores.candidate_logprobs_MK, self._rule)
        sums.add(micro, loss, scores.entropies_M.detach())
        return loss.total

    @torch.no_grad()
    def _with_proximal(self, model: Any, micro: MicroBatch) -> MicroBatch:
        with within_memory(micro, self._config):
            return replace(micro, proximal_logprobs_M=forward(model, micro.to(self._config.device)).logprobs_M)

    @torch.no_grad()
    def _with_reference(self, reference: Any, micro: MicroBatch) -> MicroBatch:
        micro = micro.to(self._config.device)
        # accelerate casts the model that it prepared, and knows of no other.
        with within_memory(micro, self._config), self._accelerator.autocast():
            ref_M = forward(reference, micro).logprobs_M
        if micro.ref_logprobs_M is not None and micro.has_ref_logprobs_M is not None:
            ref_M = torch.where(micro.has_ref_logprobs_M, micro.ref_logprobs_M, ref_M)
        return replace(micro, ref_logprobs_M=ref_M)


def forward(
    model: Any, micro: MicroBatch, *, candidate_ids_MK: Tensor | None = None, entropy_grad: bool = False
) -> TokenScores | CandidateScores:
    """One pass of a PackedPolicy, in its wrappers or not, over a micro batch."""
    scores: TokenScores | CandidateScores = model(
        micro.input_ids_1T,
        micro.position_ids_1T,
        micro.segments_1T,
        micro.prefixes_1T,
        micro.target_positions_M,
        micro.target_ids_M,
        micro.temperatures_M,
        candidate_ids_MK=candidate_ids_MK,
        entropy_grad=entropy_grad,
    )
    return scores
