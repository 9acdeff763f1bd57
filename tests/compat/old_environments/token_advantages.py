"""Advantages of its own for every token, beside reference logprobs: what the trainer would compute is not asked for."""

# ruff: noqa: B905  (written as its users write)

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Item, ScoredDataGroup


class TokenAdvantagesEnv(BaseEnv):
    name = "token_advantages"

    @classmethod
    def config_init(cls):
        return BaseEnvConfig(group_size=4, wandb_name="token_advantages"), [
            APIServerConfig(model_name="m", base_url="http://localhost:9001/v1", api_key="x", server_type="vllm")
        ]

    async def setup(self):
        self.iter = 0

    async def get_next_item(self) -> Item:
        self.iter += 1
        return self.iter

    async def collect_trajectories(self, item: Item):
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            completion = await managed.chat_completion(
                messages=[{"role": "user", "content": f"What is {item} + 3?"}], n=self.config.group_size, max_tokens=16
            )
            nodes = managed.get_state()["nodes"]
        group = ScoredDataGroup()
        group["tokens"] = [node.tokens for node in nodes]
        group["masks"] = [node.masked_tokens for node in nodes]
        group["inference_logprobs"] = [node.logprobs for node in nodes]
        group["scores"] = [float(one.message.content == str(item + 3)) for one in completion.choices]
        group["advantages"] = [
            [0.0 if mask == -100 else score - 0.5 for mask in node.masked_tokens]
            for node, score in zip(nodes, group["scores"])
        ]
        group["ref_logprobs"] = [[-0.125] * len(node.tokens) for node in nodes]
        return group, []

    async def evaluate(self, *args, **kwargs):
        await self.evaluate_log({"eval/steps": float(self.curr_step)})


if __name__ == "__main__":
    TokenAdvantagesEnv.cli()
