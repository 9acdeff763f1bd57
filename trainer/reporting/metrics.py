"""The figures of one step: sums over tokens gathered from all ranks, and facts of the batch.

Shapes: M trained tokens of a micro batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.batches.micro_batch import MicroBatch
from trainer.batches.step_batch import StepBatch
from trainer.losses.ratios import LOG_RATIO_LIMIT
from trainer.step.loss import MicroLoss

_SUMS = (
    *("total", "policy", "supervised", "kl", "distill"),
    *("tokens", "entropy", "compared", "corrected"),
    *("kl_k1", "kl_k3", "difference", "ratio", "outside"),
    *("weight", "weight_squared", "bounded"),
    *("moved", "clipped_low", "clipped_high"),
)
_MAXIMA = ("log_ratio", "stop")

USUAL_RATIOS = (0.5, 2.0)
"""A token whose probability the trainer and the engine see this far apart is counted as outside."""


class TokenSums:
    """Sums and maxima over the trained tokens of one rank; `gathered` makes them those of all ranks."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._maxima = torch.full((len(_MAXIMA),), -torch.inf, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, micro: MicroBatch, loss: MicroLoss, entropies_M: Tensor) -> None:
        """Add a pass. Tokens of weight 0 (an idle pass) do not count."""
        counts_M = micro.loss_weights_M > 0
        is_policy_M = loss.is_policy_M
        compared_M = is_policy_M & micro.has_inference_logprobs_M
        delta_M = (loss.before_M - micro.inference_logprobs_M)[compared_M].double()
        delta_M = delta_M.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ratio_M = delta_M.exp()
        weight_M = loss.weights_M[compared_M].double()
        low, high = USUAL_RATIOS
        sums = [
            *(loss.total.detach(), loss.policy, loss.supervised, loss.kl, loss.distill),
            *(counts_M.sum(), entropies_M[counts_M].double().sum(), compared_M.sum(), is_policy_M.sum()),
            *(-delta_M.sum(), (torch.expm1(delta_M) - delta_M).sum(), delta_M.abs().sum(), ratio_M.sum()),
            ((ratio_M < low) | (ratio_M > high)).sum(),
            *(weight_M.sum(), weight_M.square().sum(), loss.is_bounded_M[compared_M].sum()),
            loss.ratio_M[is_policy_M].double().sum(),
            *(loss.clipped_low_M[is_policy_M].sum(), loss.clipped_high_M[is_policy_M].sum()),
        ]
        self._sums += torch.stack([value.double() for value in sums])
        if len(delta_M):
            self._maxima[0] = torch.maximum(self._maxima[0], delta_M.max())

    def ask_to_stop(self) -> None:
        """Let every rank know that this one was told to stop."""
        self._maxima[1] = 1.0

    def gathered(self, *, optimizer_steps: int = 1) -> TokenFigures:
        """Figures over all ranks; every rank must call it.

        Args:
            optimizer_steps: that the sums are over; losses are their means.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums, op=torch.distributed.ReduceOp.SUM)
            torch.distributed.all_reduce(self._maxima, op=torch.distributed.ReduceOp.MAX)
        sums = dict(zip(_SUMS, self._sums.tolist(), strict=True))
        maxima = dict(zip(_MAXIMA, self._maxima.tolist(), strict=True))
        tokens, compared, policy = (max(sums[name], 1.0) for name in ("tokens", "compared", "corrected"))
        return TokenFigures(
            loss=sums["total"] / optimizer_steps,
            policy_loss=sums["policy"] / optimizer_steps,
            supervised_loss=sums["supervised"] / optimizer_steps,
            kl=sums["kl"] / optimizer_steps,
            distillation=sums["distill"] / optimizer_steps,
            entropy=sums["entropy"] / tokens,
            mismatch_kl_k1=sums["kl_k1"] / compared,
            mismatch_kl_k3=sums["kl_k3"] / compared,
            mismatch_difference=sums["difference"] / compared,
            mismatch_ratio_mean=sums["ratio"] / compared,
            mismatch_outside_frac=sums["outside"] / compared,
            mismatch_ratio_max=float(np.exp(maxima["log_ratio"])),
            truncated_frac=sums["bounded"] / compared,
            ess=sums["weight"] ** 2 / max(compared * sums["weight_squared"], 1e-30),
            ratio_mean=sums["moved"] / policy,
            clip_frac_low=sums["clipped_low"] / policy,
            clip_frac_high=sums["clipped_high"] / policy,
            should_stop=maxima["stop"] > 0,
        )


@dataclass(frozen=True)
class TokenFigures:
    """What the forward passes of a step say, over all ranks. Tokens of sequences without a signal were not computed."""

    loss: float
    """What was minimised: policy + supervised + beta kl + distill_coef distillation - entropy_coef entropy."""
    policy_loss: float
    supervised_loss: float
    """Of tokens that are learnt as they are: their negative logprobs."""
    kl: float
    """From the reference policy, nats, by kl_estimator and loss_aggregation, before beta."""
    distillation: float
    """From the teacher, nats, before distill_coef."""
    entropy: float
    """Mean, nats."""
    mismatch_kl_k1: float
    """Mean of -d with d = trainer's logprob - engine's, nats: estimates KL(engine || trainer), and may be negative."""
    mismatch_kl_k3: float
    """Mean of exp(d) - d - 1, nats: estimates the same, never negative, with less variance."""
    mismatch_difference: float
    """Mean of |d|, nats: what the start-up probe limits."""
    mismatch_ratio_mean: float
    """Of exp(d); about 1 where engine and trainer have the same policy."""
    mismatch_ratio_max: float
    mismatch_outside_frac: float
    """Tokens whose ratio is outside USUAL_RATIOS."""
    truncated_frac: float
    """Tokens whose off-policy weight was capped (tis, seq_tis) or made 0 (mis, seq_mis)."""
    ess: float
    """Effective sample size as a share of the tokens: (sum w)^2 / (n sum w^2)."""
    ratio_mean: float
    """Of the objective's ratio; 1 where the policy has not moved from where the ratio is taken."""
    clip_frac_low: float
    clip_frac_high: float
    """Tokens whose ratio was clipped at the lower and at the upper bound."""
    should_stop: bool
    """Some rank was told to stop."""

    def as_metrics(self) -> dict[str, float]:
        """Under their names in metrics.jsonl."""
        return {
            "loss/total": self.loss,
            "loss/pg": self.policy_loss,
            "loss/kl": self.kl,
            "loss/distill": self.distillation,
            "loss/sft": self.supervised_loss,
            "entropy": self.entropy,
            "ratio/mean": self.ratio_mean,
            "ratio/clip_frac_low": self.clip_frac_low,
            "ratio/clip_frac_high": self.clip_frac_high,
            "mismatch/kl_k1": self.mismatch_kl_k1,
            "mismatch/kl_k3": self.mismatch_kl_k3,
            "mismatch/difference_nats": self.mismatch_difference,
            "mismatch/ratio_mean": self.mismatch_ratio_mean,
            "mismatch/ratio_max": self.mismatch_ratio_max,
            "mismatch/ratio_outside_frac": self.mismatch_outside_frac,
            "is/truncated_frac": self.truncated_frac,
            "ess": self.ess,
        }


def batch_metrics(batch: StepBatch) -> dict[str, float]:
    """What the batch itself says, under the names in metrics.jsonl. Lengths are in tokens."""
    rewards = np.concatenate(batch.rewards)
    completions = np.array([sequence.completion_tokens for sequence in batch.sequences])
    staleness: Sequence[int] = batch.staleness() or [0]
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/min": float(rewards.min()),
        "reward/max": float(rewards.max()),
        "frac_reward_zero_std": float(np.mean([np.ptp(group) < 1e-6 for group in batch.rewards])),
        "staleness/mean": float(np.mean(staleness)),
        "staleness/max": float(max(staleness)),
        "completion/mean": float(completions.mean()),
        "completion/p95": float(np.percentile(completions, 95)),
        "completion/truncated_frac": float(np.mean([sequence.is_truncated for sequence in batch.sequences])),
        "tokens/step": float(batch.trained_tokens),
        "n_sequences": float(len(batch.sequences)),
    }
