"""One rank of a training run on the fake server: `python rank_worker.py OUT_DIR key=value ...`, under torchrun or alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import yaml

# torchrun starts this file as a script; the package of the tests lies two folders up.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.trainer.fakes import FakePublisher, FakeRolloutServer, a_config, tiny_llama
from trainer.grpo_trainer import GRPOTrainer


def main() -> None:
    out_dir, *options = sys.argv[1:]
    values = {key: yaml.safe_load(text) for key, _, text in (option.partition("=") for option in options)}
    server = FakeRolloutServer()
    if int(os.environ.get("RANK", "0")) > 0:
        server.session = 1  # each rank has a fake of its own; rank 0 opens session 1
    stop_before = values.pop("stop_before", None)
    trainer = GRPOTrainer(
        a_config(Path(out_dir), max_steps=2, **values),
        lm=tiny_llama(),
        connect=server.client,
        publisher=FakePublisher(),
    )
    if stop_before is not None:
        server.on_lease = lambda step: trainer.request_stop("test") if step + 1 == stop_before else None
    trainer.train()


if __name__ == "__main__":
    main()
