"""One item gives several groups, None among them; postprocess_histories drops some of them and marks the others."""

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Item, ScoredDataGroup
from atroposlib.utils.tokenize_for_trainer import tokenize_for_trainer


class SeveralGroupsEnv(BaseEnv):
    name = "several_groups"

    @classmethod
    def config_init(cls):
        return BaseEnvConfig(group_size=4, wandb_name="several_groups"), [
            APIServerConfig(model_name="m", base_url="http://localhost:9001/v1", api_key="x")
        ]

    async def setup(self):
        self.iter = 0
        self.cleanups = 0

    async def get_next_item(self) -> Item:
        self.iter += 1
        return self.iter

    async def turn(self, left: int, right: int) -> ScoredDataGroup:
        question = {"role": "user", "content": f"What is {left} + {right}?"}
        completions = await self.server.chat_completion(messages=[question], n=self.config.group_size, max_tokens=16)
        group = ScoredDataGroup(tokens=[], masks=[], scores=[])
        for choice in completions.choices:
            reply = {"role": "assistant", "content": choice.message.content}
            out = tokenize_for_trainer(self.tokenizer, [question, reply])
            group["tokens"].append(out["tokens"])
            group["masks"].append(out["masks"])
            group["scores"].append(float(reply["content"] == str(left + right)))
        group["group_overrides"] = {"turn": right}
        return group

    async def collect_trajectories(self, item: Item) -> tuple[list[ScoredDataGroup | None], list[Item]]:
        return [await self.turn(item, 1), None, await self.turn(item, 2), await self.turn(item, 3)], []

    async def postprocess_histories(self, trajectories):
        kept = [group for group in trajectories if group is not None and group["group_overrides"]["turn"] != 2]
        for group in kept:
            group["overrides"] = [{"set_advantage_to_zero": score == 0.0} for score in group["scores"]]
        return kept

    async def cleanup(self):
        self.cleanups += 1

    async def evaluate(self, *args, **kwargs):
        group = await self.turn(1, 1)
        await self.evaluate_log({"eval/turns": float(len(group["scores"]))})


if __name__ == "__main__":
    SeveralGroupsEnv.cli()
