"""recipe=atlas_compat is the loss of ATLAS, written out in numpy with its derivative by the logprobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atroposlib.wire.columns import Group, build_group
from tests.trainer.fakes import VOCABULARY
from tests.trainer.gradient_worker import Layout, step_of
from tests.trainer.mixed_batch import sharp_llama
from tests.trainer.plain_reference import logprobs_of, relative_error
from trainer.config.compose import load_config

LOSS_OPTIONS = (
    "advantage_scale", "loss_type", "loss_aggregation", "correction", "overlong", "beta", "kl_estimator", "kl_placement",
    "entropy_coef", "num_minibatches", "ppo_epochs", "unbias_log_probabilities",
)  # fmt: skip
REWARDS = ((1.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 0.0), (0.5, 0.5, 0.5, 0.5))
LENGTHS = ((3, 11, 1, 6), (8, 2, 5, 9), (4, 7, 2, 3))
PROMPTS = (4, 7, 2)
TEMPERATURE = 0.7


def atlas_groups(lm: Any) -> list[Group]:
    """Three groups of four, the last without a spread of rewards, one completion cut at the limit."""
    generator = np.random.default_rng(3)
    groups = []
    for g, lengths in enumerate(LENGTHS):
        prompt = generator.integers(1, VOCABULARY, size=PROMPTS[g]).tolist()
        ids = [prompt + generator.integers(1, VOCABULARY, size=length).tolist() for length in lengths]
        own = [logprobs_of(lm, each, temperature=TEMPERATURE)[0].detach().numpy() for each in ids]
        reference = [np.concatenate([[0.0], each + generator.normal(scale=0.4, size=len(each))]) for each in own]
        groups.append(
            build_group(
                group_id=f"group{g}",
                env_id=0,
                tokens=ids,
                loss_masks=[[0] * PROMPTS[g] + [1] * length for length in lengths],
                # ATLAS has no logprobs of the engine: whatever they are, they must not matter.
                inference_logprobs=[[0.0] * PROMPTS[g] + [-9.0] * length for length in lengths],
                versions=[[(-1, PROMPTS[g]), (0, length)] for length in lengths],
                scores=list(REWARDS[g]),
                ref_logprobs=np.concatenate(reference).astype(np.float32),
                finish_reasons=("stop", "length", "stop", "stop"),
                generation_params={"temperature": TEMPERATURE},
            )
        )
    return groups


def test_the_recipe_is_the_formula_of_atlas(tmp_path: Path) -> None:
    lm = sharp_llama()
    lm.save_pretrained(tmp_path / "model")
    groups = atlas_groups(lm)
    config = load_config(None, ["recipe=atlas_compat", f"model_name_or_path={tmp_path / 'model'}"])
    options = {name: getattr(config, name) for name in LOSS_OPTIONS}
    beta, loss, surrogate, sequences = 0.04, 0.0, [], sum(map(len, LENGTHS))
    for g, group in enumerate(groups):
        assert group.ref_logprobs is not None
        rewards = np.array(REWARDS[g])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        for i, length in enumerate(LENGTHS[g]):
            ids = group.tokens[group.cu_seqlens[i] : group.cu_seqlens[i + 1]].tolist()
            lp_tensor = logprobs_of(lm, ids, temperature=TEMPERATURE)[0][-length:]
            lp = lp_tensor.detach().numpy()
            lr = group.ref_logprobs[group.cu_seqlens[i] : group.cu_seqlens[i + 1]][-length:].astype(np.float64)
            kl = np.exp(lr - lp) - (lr - lp) - 1
            ratio = np.exp(lp - lp)
            loss += (-ratio * advantages[i] + beta * kl).mean() / sequences
            by_logprob = (-ratio * advantages[i] + beta * (1 - np.exp(lr - lp))) / length / sequences
            surrogate.append((torch.from_numpy(by_logprob) * lp_tensor).sum())
    torch.stack(surrogate).sum().backward()

    ours = step_of(tmp_path / "run", tmp_path / "model", groups, "torch", Layout(32), **options)

    assert ours.loss == pytest.approx(loss, rel=1e-5)
    assert relative_error(ours.gradients, {name: p.grad for name, p in lm.named_parameters()}) < 1e-5


def test_the_recipe_has_the_weight_of_atlas() -> None:
    assert load_config(None, ["recipe=atlas_compat", "model_name_or_path=org/model"]).beta == 0.04
