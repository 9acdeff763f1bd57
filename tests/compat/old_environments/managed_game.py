"""managed_server over several turns: a guessing game, group_size games side by side, one sequence each."""

import asyncio

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Item, ScoredDataGroup, ScoredDataItem

MAX_TURNS = 3


class ManagedGameConfig(BaseEnvConfig):
    secret: int = 7


class ManagedGameEnv(BaseEnv):
    name = "managed_game"
    env_config_cls = ManagedGameConfig

    @classmethod
    def config_init(cls) -> tuple[ManagedGameConfig, list[APIServerConfig]]:
        return cls.env_config_cls(group_size=4, wandb_name="managed_game"), [
            APIServerConfig(model_name="m", base_url="http://localhost:9001/v1", api_key="x", server_type="vllm"),
            APIServerConfig(model_name="m", base_url="http://localhost:9002/v1", api_key="x", server_type="vllm"),
        ]

    async def setup(self):
        self.games = 0

    async def get_next_item(self) -> Item:
        self.games += 1
        return {"secret": self.config.secret, "game": self.games}

    async def play(self, item) -> ScoredDataItem:
        messages = [{"role": "user", "content": f"Guess a number from 1 to 9. This is game {item['game']}."}]
        score = 0.0
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            for _ in range(MAX_TURNS):
                completion = await managed.chat_completion(messages=messages, n=1, max_tokens=16, temperature=1.0)
                guess = completion.choices[0].message.content
                messages.append({"role": "assistant", "content": guess})
                if guess == str(item["secret"]):
                    score = 1.0
                    break
                hint = "higher" if int(guess) < item["secret"] else "lower"
                messages.append({"role": "user", "content": hint})
            [node] = managed.get_state()["nodes"]
        return ScoredDataItem(
            tokens=node.tokens,
            masks=node.masked_tokens,
            scores=score,
            inference_logprobs=node.logprobs,
            messages=messages,
        )

    async def collect_trajectories(self, item) -> tuple[ScoredDataGroup, list[Item]]:
        games = await asyncio.gather(*[self.play(item) for _ in range(self.config.group_size)])
        keys = ("tokens", "masks", "scores", "inference_logprobs", "messages")
        return ScoredDataGroup(**{key: [game[key] for game in games] for key in keys}), []

    async def evaluate(self, *args, **kwargs):
        games = await asyncio.gather(*[self.play({"secret": 7, "game": -1}) for _ in range(4)])
        await self.evaluate_log({"eval/won": sum(game["scores"] for game in games) / len(games)})


if __name__ == "__main__":
    ManagedGameEnv.cli()
