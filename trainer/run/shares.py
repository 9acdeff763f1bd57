"""From the groups of a batch to what this rank trains of them: checked, scored, cut into passes."""

from __future__ import annotations

from collections.abc import Sequence

from atroposlib.wire.columns import Group
from trainer.batches.checks import BatchLimits, CheckedBatch, checked
from trainer.batches.micro_batch import RankShare, share_of_rank
from trainer.batches.step_batch import StepBatch, build_step_batch
from trainer.config.grpo import GRPOConfig
from trainer.errors import UnusableBatchError
from trainer.policy.loading import positions_of
from trainer.policy.logprobs import PackedPolicy
from trainer.run import engine_link
from trainer.run.training_run import TrainingRun
from trainer.step.loss import LossRule


class Shares:
    """The shares of a rank, step by step.

    Args:
        run: gives the groups, and is told what is odd about them.
        rule: says which sequences have no gradient.
    """

    def __init__(self, config: GRPOConfig, policy: PackedPolicy, run: TrainingRun, rule: LossRule) -> None:
        self.counters: dict[str, float] = {}
        """What was odd about the newest batch, for the metrics."""
        self._config = config
        self._policy = policy
        self._run = run
        self._rule = rule
        self._limits = batch_limits(config, policy)

    def of(self, step: int) -> RankShare | None:
        """This rank's part of a step's batch; None when the trainer should stop.

        Raises:
            UnusableBatchError: nothing of the batch can be trained.
            AtroposError: see TrainingRun.groups_of, checked and StepBatch.check_staleness.
        """
        groups = self._run.groups_of(step)
        return None if groups is None else self._of_batch(self._batch(step, groups))

    def _batch(self, step: int, groups: Sequence[Group]) -> StepBatch:
        found = checked(groups, self._limits)
        for finding in found.findings:
            self._run.warn_once(finding.metric, f"step {step}: {finding.text}")
        if not found.groups and found.findings:
            raise UnusableBatchError(step, found.findings[0].text)
        self.counters = found.counters
        batch = step_batch(self._config, step, found)
        batch.check_staleness(self._config.max_staleness)
        return batch

    def _of_batch(self, batch: StepBatch) -> RankShare:
        config = self._config
        return share_of_rank(
            batch,
            rank=config.process_index,
            ranks=config.world_size,
            # One sequence a pass: none fits beside another.
            max_tokens=config.max_tokens_per_micro_batch if config.pack else 1,
            hidden_size=self._policy.config.get_text_config().hidden_size,
            aggregation=config.loss_aggregation,
            max_completion_length=config.max_completion_length,
            shares_prompts=config.pack and self._policy.shares_prompts,
            num_minibatches=config.num_minibatches,
            seed=config.seed,
            skips_zero_advantages=self._rule.skips_zero_advantages(batch),
            has_teacher=self._rule.has_teacher(batch),
        )


def batch_limits(config: GRPOConfig, policy: PackedPolicy) -> BatchLimits:
    """What batches are checked against."""
    text = policy.config.get_text_config()
    return BatchLimits(
        vocabulary=text.vocab_size,
        context=positions_of(text),
        pass_tokens=config.max_tokens_per_micro_batch,
        needs_inference_logprobs=config.correction != "none",
        has_sampled_logprobs=config.correction != "none" and engine_link.proves_logprobs(config, policy),
    )


def step_batch(config: GRPOConfig, step: int, found: CheckedBatch) -> StepBatch:
    """The batch of a step, with the advantages that the configuration asks for."""
    return build_step_batch(
        step,
        found.groups,
        advantage_scale=config.advantage_scale,
        overlong=config.overlong,
        temperature=config.temperature,
        unbias_log_probabilities=config.unbias_log_probabilities,
        max_completion_length=config.max_completion_length,
        overlong_cache=config.overlong_cache,
        left_out=found.left_out,
    )
