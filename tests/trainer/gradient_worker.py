"""Gradients of single steps of GRPOTrainer: in this process, or in one rank of several; argument: OUT_DIR."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from atroposlib.wire.columns import Group
from tests.trainer.fakes import FakeRolloutServer, a_config
from tests.trainer.mixed_batch import mixed_groups
from tests.trainer.plain_reference import Answer
from trainer.grpo_trainer import GRPOTrainer
from trainer.policy.logprobs import PackedPolicy

# Each objective, aggregation, correction, scale and divergence at least once. bypass makes the objective's ratio differ from 1.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "atlas_compat": {
        "loss_type": "reinforce", "advantage_scale": "group_std", "loss_aggregation": "sequence_mean",
        "correction": "none", "beta": 0.04, "kl_estimator": "k3", "overlong": "keep",
    },
    "ppo_dual_clip": {"correction": "bypass", "dual_clip_c": 1.5, "advantage_scale": "loo", "loss_aggregation": "prompt_mean"},
    "dr_grpo": {"loss_type": "dr_grpo", "correction": "bypass", "max_completion_length": 16},
    "gspo": {
        "loss_type": "gspo", "correction": "bypass", "epsilon_low": 0.1, "epsilon_high": 0.1,
        "advantage_scale": "group_std", "loss_aggregation": "sequence_mean",
    },
    "cispo": {"loss_type": "cispo", "correction": "bypass", "cispo_cap": 1.4, "advantage_scale": "batch_std"},
    "dppo": {"loss_type": "dppo", "correction": "bypass", "dppo_low": 0.02, "dppo_high": 0.02},
    "mis": {"correction": "mis", "mis_low": 0.6, "mis_high": 1.6, "loss_aggregation": "sequence_mean", "overlong": "keep"},
    "seq_tis": {"loss_type": "cispo", "correction": "seq_tis", "is_cap": 1.5, "loss_aggregation": "prompt_mean"},
    "seq_mis": {"loss_type": "reinforce", "correction": "seq_mis", "mis_low": 0.9, "mis_high": 1.1},
    "kl_in_reward": {"beta": 0.3, "kl_estimator": "k1", "kl_placement": "reward", "loss_aggregation": "sequence_mean"},
    "own_reference": {"beta": 0.2, "kl_estimator": "k3", "loss_aggregation": "prompt_mean"},
    # Two optimizer steps: the second is off the policy at the start.
    "second_epoch": {"ppo_epochs": 2, "optim": "sgd", "learning_rate": 0.02, "epsilon_low": 0.05, "epsilon_high": 0.05},
    "entropy": {"entropy_coef": 0.05, "beta": 0.1, "kl_estimator": "k2", "temperature": 0.8},
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How the batch is cut into passes."""

    max_tokens: int
    shares_prompts: bool = True
    packs: bool = True
    attention: str = "sdpa"


LAYOUTS = {
    "packed_shared_one": Layout(4096),
    "packed_shared_many": Layout(24),
    "packed_one": Layout(4096, shares_prompts=False),
    "packed_many": Layout(24, shares_prompts=False),
    "unpacked": Layout(4096, packs=False),
    # On a CPU sdpa goes segment by segment; eager takes the mask that other devices have.
    "eager": Layout(4096, attention="eager"),
}
ENGINES = ("torch", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Case:
    """One step to take."""

    engine: str
    setting: str
    layout: str

    def __str__(self) -> str:
        return f"{self.engine}-{self.setting}-{self.layout}"


def cases() -> list[Case]:
    """Of each process: torch with every layout and setting; DeepSpeed with what differs most in how gradients come about."""
    chosen = [Case("torch", "default", layout) for layout in LAYOUTS]
    chosen += [Case("torch", setting, "packed_shared_many") for setting in SETTINGS]
    # transformers keeps what it learnt of DeepSpeed, of ZeRO-3 above all, for the life of the process: ZeRO-3 is last.
    for engine in ENGINES[1:]:
        chosen += [Case(engine, "default", layout) for layout in ("packed_shared_one", "packed_many", "unpacked")]
        chosen += [
            Case(engine, setting, "packed_shared_many") for setting in ("atlas_compat", "own_reference", "entropy")
        ]
    return list(dict.fromkeys(chosen))


class _Catcher(TrainerCallback):  # type: ignore[misc]
    """Copies the gradients when they are complete and before anything is done to them."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer
        self.gradients: dict[str, Tensor] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if not self._trainer.is_deepspeed_enabled:
            return
        engine = self._trainer.accelerator.deepspeed_engine_wrapped.engine
        step = engine.step

        def caught(*args: Any, **kwargs: Any) -> Any:
            # The last pass is followed by the optimizer at once.
            self._catch_split()
            return step(*args, **kwargs)

        engine.step = caught

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if not self._trainer.is_deepspeed_enabled:
            self.gradients = {name: parameter.grad.clone() for name, parameter in self._named()}

    def _catch_split(self) -> None:
        from deepspeed.utils import safe_get_full_grad

        self.gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in self._named()}

    def _named(self) -> Iterator[tuple[str, Any]]:
        named: Iterator[tuple[str, Any]] = self._trainer.model.lm.named_parameters()
        return named


def step_of(run_dir: Path, model_dir: Path, groups: list[Group], engine: str, layout: Layout, **options: Any) -> Answer:
    """Loss and gradient of one step of GRPOTrainer. Every rank calls it."""
    server = FakeRolloutServer(batches=lambda step: groups)
    if int(os.environ.get("RANK", "0")) > 0:
        server.session = 1  # each rank has a fake of its own; rank 0 opens session 1
    config = a_config(
        run_dir,
        model_name_or_path=str(model_dir),
        batch_size=sum(group.n_sequences for group in groups),
        max_steps=1,
        max_tokens_per_micro_batch=layout.max_tokens,
        pack=layout.packs,
        attn_implementation=layout.attention,
        deepspeed=None if engine == "torch" else engine,
        max_grad_norm=1e9,
        **options,
    )
    with _prompt_sharing(is_on=layout.shares_prompts):
        trainer = GRPOTrainer(config, connect=server.client)
        catcher = _Catcher(trainer)
        trainer.add_callback(catcher)
        passes: list[int] = []
        trainer.model.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].numel()))
        loss = trainer.train().training_loss
    return Answer(loss, catcher.gradients, passes=tuple(passes))


@contextmanager
def _prompt_sharing(*, is_on: bool) -> Iterator[None]:
    if is_on:
        yield
        return
    with patch.object(PackedPolicy, "shares_prompts", new=False):
        yield


def main(arguments: Sequence[str]) -> None:
    out_dir = Path(arguments[0])
    model_dir = out_dir / "model"
    groups = mixed_groups(AutoModelForCausalLM.from_pretrained(model_dir))
    # transformers collects garbage after each run: without all that is imported, that is quick.
    gc.freeze()
    found: dict[str, Answer] = {}
    for case in cases():
        run_dir, options, batch = out_dir / "runs" / str(case), SETTINGS[case.setting], groups
        if case.setting == "own_reference":
            # The environment knows nothing of the reference: the trainer scores with a model of its own.
            options = {**options, "ref_model_name_or_path": str(out_dir / "reference")}
            batch = [replace(group, ref_logprobs=None) for group in groups]
        found[str(case)] = step_of(run_dir, model_dir, batch, case.engine, LAYOUTS[case.layout], **options)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save({name: asdict(answer) for name, answer in found.items()}, out_dir / "found.pt")
