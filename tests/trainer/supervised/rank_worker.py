"""One rank of a run on a data set; arguments: sft|gkd OUT_DIR key=value ..."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from tests.trainer.supervised.fakes import HELD_OUT, ROWS, gkd_config, sft_config, tiny_model, tokenizer
from trainer.supervised.gkd_trainer import GKDTrainer
from trainer.supervised.sft_trainer import SFTTrainer


def main(arguments: Sequence[str]) -> None:
    method, out_dir, *options = arguments
    run(method, Path(out_dir), options)


def run(method: str, out_dir: Path, options: Sequence[str]) -> None:
    """Two steps, in this process."""
    values = {key: yaml.safe_load(text) for key, _, text in (option.partition("=") for option in options)}
    common = {"batch_size": 8, "max_steps": 2, "optim": "adamw_torch", "max_tokens_per_micro_batch": 70, **values}
    # A model in a folder is loaded by the trainer: with ZeRO-3, piece by piece into its shards.
    lm = None if "model_name_or_path" in values else tiny_model()
    data = {"tokenizer": tokenizer(), "train_dataset": ROWS, "eval_dataset": HELD_OUT}
    if method == "sft":
        SFTTrainer(sft_config(out_dir, **common), model=lm, **data).train()
        return
    teacher = tiny_model(1)
    GKDTrainer(
        gkd_config(out_dir, **common),
        model=lm,
        teacher_model=teacher,
        teacher_processing_class=tokenizer(),
        **data,
    ).train()
