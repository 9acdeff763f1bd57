"""managed_server, one turn: exact tokens and logprobs of every choice; prompt files of one server each."""

# ruff: noqa: B905  (written as its users write)

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Item, ScoredDataGroup


class ManagedGroupEnv(BaseEnv):
    name = "managed_group"

    def __init__(self, config, server_configs, slurm=True, testing=False):
        super().__init__(config, server_configs, slurm, testing)
        self.percent_correct_buffer = []

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, APIServerConfig]:
        env_config = BaseEnvConfig(group_size=4, wandb_name="managed_group", max_token_length=64)
        # A bare config, as many return.
        return env_config, APIServerConfig(
            model_name="m", base_url="http://localhost:9001/v1", api_key="x", server_type="vllm"
        )

    async def setup(self):
        self.iter = 0

    async def get_next_item(self) -> Item:
        self.iter += 1
        return {"question": f"What is {self.iter} + 2?", "answer": str(self.iter + 2)}

    async def collect_trajectories(self, item) -> tuple[ScoredDataGroup | None, list[Item]]:
        messages = [{"role": "user", "content": item["question"]}]
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            completion = await managed.chat_completion(
                messages=messages,
                n=self.config.group_size,
                max_tokens=self.config.max_token_length,
                temperature=0.7,
                top_p=1.0,
            )
            state = managed.get_state()
            nodes = state["nodes"]
        group = ScoredDataGroup()
        group["tokens"] = []
        group["masks"] = []
        group["scores"] = []
        group["inference_logprobs"] = []
        for choice, node in zip(completion.choices, nodes):
            reward = choice.message.content == item["answer"]
            self.percent_correct_buffer.append(reward)
            group["tokens"].append(node.tokens)
            group["masks"].append(node.masked_tokens)
            group["inference_logprobs"].append(node.logprobs)
            group["scores"].append(1.0 if reward else -1.0)
        group["generation_params"] = {"temperature": 0.7}
        # Keys that no group knows have always been ignored.
        group["ground_truths"] = [item["answer"]] * len(nodes)
        return group, []

    async def evaluate(self, *args, **kwargs):
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            completion = await managed.chat_completion(
                messages=[{"role": "user", "content": "What is 3 + 3?"}],
                n=1,
                max_tokens=8,
                temperature=0.0,
                split="eval",
            )
        await self.evaluate_log({"eval/right": float(completion.choices[0].message.content == "6")})


if __name__ == "__main__":
    ManagedGroupEnv.cli()
