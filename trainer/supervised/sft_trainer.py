"""Supervised fine-tuning: the model learns the completions of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from trainer.supervised import preparation
from trainer.supervised.config import SFTConfig
from trainer.supervised.dataset_trainer import DatasetTrainer, Optimizers
from trainer.supervised.objectives import CrossEntropy
from trainer.supervised.preparation import Rows


class SFTTrainer(DatasetTrainer):
    """Trains on rows of any of the five supervised forms; see atroposlib.data.chats.

    The loss is the mean negative logprob over the learnt tokens of an optimizer step, on all ranks.

    Args:
        config: every option.
        model: a causal language model in memory, instead of config.model_name_or_path.
        tokenizer: instead of the model's own.
        train_dataset, eval_dataset: rows, instead of those of config.data.
        callbacks: of transformers.
        optimizers: an optimizer and a schedule, each instead of what config names; None for that.
    Raises:
        ConfigError: the model cannot be trained here.
        DataError: the rows cannot be read, or not one can be trained on.
    """

    args: SFTConfig

    def __init__(
        self,
        config: SFTConfig,
        *,
        model: Any = None,
        tokenizer: Any = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: Optimizers = (None, None),
    ) -> None:
        preparation.start(config)
        tokenizer = preparation.tokenizer_of(config, tokenizer)
        policy = preparation.policy_of(config, model, tokenizer)
        data = preparation.data_of(config, tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset)
        preparation.check_best(config, data)
        super().__init__(
            policy,
            config,
            tokenizer=tokenizer,
            examples=data.examples,
            held_out=data.held_out,
            objective=CrossEntropy(),
            facts=data.facts,
            callbacks=callbacks,
            optimizers=optimizers,
        )
