"""Pictures: content parts in the messages, base64 images beside the group."""

# ruff: noqa: C409  (written as its users write)

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Item, ScoredDataGroup

# One red pixel.
IMAGE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="


class PicturesEnv(BaseEnv):
    name = "pictures"

    @classmethod
    def config_init(cls):
        return BaseEnvConfig(group_size=4, wandb_name="pictures", include_messages=True), [
            APIServerConfig(model_name="m", base_url="http://localhost:9001/v1", api_key="x")
        ]

    async def setup(self):
        self.iter = 0

    async def get_next_item(self) -> Item:
        self.iter += 1
        parts = [
            {"type": "text", "text": f"Never mind the picture. What is {self.iter} + 4?"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGE}"}},
        ]
        return tuple([{"role": "user", "content": parts}]), str(self.iter + 4), IMAGE

    async def collect_trajectories(self, item: Item):
        chat, answer, image = item
        completions = await self.server.chat_completion(messages=list(chat), n=self.config.group_size, max_tokens=16)
        prompt = self.tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
        prompt_ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        group = ScoredDataGroup(tokens=[], masks=[], scores=[], images=[], messages=[])
        for choice in completions.choices:
            ids = self.tokenizer.encode(choice.message.content + self.tokenizer.eos_token, add_special_tokens=False)
            group["tokens"].append(prompt_ids + ids)
            group["masks"].append([-100] * len(prompt_ids) + ids)
            group["scores"].append(1.0 if choice.message.content == answer else -1.0)
            group["images"].append(image)
            group["messages"].append([*chat, {"role": "assistant", "content": choice.message.content}])
        return group, []

    async def evaluate(self, *args, **kwargs):
        await self.evaluate_log({"eval/pictures": 1.0})


if __name__ == "__main__":
    PicturesEnv.cli()
