"""Our step has the loss and gradient of TRL's GRPOTrainer on the same rollouts, and differs where and as we say.

The values were written by `python -m benchmarks.trainer_losses`, which takes a step with TRL for each case.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atroposlib.wire.columns import Group, build_group
from tests.trainer.gradient_worker import Layout, step_of
from tests.trainer.mixed_batch import sharp_llama
from tests.trainer.plain_reference import Answer, logprobs_of, plain_step

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("trl_losses.json").read_text(encoding="utf-8"))
SEQUENCES: list[dict[str, Any]] = GOLDEN["sequences"]
SIZE: int = GOLDEN["group_size"]
TOLERANCE = 1e-5

_BASE = {
    "advantage_scale": "group_std",
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "correction": "none",
    "overlong": "keep",
}
_GRPO = {**_BASE, "loss_aggregation": "sequence_mean"}
_DAPO = {**_BASE, "loss_aggregation": "token_mean"}
_K3 = {"beta": 0.04, "kl_estimator": "k3"}
# TRL measures the ratio from old_per_token_logps, which the benchmark has set to the engine's logprobs there.
_FROM_ENGINE = {"correction": "bypass"}

OURS: dict[str, dict[str, Any]] = {
    "grpo": {**_GRPO, **_K3},
    "grpo_accumulated": _GRPO,
    "grpo_clipped": {**_GRPO, **_FROM_ENGINE},
    # One micro batch: there the mean over the tokens of the micro batch is that over the batch.
    "bnpo": _DAPO,
    "dapo": {**_DAPO, "epsilon_high": 0.28},
    "dapo_clipped": {**_DAPO, **_FROM_ENGINE, "epsilon_high": 0.28},
    # delta caps the ratio, which tells only where the advantage is negative: there it is the dual clip.
    "dapo_two_sided": {**_DAPO, **_FROM_ENGINE, "dual_clip_c": 1.4},
    "dapo_accumulated": _DAPO,
    "dapo_truncated_masked": {**_DAPO, **_K3, "overlong": "mask"},
    "dapo_entropy_and_temperature": {**_DAPO, "entropy_coef": 0.05, "temperature": 0.7},
    "dr_grpo": {
        "loss_type": "dr_grpo", "epsilon_high": 0.2, **_FROM_ENGINE, "overlong": "keep",
        "max_completion_length": GOLDEN["max_completion_length"],
    },
    # TRL has cispo's cap in epsilon_high: an upper bound of the ratio, not of its distance from 1.
    "cispo": {**_DAPO, **_FROM_ENGINE, "loss_type": "cispo", "cispo_cap": 1.4},
    "gspo": {**_GRPO, **_FROM_ENGINE, "loss_type": "gspo", "epsilon_low": 0.1, "epsilon_high": 0.15},
    "token_truncate": {**_DAPO, "correction": "tis", "is_cap": 1.5},
    "token_mask": {**_DAPO, "correction": "mis", "mis_low": 0.6, "mis_high": 1.6},
    "sequence_truncate": {**_DAPO, "correction": "seq_tis", "is_cap": 1.5},
}  # fmt: skip
DIFFERENT = {"grpo_bias_corrected_kl", "scaled_by_batch", "sequence_mask"}


def groups(*, advantages: list[np.ndarray[Any, Any]] | None = None) -> list[Group]:
    """TRL's batch as ours.

    Args:
        advantages: for each sequence, those of its completion's tokens, instead of what follows from the rewards.
    """
    found = []
    for start in range(0, len(SEQUENCES), SIZE):
        part = SEQUENCES[start : start + SIZE]
        prompt = len(part[0]["prompt_ids"])
        facts: dict[str, Any] = {}
        if advantages is not None:
            own = [np.concatenate([np.zeros(prompt), each]) for each in advantages[start : start + SIZE]]
            facts["advantages"] = np.concatenate(own).astype(np.float32)
        found.append(
            build_group(
                group_id=f"group{start}",
                env_id=0,
                tokens=[each["prompt_ids"] + each["completion_ids"] for each in part],
                loss_masks=[[0] * prompt + [1] * len(each["completion_ids"]) for each in part],
                inference_logprobs=[[0.0] * prompt + each["logprobs"] for each in part],
                versions=[[(-1, prompt), (0, len(each["completion_ids"]))] for each in part],
                scores=[each["reward"] for each in part],
                ref_logprobs=np.array([x for each in part for x in [0.0] * prompt + each["ref_logprobs"]], dtype=np.float32),
                finish_reasons=tuple(
                    "stop" if each["completion_ids"][-1] == GOLDEN["eos"] else "length" for each in part
                ),
                **facts,
            )
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("trl") / "model"
    sharp_llama().save_pretrained(folder)
    # transformers collects garbage after each run: without all that is imported, that is quick.
    gc.freeze()
    yield folder
    gc.unfreeze()


def our_step(run_dir: Path, model_dir: Path, options: dict[str, Any], batch: list[Group] | None = None) -> Answer:
    return step_of(run_dir, model_dir, batch or groups(), "torch", Layout(24), **options)


def norms_of(answer: Answer) -> dict[str, float]:
    return {name: float(gradient.double().norm()) for name, gradient in answer.gradients.items()}


def assert_is_trls(answer: Answer, case: str, *, times: float = 1.0) -> None:
    trl = GOLDEN["cases"][case]["found"]
    # TRL's mean over sequences of unit-variance advantages is 0 where the ratios are 1: hence the absolute part.
    assert answer.loss * times == pytest.approx(trl["loss"], rel=TOLERANCE, abs=1e-6)
    norms = {name: norm * times for name, norm in norms_of(answer).items()}
    assert norms == pytest.approx(trl["parameter_norms"], rel=TOLERANCE)


@pytest.mark.parametrize("case", OURS)
def test_a_step_is_trls(case: str, tmp_path: Path, model_dir: Path) -> None:
    assert_is_trls(our_step(tmp_path, model_dir, OURS[case]), case)


def test_every_case_of_trl_is_compared() -> None:
    assert OURS.keys() | DIFFERENT == GOLDEN["cases"].keys()


def test_trl_divides_by_the_deviation_of_rewards_and_we_by_that_of_centred_rewards(
    tmp_path: Path, model_dir: Path
) -> None:
    """scale_rewards=batch: how far groups lie apart is in TRL's deviation, so that hard and easy prompts dim all others."""
    rewards = np.array([each["reward"] for each in SEQUENCES]).reshape(-1, SIZE)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    ratio = (centred.std() + 1e-6) / (rewards.std(ddof=1) + 1e-4)

    ours = our_step(tmp_path, model_dir, {**_DAPO, "advantage_scale": "batch_std"})

    assert ratio < 0.99
    assert_is_trls(ours, "scaled_by_batch", times=ratio)


