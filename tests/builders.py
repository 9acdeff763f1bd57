"""Small valid objects for tests."""

from __future__ import annotations

import itertools

from atroposlib.wire.columns import Group, build_group
from atroposlib.wire.layout import NOT_SAMPLED
from atroposlib.wire.models import RunRequest

_ids = itertools.count()


def a_group(
    group_id: str | None = None,
    *,
    env_id: int = 0,
    n: int = 2,
    prompt: int = 3,
    completion: int = 4,
    version: int | None = 0,
    ticket: str | None = None,
    scores: list[float] | None = None,
) -> Group:
    """A group of n sequences of prompt + completion tokens, sampled by one policy version."""
    sampled = NOT_SAMPLED if version is None else version
    return build_group(
        group_id=group_id or f"group-{next(_ids)}",
        env_id=env_id,
        tokens=[[*range(1, prompt + 1), *range(10 + i, 10 + i + completion)] for i in range(n)],
        loss_masks=[[0] * prompt + [1] * completion] * n,
        inference_logprobs=[[0.0] * prompt + [-0.5] * completion] * n,
        versions=[[(NOT_SAMPLED, prompt), (sampled, completion)]] * n,
        scores=scores or [float(i % 2) for i in range(n)],
        ticket=ticket,
        finish_reasons=("stop",) * n,
    )


def a_run(run_name: str = "run", *, batch_size: int = 4, max_staleness: int = 1, num_steps: int = 100) -> RunRequest:
    """A run request with small numbers."""
    return RunRequest(run_name=run_name, batch_size=batch_size, max_staleness=max_staleness, num_steps=num_steps)
