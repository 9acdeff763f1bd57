"""What an environment asks of the loop that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from atroposlib.envs.serving.run_status import StatusDict
    from atroposlib.type_definitions import ScoredDataGroup
    from atroposlib.wire.models import EnvInfo


class RunLink(Protocol):
    """The running loop, as the environment sees it."""

    async def join(self) -> EnvInfo:
        """Register with the rollout server; waits for a trainer."""
        ...

    async def status(self) -> StatusDict:
        """Where the run stands now."""
        ...

    async def admit(self) -> None:
        """Wait for leave to start groups, and start them."""
        ...

    def start_evaluation(self, step: int) -> None:
        """Evaluate in the background, unless an evaluation runs already."""
        ...

    def note_group(self, group: ScoredDataGroup, trained: Sequence[int], reason: str | None) -> None:
        """A group came out of the environment. trained: tokens of each sequence; reason: why the group is not sent."""
        ...

    async def send(self, groups: Sequence[ScoredDataGroup]) -> None:
        """Deliver groups; returns when the server has answered for all of them."""
        ...

    def metrics(self) -> dict[str, Any]:
        """What the loop knows and the environment logs."""
        ...
