"""Rows of a supervised data set as groups: no inference at all, weight -1, one flat advantage a row, groups of any size."""

from atroposlib.envs.base import BaseEnv, BaseEnvConfig, Item, OpenaiConfig, ScoredDataGroup
from atroposlib.utils.tokenize_for_trainer import tokenize_for_trainer

ROWS = [(f"What is {i} + {i}?", str(2 * i)) for i in range(64)]


class SFTConfig(BaseEnvConfig):
    rows_per_group: int = 2
    is_completion: bool = False


class SFTRowsEnv(BaseEnv):
    name = "sft_rows"
    env_config_cls = SFTConfig

    @classmethod
    def config_init(cls):
        env_config = SFTConfig(
            wandb_name="sft_rows",
            group_size=4,
            inference_weight=-1.0,
            ensure_scores_are_not_same=False,
            max_num_workers=2,
        )
        return env_config, [OpenaiConfig(model_name="none", base_url="http://localhost:9/v1", api_key="x")]

    async def setup(self):
        self.row = 0

    async def get_next_item(self) -> Item:
        rows = [ROWS[(self.row + i) % len(ROWS)] for i in range(self.config.rows_per_group)]
        self.row += len(rows)
        return rows

    async def collect_trajectories(self, item: Item):
        group = ScoredDataGroup(tokens=[], masks=[], scores=[], advantages=[], messages=[], overrides=[])
        for question, answer in item:
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out = tokenize_for_trainer(self.tokenizer, chat, train_on_all_assistant_turns=True)
            group["tokens"].append(out["tokens"])
            group["masks"].append(out["masks"])
            group["scores"].append(1.0)
            group["advantages"].append(1)
            group["messages"].append(question + answer if self.config.is_completion else chat)
            group["overrides"].append({"sft": True})
        group["group_overrides"] = {"sft": True}
        return group, []

    async def evaluate(self, *args, **kwargs):
        pass


if __name__ == "__main__":
    SFTRowsEnv.cli()
