# mypy: disable-error-code="attr-defined, import-untyped, import-not-found"
"""The environment under measurement: run as it is by our interpreter and by that of the peer environment.

env_overhead_env.py STYLE ROLLOUT_SERVER_URL INFERENCE_URL TOKENIZER GROUP_SIZE TOKENS WORKERS BATCH_SIZE

STYLE is `chat` (an old environment: chat_completion, tokens made by hand) or `tokens` (the token route; ours only).
"""

from __future__ import annotations

import sys
from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup


class OverheadEnv(BaseEnv):
    """Work of its own next to none: what is left is the library's."""

    name = "overhead"
    tokens: int = 0
    count: int = 0

    async def setup(self) -> None:
        return

    async def get_next_item(self) -> int:
        self.count += 1
        return self.count

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        return


class ChatEnv(OverheadEnv):
    """As upstream's examples are written."""

    async def collect_trajectories(self, item: int) -> Any:
        answer = await self.server.chat_completion(
            messages=[{"role": "user", "content": f"item {item}"}], n=self.config.group_size, max_tokens=self.tokens
        )
        group = ScoredDataGroup()
        group["tokens"], group["masks"], group["scores"] = [], [], []
        for i, _ in enumerate(answer.choices):
            ids = list(range(1, self.tokens + 1))
            group["tokens"].append(ids)
            group["masks"].append([-100] * 8 + ids[8:])
            group["scores"].append(float(i % 2))
        return group, []


class TokensEnv(OverheadEnv):
    """As ours are written: exact tokens, logprobs and versions."""

    async def collect_trajectories(self, item: int) -> Any:
        rewards = iter(range(self.config.group_size))
        return await self.rollout_group(
            [{"role": "user", "content": f"item {item}"}],
            reward=lambda text: float(next(rewards) % 2),
            max_tokens=self.tokens,
        )


def main() -> None:
    style, rollout_server, inference, tokenizer, *numbers = sys.argv[1:]
    group_size, tokens, workers, batch_size = map(int, numbers)
    cls: type[OverheadEnv] = {"chat": ChatEnv, "tokens": TokensEnv}[style]
    config = BaseEnvConfig(
        group_size=group_size, max_num_workers=workers, max_token_length=4 * tokens + 256, steps_per_eval=-1,
        rollout_server_url=rollout_server, tokenizer_name=tokenizer, total_steps=10**9, use_wandb=False,
        wandb_name="overhead", batch_size=batch_size,
    )  # fmt: skip
    server = APIServerConfig(
        model_name="mock", base_url=inference, api_key="x", server_type="vllm" if style == "tokens" else "openai",
        num_max_requests_at_once=4096, health_check=False, timeout=60,
    )  # fmt: skip
    cls.tokens = tokens
    cls.config_init = classmethod(lambda cls: (config, [server]))  # type: ignore[assignment, method-assign]
    sys.argv = [sys.argv[0], "serve"]
    cls.cli()


if __name__ == "__main__":
    main()
