"""collect_trajectory alone: the base class makes the group. Items are frozen sets of pairs, as some hash them."""

# ruff: noqa: C409  (written as its users write)

import random

from atroposlib.envs.base import BaseEnv, BaseEnvConfig, Item, ScoredDataItem, ServerBaseline
from atroposlib.type_definitions import GameHistory
from atroposlib.utils.tokenize_for_trainer import tokenize_for_trainer


class OneTrajectoryEnv(BaseEnv):
    name = "one_trajectory"

    def __init__(self, config, server_configs, slurm=False, testing=False):
        super().__init__(config, server_configs, slurm, testing)
        self.print_this_env = False
        self.eval_metrics = []

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, ServerBaseline]:
        return BaseEnvConfig(wandb_name="one_trajectory", group_size=4), ServerBaseline(model_name="somewhere")

    async def setup(self):
        self.rng = random.Random(0)

    async def get_next_item(self) -> Item:
        left = self.rng.randint(0, 99)
        prompt = tuple([frozenset({"role": "user", "content": f"What is {left} + 5?"}.items())])
        return (prompt, str(left + 5))

    async def collect_trajectory(self, item: Item) -> tuple[ScoredDataItem | None, list[Item]]:
        messages: GameHistory = [dict(message) for message in item[0]]
        async with self.server.dedicated_server() as server:
            completion = await server.chat_completion(messages=messages, n=1, max_tokens=32, temperature=1.0)
        reply = completion.choices[0]
        messages.append({"role": "assistant", "content": reply.message.content})
        out = tokenize_for_trainer(self.tokenizer, messages, include_messages=self.config.include_messages)
        scored = ScoredDataItem(tokens=out["tokens"], masks=out["masks"])
        scored["scores"] = 1.0 if reply.message.content == item[1] else 0.0
        scored["overrides"] = {"set_advantage_to_zero": reply.finish_reason == "length"}
        if self.config.include_messages:
            scored["messages"] = out["messages"]
        return scored, []

    async def evaluate(self, *args, **kwargs):
        completion = await self.server.chat_completion(
            messages=[{"role": "user", "content": "What is 1 + 1?"}], n=1, max_tokens=8, temperature=0.0, split="eval"
        )
        right = completion.choices[0].message.content == "2"
        self.eval_metrics.append(("eval/right", float(right)))
        await self.evaluate_log({"eval/right": float(right)})

    async def wandb_log(self, wandb_metrics=None):
        wandb_metrics = {} if wandb_metrics is None else wandb_metrics
        for name, value in self.eval_metrics:
            wandb_metrics[name] = value
        self.eval_metrics = []
        await super().wandb_log(wandb_metrics)


if __name__ == "__main__":
    OneTrajectoryEnv.cli()
