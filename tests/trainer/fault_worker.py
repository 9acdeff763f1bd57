"""One rank of a run with troubles; arguments: OUT_DIR key=value ...

Besides options of the trainer: poisoned_step=N has advantages too large for float32, level_step=N equal rewards,
starved_rank=R gets no batch, full_disk_step=N lets rank 0 write no file over full_disk_bytes=B after that step. OUT_DIR/versions.pt has the
weights of each version that was published.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from atroposlib.errors import AtroposError
from atroposlib.wire.columns import Group
from tests.trainer.fakes import FakeRolloutServer, a_config, random_groups, tiny_llama
from tests.trainer.in_memory import RememberingPublisher
from trainer.grpo_trainer import GRPOTrainer


def groups_of(step: int, *, poisoned_step: int | None, level_step: int | None) -> list[Group]:
    groups = random_groups(step, sequences=8)
    if step == poisoned_step:
        huge = np.full(groups[0].n_tokens, 3e38, dtype=np.float32)
        return [Group(**{**vars(groups[0]), "advantages": huge}), *groups[1:]]
    if step == level_step:
        return [Group(**{**vars(group), "scores": np.ones(group.n_sequences)}) for group in groups]
    return groups


def _fill_disk(size_bytes: int, *, is_full: bool) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes if is_full else hard, hard))


def main(arguments: Sequence[str]) -> int:
    out_dir, *options = arguments
    values = {key: yaml.safe_load(text) for key, _, text in (option.partition("=") for option in options)}
    rank = int(os.environ.get("RANK", "0"))
    troubles = {name: values.pop(name, None) for name in ("poisoned_step", "level_step")}
    is_starved = values.pop("starved_rank", None) == rank
    server = FakeRolloutServer(
        batches=lambda step: groups_of(step, **troubles), waits_until=lambda step: not is_starved or step < 1
    )
    server.session = 1 if rank > 0 else 0  # each rank has a fake of its own; rank 0 opens session 1
    full_disk_step = values.pop("full_disk_step", None)
    full_disk_bytes = values.pop("full_disk_bytes", 0)
    server.on_lease = lambda step: _fill_disk(full_disk_bytes, is_full=step == full_disk_step) if rank == 0 else None
    publisher = RememberingPublisher()
    trainer = GRPOTrainer(
        a_config(Path(out_dir), **values), model=tiny_llama(), connect=server.client, publisher=publisher
    )
    try:
        trainer.train()
    except AtroposError as error:
        print(f"rank {rank} ends: {error}", file=sys.stderr, flush=True)
        return 2
    if rank == 0:
        torch.save(publisher.versions, Path(out_dir) / "versions.pt")
    return 0
