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
