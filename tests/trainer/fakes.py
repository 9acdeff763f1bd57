"""FAKE rollout server and engines for tests: in memory, no network, no language."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from atroposlib.errors import AtroposError, FencedError, NoBatchError
from atroposlib.wire.columns import Group, build_group
from atroposlib.wire.models import RunInfo, RunRequest
from trainer.config.grpo import GRPOConfig

VOCABULARY = 32
REWARDED_TOKEN = 7


def tiny_llama(seed: int = 0, *, attn_implementation: str = "sdpa", tie: bool = True) -> Any:
    """A random Llama of 2 layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        attn_implementation=attn_implementation,
    )
    return LlamaForCausalLM(config)


def a_config(run_dir: Path, **options: Any) -> GRPOConfig:
    defaults: dict[str, Any] = {
        "model_name_or_path": "test/tiny-llama",
        "run_dir": str(run_dir),
        "batch_size": 8,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "save_strategy": "no",
        "max_tokens_per_micro_batch": 24,
        "logprob_chunk_size": 5,
        "optim": "adamw_torch",
    }
    return GRPOConfig(**{**defaults, **options})


def a_group(
    group_id: str,
    *,
    rewards: Sequence[float] = (1.0, 0.0),
    completions: Sequence[Sequence[int]] = ((7, 3), (4, 5, 6)),
    prompt: Sequence[int] = (1, 2),
    logprob: float = -1.0,
    version: int = 0,
    **facts: Any,
) -> Group:
    """A group whose completions are given as token ids."""
    return build_group(
        group_id=group_id,
        env_id=0,
        tokens=[[*prompt, *completion] for completion in completions],
        loss_masks=[[0] * len(prompt) + [1] * len(completion) for completion in completions],
        inference_logprobs=[[0.0] * len(prompt) + [logprob] * len(completion) for completion in completions],
        versions=[[(-1, len(prompt)), (version, len(completion))] for completion in completions],
        scores=list(rewards),
        **facts,
    )


def random_groups(step: int, *, sequences: int, group_size: int = 4, version: int | None = None) -> list[Group]:
    """Groups of a step, the same whenever asked. The reward is the share of REWARDED_TOKEN in the completion."""
    generator = np.random.default_rng(step)
    groups = []
    for g in range(sequences // group_size):
        completions = [
            generator.integers(1, VOCABULARY, size=generator.integers(2, 9)).tolist() for _ in range(group_size)
        ]
        for completion in completions[::2]:
            completion[0] = REWARDED_TOKEN
        groups.append(
            a_group(
                f"step{step}-group{g}",
                rewards=[completion.count(REWARDED_TOKEN) / len(completion) for completion in completions],
                completions=completions,
                prompt=generator.integers(1, VOCABULARY, size=generator.integers(1, 5)).tolist(),
                logprob=-float(np.log(VOCABULARY)),
                version=step if version is None else version,
            )
        )
    return groups


@dataclass
class FakeRolloutServer:
    """Serves random_groups and remembers what the trainer said. Outlives its clients."""

    sequences: int = 8
    batches: Callable[[int], list[Group]] | None = None
    policy_version: int = -1
    committed_step: int = 0
    acknowledged_step: int = 0
    session: int = 0
    waits_until: Callable[[int], bool] = lambda step: True
    events: list[tuple[Any, ...]] = field(default_factory=list)
    on_lease: Callable[[int], None] = lambda step: None

    def client(self) -> FakeClient:
        return FakeClient(self)

    def said(self, *kinds: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] in kinds]


class FakeClient:
    """The trainer's side of a FakeRolloutServer, with the methods of RolloutClient."""

    def __init__(self, server: FakeRolloutServer) -> None:
        self.server = server

    async def open_run(self, request: RunRequest) -> RunInfo:
        self.server.session += 1
        self.server.events.append(("open", request.run_name))
        return RunInfo(
            run_id="run-id",
            run_name=request.run_name,
            session=self.server.session,
            policy_version=self.server.policy_version,
            committed_step=self.server.committed_step,
            acknowledged_step=self.server.acknowledged_step,
            request=request,
        )

    async def renew_trainer(self, session: int) -> None:
        self._check(session)
        self.server.events.append(("renew",))

    async def lease(self, step: int, *, session: int, deadline_s: float) -> list[Group]:
        self._check(session)
        self.server.events.append(("lease", step))
        self.server.on_lease(step)
        if not self.server.waits_until(step):
            await asyncio.sleep(min(0.05, deadline_s))
            raise NoBatchError(f"no batch for step {step}", waiting_for="no environment is registered")
        if self.server.batches is not None:
            return self.server.batches(step)
        return random_groups(step, sequences=self.server.sequences)

    async def ack(self, step: int, *, session: int, policy_version: int | None) -> None:
        self._check(session)
        self.server.events.append(("ack", step, policy_version))
        self.server.acknowledged_step = max(self.server.acknowledged_step, step + 1)
        self.server.policy_version = max(self.server.policy_version, policy_version or -1)

    async def commit(self, step: int, *, session: int) -> None:
        self._check(session)
        self.server.events.append(("commit", step))
        self.server.committed_step = step

    async def publish_policy(self, policy_version: int, *, session: int) -> None:
        self._check(session)
        self.server.events.append(("policy", policy_version))
        self.server.policy_version = max(self.server.policy_version, policy_version)

    async def close(self) -> None:
        return None

    def _check(self, session: int) -> None:
        if session != self.server.session:
            raise FencedError("another trainer took the run over")


@dataclass(frozen=True)
class FakeResult:
    version: int
    failed: tuple[str, ...] = ()


class FakePublisher:
    """One FAKE engine that takes weights while `is_up`."""

    def __init__(self) -> None:
        self.is_up = True
        self.published: list[int] = []
        self.weights: dict[str, Tensor] = {}
        self.checks = 0
        self.is_closed = False

    def attach(self) -> None:
        self._reach()

    def publish(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> FakeResult:
        self._reach()
        self.published.append(version)
        self.weights = {name: tensor.clone() for name, tensor in weights}
        return FakeResult(version)

    def ensure_current(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> FakeResult:
        self.checks += 1
        return self.publish(version, weights)

    def close(self) -> None:
        self.is_closed = True

    def _reach(self) -> None:
        if not self.is_up:
            raise AtroposError("the engine is down")
