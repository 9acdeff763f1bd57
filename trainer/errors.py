"""Errors of the trainer."""

from __future__ import annotations

from atroposlib.errors import AtroposError


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

    def __init__(self, step: int, *, in_a_row: int) -> None:
        super().__init__(
            f"step {step}: the loss or its gradient is not finite, as in the {in_a_row - 1} steps before it; the weights are "
            "those before these steps. Lower learning_rate or max_grad_norm, use torch_dtype=float32, or look for logprobs "
            "that are no numbers in what the environments send"
        )
