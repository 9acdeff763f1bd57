"""One rank of a run whose rank 1 runs out of memory in its first step; arguments: OUT_DIR key=value ..."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from atroposlib.errors import AtroposError
from tests.trainer.fakes import FakePublisher, FakeRolloutServer, a_config, tiny_llama
from trainer.grpo_trainer import GRPOTrainer

TOO_MUCH = 2**60
"""Bytes: more than an address space."""


def greedy(lm: Any) -> Any:
    """The model, in whose every pass an allocation fails from now on."""
    lm.base_model.register_forward_hook(lambda *_: torch.empty(TOO_MUCH, dtype=torch.uint8))
    return lm


def main(arguments: Sequence[str]) -> int:
    out_dir, *options = arguments
    values = {key: yaml.safe_load(text) for key, _, text in (option.partition("=") for option in options)}
    rank = int(os.environ["RANK"])
    server = FakeRolloutServer()
    server.session = 1 if rank > 0 else 0  # each rank has a fake of its own; rank 0 opens session 1
    lm = tiny_llama()
    trainer = GRPOTrainer(a_config(Path(out_dir), **values), model=lm, connect=server.client, publisher=FakePublisher())
    if rank == 1:
        greedy(lm)
    try:
        trainer.train()
    except AtroposError as error:
        print(f"rank {rank} ends: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        print(f"rank {rank} is left alone: {error}", file=sys.stderr, flush=True)
        return 3
    return 0
