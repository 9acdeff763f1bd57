"""An environment as they were written for Atropos 0.4.0: four arguments passed up by position, lists kept by hand."""

from __future__ import annotations

from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup

NOWHERE = "http://127.0.0.1:1/v1"


class OldConfig(BaseEnvConfig):
    tokenizer_name: str | None = None
    group_size: int = 2
    use_wandb: bool = False


class OldEnv(BaseEnv):
    """Collects whole groups. What it would send is kept in `sent`."""

    name = "old"
    env_config_cls = OldConfig

    def __init__(self, config: Any, server_configs: Any, slurm: bool = True, testing: bool = False) -> None:
        super().__init__(config, server_configs, slurm, testing)
        self.sent: list[Any] = []
        self.calls: list[str] = []
        self.outcome: Any = None

    @classmethod
    def make(cls, **config: Any) -> OldEnv:
        return cls(cls.env_config_cls(**config), [APIServerConfig(base_url=NOWHERE, server_type="vllm")])

    async def get_next_item(self) -> Any:
        return None

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(f"evaluate{args}{kwargs}")

    async def collect_trajectories(self, item: Any) -> Any:
        self.calls.append("collect")
        return self.outcome, []

    async def _send_scored_data_to_api(self, scored_data: Any) -> None:
        self.sent += scored_data if isinstance(scored_data, list) else [scored_data]


def a_group(*scores: float, length: int = 4, **columns: Any) -> ScoredDataGroup:
    """Two prompt tokens, then trained ones."""
    tokens = list(range(10, 10 + length))
    group: Any = {
        "tokens": [tokens] * len(scores),
        "masks": [[-100, -100, *tokens[2:]]] * len(scores),
        "scores": list(scores),
        **columns,
    }
    return ScoredDataGroup(**group)  # type: ignore[typeddict-item]
