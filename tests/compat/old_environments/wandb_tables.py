"""Tables of its own in Weights & Biases: everything of chat_group, and the three hooks of the tables."""

import wandb
from chat_group import ChatGroupEnv

from atroposlib.type_definitions import Item


class WandbTablesEnv(ChatGroupEnv):
    name = "wandb_tables"

    async def create_rollout_table(self, wandb_metrics):
        if len(self.rollouts_for_wandb) > 0:
            table = wandb.Table(columns=["text", "score", "expected_answer"])
            for group in self.rollouts_for_wandb:
                for item in group:
                    table.add_data(item[0], item[1], item[2])
            wandb_metrics["train/rollouts"] = table
        self.rollouts_for_wandb = []
        return wandb_metrics

    async def add_rollouts_for_wandb(self, scored_data, item: Item = None):
        num_keep = self.config.num_rollouts_per_group_for_logging
        if num_keep == -1:
            num_keep = self.config.group_size
        self.rollouts_for_wandb.append(
            [
                (self.tokenizer.decode(scored_data["tokens"][i]), scored_data["scores"][i], item["answer"])
                for i in range(num_keep)
            ]
        )
        if len(self.rollouts_for_wandb) > self.config.num_rollouts_to_keep:
            self.rollouts_for_wandb.pop(0)

    async def wandb_log(self, wandb_metrics=None):
        wandb_metrics = wandb_metrics or {}
        wandb_metrics["train/seen"] = self.iter
        await super().wandb_log(wandb_metrics)


if __name__ == "__main__":
    WandbTablesEnv.cli()
