"""One rank of a training run on the fake server; arguments: OUT_DIR key=value ..."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from tests.trainer.fakes import FakePublisher, FakeRolloutServer, a_config, tiny_llama
from trainer.grpo_trainer import GRPOTrainer
from trainer.weight_sync.config import WeightSyncConfig


def main(arguments: Sequence[str]) -> None:
    out_dir, *options = arguments
    values = {key: yaml.safe_load(text) for key, _, text in (option.partition("=") for option in options)}
    server = FakeRolloutServer()
    if int(os.environ.get("RANK", "0")) > 0:
        server.session = 1  # each rank has a fake of its own; rank 0 opens session 1
    stop_before = values.pop("stop_before", None)
    publisher = FakePublisher()
    if "weight_sync" in values:
        values["weight_sync"] = WeightSyncConfig(**values["weight_sync"])
    config = a_config(Path(out_dir), max_steps=2, **values)
    # A model in a folder is loaded by the trainer: with ZeRO-3, piece by piece into its shards.
    lm = tiny_llama() if config.model_name_or_path == "test/tiny-llama" else None
    trainer = GRPOTrainer(config, model=lm, connect=server.client, publisher=publisher)
    if stop_before is not None:
        server.on_lease = lambda step: trainer.request_stop("test") if step + 1 == stop_before else None
    trainer.train()
    if publisher.weights:
        # What the engine got, for the test to compare.
        torch.save(publisher.weights, Path(out_dir) / "engine.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
