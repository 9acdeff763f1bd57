"""Groups of several sizes: each says its own in group_overrides, with keys of the author's beside it."""

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Item, ScoredDataGroup

SIZES = (2, 4, 6)


class MixedSizesEnv(BaseEnv):
    name = "mixed_sizes"

    @classmethod
    def config_init(cls):
        return BaseEnvConfig(group_size=4, wandb_name="mixed_sizes", min_batch_allocation=0.5), [
            APIServerConfig(model_name="m", base_url="http://localhost:9001/v1", api_key="x", server_type="vllm")
        ]

    async def setup(self):
        self.iter = 0

    async def get_next_item(self) -> Item:
        self.iter += 1
        return {"number": self.iter, "size": SIZES[self.iter % len(SIZES)]}

    async def collect_trajectories(self, item: Item):
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            completion = await managed.chat_completion(
                messages=[{"role": "user", "content": f"What is {item['number']} + 1?"}], n=item["size"], max_tokens=16
            )
            nodes = managed.get_state()["nodes"]
        group: ScoredDataGroup = {
            "tokens": [node.tokens for node in nodes],
            "masks": [node.masked_tokens for node in nodes],
            "inference_logprobs": [node.logprobs for node in nodes],
            "scores": [float(one.message.content == str(item["number"] + 1)) for one in completion.choices],
            "group_overrides": {"group_size": item["size"], "task_id": f"task-{item['number']}"},
        }
        return group, []

    async def evaluate(self, *args, **kwargs):
        await self.evaluate_log({"eval/sizes": float(len(SIZES))})


if __name__ == "__main__":
    MixedSizesEnv.cli()
