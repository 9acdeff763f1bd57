"""Errors of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atroposlib.errors import AtroposError, ConfigError


class TrainerError(AtroposError):
    """The trainer cannot go on. The text says why and what to change."""

    code = "trainer"


class StalenessError(TrainerError):
    """A batch holds tokens older than the run allows, although the rollout server promised none."""

    code = "staleness"

    def __init__(self, group_id: str, *, step: int, oldest_version: int, max_staleness: int) -> None:
        super().__init__(
            f"step {step}: group {group_id!r} holds tokens sampled by policy version {oldest_version}, which is "
            f"{step - oldest_version} versions old; this run allows max_staleness={max_staleness}. "
            "Was the run opened on the server with a larger max_staleness, or does an environment send wrong versions?"
        )


class NonFiniteError(TrainerError):
    """Step after step, the loss or its gradient is NaN or infinite."""

    code = "non_finite"

    def __init__(self, step: int, *, in_a_row: int, report: Path | None = None) -> None:
        """report: a file that says what the batch was."""
        super().__init__(
            f"step {step}: the loss or its gradient is not finite, as in the {in_a_row - 1} steps before it; the weights are "
            "those before these steps. Lower learning_rate or max_grad_norm, use torch_dtype=float32, or look for advantages "
            f"and logprobs out of all proportion in what the environments send{f': {report} has those of the batch' if report else ''}"
        )


class PassMemoryError(TrainerError):
    """A forward and backward pass needs more memory than there is."""

    code = "pass_memory"

    def __init__(self, tokens: int, *, rank: int | None, peak: str, reason: str, remedies: Sequence[str]) -> None:
        super().__init__(
            f"{'' if rank is None else f'rank {rank}: '}a pass of {tokens} tokens needs more memory than there is ({peak}): "
            f"{reason}\nhint: give {', '.join(remedies) or 'the trainer more memory'}"
        )


class RewardFunctionError(ConfigError):
    """A reward function failed, or gave something other than rewards: nothing that another try would mend."""

    code = "reward_function"


class RankError(TrainerError):
    """Another rank cannot go on, so this one does not either."""

    code = "rank"

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} cannot go on, and all ranks stop together: {reason}")


class ForeignTokensError(TrainerError):
    """A group holds token ids that the model does not have."""

    code = "foreign_tokens"

    def __init__(self, group_id: str, *, env_id: int, column: str, token_id: int, vocabulary: int) -> None:
        super().__init__(
            f"group {group_id!r} of environment {env_id}: column {column!r} holds the token id {token_id}, but the model knows "
            f"0 to {vocabulary - 1}. It was tokenized for another model, so its other ids mean something else here too: give the "
            "environment (or the teacher) this model's tokenizer, and the run a new run_name"
        )


class UnusableBatchError(TrainerError):
    """No group of a batch can be trained on."""

    code = "unusable_batch"

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(
            f"step {step}: not one group of the batch can be used. {reason}. The same batch would come again: mend what its "
            "environment computes, and give a new run_name"
        )


class CheckpointError(TrainerError):
    """Weights could not be written where the run needs them."""

    code = "checkpoint"
