"""Backlog stages: a first rollout writes the question, a later one, out of the backlog, answers it. No group of its own from the first."""

import re

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Item, ScoredDataGroup
from atroposlib.utils.tokenize_for_trainer import tokenize_for_trainer


class StagesEnv(BaseEnv):
    name = "stages"

    @classmethod
    def config_init(cls):
        return BaseEnvConfig(group_size=4, wandb_name="stages"), [
            APIServerConfig(model_name="m", base_url="http://localhost:9001/v1", api_key="x", weight=1.0)
        ]

    async def setup(self):
        self.drafts = 0
        self.answers = 0

    async def get_next_item(self) -> Item:
        self.drafts += 1
        return {"stage": "draft", "number": self.drafts}

    async def collect_trajectories(self, item: Item):
        if item["stage"] == "draft":
            return None, await self.draft(item)
        return await self.answer(item)

    async def draft(self, item) -> list[Item]:
        completion = await self.server.chat_completion(
            messages=[{"role": "user", "content": f"Name two numbers, {item['number']} first."}], n=1, max_tokens=16
        )
        left, right = re.findall(r"\d+", completion.choices[0].message.content)
        return [{"stage": "answer", "left": int(left), "right": int(right)}]

    async def answer(self, item) -> tuple[ScoredDataGroup, list[Item]]:
        self.answers += 1
        question = {"role": "user", "content": f"What is {item['left']} + {item['right']}?"}
        completions = await self.server.chat_completion(messages=[question], n=self.config.group_size, max_tokens=16)
        group = ScoredDataGroup(tokens=[], masks=[], scores=[])
        for choice in completions.choices:
            reply = {"role": "assistant", "content": choice.message.content}
            out = tokenize_for_trainer(self.tokenizer, [question, reply])
            group["tokens"].append(out["tokens"])
            group["masks"].append(out["masks"])
            group["scores"].append(float(reply["content"] == str(item["left"] + item["right"])))
        return group, []

    async def evaluate(self, *args, **kwargs):
        later = await self.draft({"number": 4})
        await self.evaluate_log({"eval/drafted": float(later[0]["left"] == 4)})


if __name__ == "__main__":
    StagesEnv.cli()
