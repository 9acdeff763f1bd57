"""The commonest style: one chat request for the whole group, tokenised again; own metrics and checkpoints."""

# ruff: noqa: C408, C419, SIM105  (written as its users write)

import time
from typing import Any, TypedDict

from pydantic import Field

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, EvalHandlingEnum, ScoredDataGroup
from atroposlib.type_definitions import Item, number
from atroposlib.utils.tokenize_for_trainer import tokenize_for_trainer

SYSTEM = "You add numbers. Answer with the number only."


class SumItem(TypedDict):
    question: str
    answer: int


class ChatGroupConfig(BaseEnvConfig):
    bonus: float = Field(default=0.0, description="Added to the score of a right answer.")


class ChatGroupEnv(BaseEnv):
    name = "chat_group"
    env_config_cls = ChatGroupConfig

    def __init__(
        self,
        config: ChatGroupConfig,
        server_configs: list[APIServerConfig],
        slurm=True,
        testing=False,
    ):
        super().__init__(config, server_configs, slurm, testing)
        self.percent_correct_buffer = list()
        self.eval_metrics = list()
        self.rollouts_for_wandb = []
        self.completion_lengths = []

    @classmethod
    def config_init(cls) -> tuple[ChatGroupConfig, list[APIServerConfig]]:
        env_config = ChatGroupConfig(
            tokenizer_name="a-model-that-is-nowhere",
            group_size=8,
            use_wandb=True,
            rollout_server_url="http://localhost:8000",
            total_steps=1000,
            batch_size=12,
            steps_per_eval=100,
            max_token_length=2048,
            wandb_name="chat_group_env",
            eval_handling=EvalHandlingEnum.LIMIT_TRAIN,
            eval_limit_ratio=0.1,
            # Not fields of any config: they have always been ignored.
            score_buffer_size=4,
            start_tok_length=2048,
        )
        server_configs = [
            APIServerConfig(
                model_name="a-model-that-is-nowhere",
                base_url="http://localhost:9001/v1",
                api_key="x",
                num_requests_for_eval=256,
            ),
        ]
        return env_config, server_configs

    async def setup(self):
        self.train = [{"question": f"What is {i} + {i + 1}?", "answer": 2 * i + 1} for i in range(50)]
        self.test = [{"question": f"What is {i} + 100?", "answer": i + 100} for i in range(4)]
        self.iter = 0

    def save_checkpoint(self, step, data=None):
        if data is None:
            data = {}
        data["iter"] = self.iter
        super().save_checkpoint(step, data)

    async def get_next_item(self) -> SumItem:
        next_item = self.train[self.iter % len(self.train)]
        self.iter += 1
        return next_item

    async def collect_trajectories(self, item: SumItem) -> tuple[ScoredDataGroup, list[Item]]:
        user_message = {"role": "user", "content": item["question"]}
        chat_completions = await self.server.chat_completion(
            messages=[{"role": "system", "content": SYSTEM}, user_message],
            n=self.config.group_size,
            max_tokens=self.config.max_token_length,
            temperature=1.0,
        )
        to_score = list()
        to_backlog = list()
        for chat_completion in chat_completions.choices:
            messages = (
                {"role": "system", "content": SYSTEM},
                user_message,
                {"role": "assistant", "content": chat_completion.message.content},
            )
            to_score.append(
                {
                    "messages": messages,
                    "gold_answer": item["answer"],
                    "finish_reason": chat_completion.finish_reason,
                }
            )
        to_postprocess = await self.score(to_score)
        return to_postprocess, to_backlog

    async def score(self, rollout_group_data) -> ScoredDataGroup | None:
        scores = ScoredDataGroup()
        scores["tokens"] = list()
        scores["masks"] = list()
        scores["scores"] = list()
        for item in rollout_group_data:
            reward = item["messages"][-1]["content"] == str(item["gold_answer"])
            out_dict = tokenize_for_trainer(self.tokenizer, item["messages"], finish_reason=item["finish_reason"])
            tokens = out_dict["tokens"]
            masks = out_dict["masks"]
            # remove obviously bad examples
            if len([1 for i in masks if i != -100]) < 2:
                continue
            scores["tokens"].append(tokens)
            scores["masks"].append(masks)
            scores["scores"].append(1.0 + self.config.bonus if reward else -1.0)
            if len(scores["tokens"]) >= self.config.group_size:
                break
        for score in scores["scores"]:
            self.percent_correct_buffer.append(max(score, 0))
        if all([score == 1 for score in scores["scores"]]):
            return None
        return scores

    async def rollout_and_score_eval(self, question: str, answer: int) -> number:
        completion = await self.server.chat_completion(
            messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
            n=1,
            max_tokens=self.config.max_token_length,
            temperature=0.0,
            split="eval",
        )
        return 1 if completion.choices[0].message.content == str(answer) else 0

    async def evaluate(self, *args, **kwargs):
        start_time = time.time()
        scores = [await self.rollout_and_score_eval(item["question"], item["answer"]) for item in self.test]
        percent_correct = sum(scores) / len(scores)
        self.eval_metrics.append(("eval/percent_correct", percent_correct))
        await self.evaluate_log(
            metrics={"eval/percent_correct": percent_correct},
            start_time=start_time,
            end_time=time.time(),
            generation_parameters={"temperature": 0.0, "max_tokens": self.config.max_token_length},
            samples=[{"question": item["question"]} for item in self.test],
        )

    async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None):
        if wandb_metrics is None:
            wandb_metrics = {}
        try:
            wandb_metrics["train/percent_correct"] = sum(self.percent_correct_buffer) / len(self.percent_correct_buffer)
        except ZeroDivisionError:
            pass
        self.percent_correct_buffer = list()
        for item in self.eval_metrics:
            wandb_metrics[item[0]] = item[1]
        self.eval_metrics = list()
        await super().wandb_log(wandb_metrics)


if __name__ == "__main__":
    ChatGroupEnv.cli()
