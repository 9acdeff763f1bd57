"""What old clients send, in small."""

from __future__ import annotations

from typing import Any

REGISTRATION: dict[str, Any] = {
    "wandb_group": "g", "wandb_project": "p", "batch_size": 4, "max_token_len": 64, "checkpoint_dir": "/c",
    "save_checkpoint_interval": 10, "starting_step": 0, "num_steps": 5,
}  # fmt: skip
ENV: dict[str, Any] = {"max_token_length": 64, "desired_name": "env", "weight": 1.0, "group_size": 2}


def old_group(number: float = 0.0, *, env_id: int | None = 0, n: int = 2) -> dict[str, Any]:
    """A group of n sequences; its number stands in the scores, so that no two are equal."""
    return {
        "tokens": [[1, 2, 3 + i] for i in range(n)],
        "masks": [[-100, -100, 3 + i] for i in range(n)],
        "scores": [number, *([0.5] * (n - 1))],
        "inference_logprobs": [[1.0, 1.0, -0.5]] * n,
        "env_id": env_id,
        "unknown_extra": 1,
    }


def numbers(batch: list[dict[str, Any]] | None) -> list[float]:
    """The numbers of the groups of a batch."""
    return [] if batch is None else [group["scores"][0] for group in batch]
