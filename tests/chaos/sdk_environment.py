"""The environment of a user, started as users start theirs."""

from __future__ import annotations

from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig


class LettersEnv(BaseEnv):
    """Pays the letter a."""

    name = "letters"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, list[APIServerConfig]]:
        return BaseEnvConfig(group_size=4, max_num_workers_per_node=4, use_wandb=False), []

    async def get_next_item(self) -> str:
        return "Say a or b."

    async def collect_trajectories(self, item: str) -> Any:
        return await self.rollout_group(
            [{"role": "user", "content": item}], reward=lambda text: float(text == "a"), max_tokens=4
        )


if __name__ == "__main__":
    LettersEnv.cli()