def test_trl_masks_sequences_by_the_product_of_ratios_and_we_by_their_geometric_mean(
    tmp_path: Path, model_dir: Path
) -> None:
    """sequence_mask: a product grows with the length, so that TRL leaves long sequences out first."""
    lm = sharp_llama()
    weights, advantages = [], []
    for start in range(0, len(SEQUENCES), SIZE):
        part = SEQUENCES[start : start + SIZE]
        rewards = np.array([each["reward"] for each in part])
        advantages.extend((rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4))
    for each in SEQUENCES:
        ids, length = each["prompt_ids"] + each["completion_ids"], len(each["completion_ids"])
        own = logprobs_of(lm, ids, temperature=1.0)[0].detach().numpy()[-length:]
        product = float(np.exp((own - np.array(each["logprobs"])).sum()))
        weights.append(product if product <= 1.35 else 0.0)
    weighted = [
        np.full(len(each["completion_ids"]), a * w) for each, a, w in zip(SEQUENCES, advantages, weights, strict=True)
    ]

    as_trl = our_step(tmp_path / "weighted", model_dir, _DAPO, groups(advantages=weighted))
    ours = our_step(tmp_path / "ours", model_dir, {**_DAPO, "correction": "seq_mis", "mis_high": 1.35, "mis_low": 0.0})

    assert 0.0 in weights
    assert_is_trls(as_trl, "sequence_mask")
    assert ours.loss != pytest.approx(as_trl.loss, rel=0.01)


def test_trl_weighs_k3_by_the_ratio_and_we_do_not(tmp_path: Path, model_dir: Path) -> None:
    """use_bias_correction_kl, on by default since TRL 1.16: k3 times the ratio is unbiased away from the sampling policy."""
    options = {**_GRPO, **_FROM_ENGINE, "beta": 0.3, "kl_estimator": "k3"}

    as_trl = plain_step(sharp_llama(), groups(), {**options, "kl_times_ratio": True})
    ours = our_step(tmp_path, model_dir, options)

    assert_is_trls(as_trl, "grpo_bias_corrected_kl")
    assert ours.loss != pytest.approx(as_trl.loss, rel=0.01)
