"""The completion API: a text prompt, ids by the tokenizer, masks by hand; the old alias of the server's config."""

from atroposlib.envs.base import BaseEnv, BaseEnvConfig, Item, OpenaiConfig, ScoredDataGroup


class TextCompletionEnv(BaseEnv):
    name = "text_completion"

    @classmethod
    def config_init(cls):
        return BaseEnvConfig(group_size=4, wandb_name="text_completion"), [
            OpenaiConfig(model_name="m", base_url="http://localhost:9001/v1", api_key="x")
        ]

    async def setup(self):
        self.iter = 0

    async def get_next_item(self) -> Item:
        self.iter += 1
        return self.iter

    async def collect_trajectories(self, item: Item) -> tuple[ScoredDataGroup, list[Item]]:
        prompt = f"Question: what is {item} + 10?\nAnswer:"
        completions = await self.server.completion(
            prompt=prompt, n=self.config.group_size, max_tokens=16, temperature=1.0, top_p=1.0, stop=["\n"]
        )
        prompt_ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        group = ScoredDataGroup(tokens=[], masks=[], scores=[], messages=None)
        for choice in completions.choices:
            ids = self.tokenizer.encode(choice.text, add_special_tokens=False)
            if choice.finish_reason == "stop":
                ids.append(self.tokenizer.eos_token_id)
            group["tokens"].append(prompt_ids + ids)
            group["masks"].append([-100] * len(prompt_ids) + ids)
            group["scores"].append(float(choice.text.strip() == str(item + 10)))
        group["overrides"] = [{"temperature": 0.5 + i} for i in range(len(group["tokens"]))]
        group["group_overrides"] = None
        return group, []

    async def evaluate(self, *args, **kwargs):
        completion = await self.server.completion(
            prompt="Question: what is 2 + 2?\nAnswer:", n=1, max_tokens=16, temperature=0.0, split="eval"
        )
        return await self.evaluate_log({"eval/right": float(completion.choices[0].text.strip() == "4")})


if __name__ == "__main__":
    TextCompletionEnv.cli()
