"""The sums: checked by the answer alone, and never trained on what is held out."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from reasoning_gym.utils import compute_decimal_reward

from atroposlib.envs import tokenizers
from atroposlib.envs.base import APIServerConfig
from atroposlib.testing.byte_tokenizer import save_byte_tokenizer
from atroposlib.testing.mock_inference import MockInferenceServer
from environments.chain_sum import ChainSumConfig, ChainSumEnv, Problem, heldout_problems, reward, training_problems

PROBLEM = Problem(question="State: 5 - 42 =", expression="5 - 42", answer=-37)


@pytest.mark.parametrize("right", ["-37", " -37", " -37\n", "-037"])
def test_the_right_number_pays_one(right: str) -> None:
    assert reward(PROBLEM, right) == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "37",
        "- 37",
        "-37.",
        "-37 or 4",
        "= -37",
        "-38",
        "the answer is -37",
        "-37-37",
        "\u221237",
        "-3\u0667",
        pytest.param("9" * 5000, id="huge"),
    ],
)
def test_anything_else_pays_nothing(wrong: str) -> None:
    assert reward(PROBLEM, wrong) == 0.0


def test_what_pays_is_right_by_reasoning_gym_too() -> None:
    for problem in islice(training_problems(ChainSumConfig()), 200):
        assert (
            reward(problem, f" {problem.answer}")
            == compute_decimal_reward(f" {problem.answer}", str(problem.answer))
            == 1.0
        )
        assert reward(problem, str(problem.answer + 1)) == 0.0


def test_the_held_out_set_is_fixed_and_has_no_repetitions() -> None:
    first, second = heldout_problems(ChainSumConfig(seed=1)), heldout_problems(ChainSumConfig(seed=2))

    assert first == second
    assert len({problem.question for problem in first}) == 200


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_held_out_question_is_trained_on(seed: int) -> None:
    config = ChainSumConfig(seed=seed)
    heldout = {problem.question for problem in heldout_problems(config)}

    assert not heldout & {problem.question for problem in islice(training_problems(config), 3000)}


def test_the_seed_decides_the_order() -> None:
    def first(seed: int) -> list[str]:
        return [problem.question for problem in islice(training_problems(ChainSumConfig(seed=seed)), 20)]

    assert first(3) == first(3)
    assert first(3) != first(4)


@pytest.fixture
def tokenizer_name(tmp_path: Path) -> Any:
    yield save_byte_tokenizer(tmp_path / "tokenizer")
    tokenizers.load_tokenizer.cache_clear()


async def test_a_group_and_an_evaluation_against_the_mock(tokenizer_name: str, tmp_path: Path) -> None:
    tokenizer = tokenizers.load_tokenizer(tokenizer_name)

    def solve(prompt: list[int], index: int) -> list[int]:
        """Right for even choices, wrong for odd ones."""
        expression = tokenizer.decode(prompt).rsplit("assistant\n", 1)[1].removesuffix(" =")
        return [*tokenizer.encode(f" {eval(expression) + index % 2}"), tokenizer.eos_token_id]  # our own arithmetic

    async with MockInferenceServer(solve, weight_version="5") as engine:
        config = ChainSumConfig(
            group_size=4,
            eval_size=10,
            tokenizer_name=tokenizer_name,
            max_tokens=8,
            data_dir_to_save_evals=str(tmp_path / "evals"),
        )
        env = ChainSumEnv(config, [APIServerConfig(base_url=engine.url, server_type="vllm")])
        await env.setup()

        group, _ = await env.collect_trajectories(await env.get_next_item())
        assert len(engine.requests) == 1, "one request a group"
        metrics = await env.evaluate()
        await env.server.close()

    assert group["scores"] == [1.0, 0.0, 1.0, 0.0]
    assert group["finish_reasons"] == ["stop"] * 4
    assert all(runs[-1][0] == 5 for runs in group["policy_versions"] or [])
    assert group["generation_params"] == {"temperature": 1.0, "max_tokens": 8}
    assert all(request["sampling_params"]["temperature"] == 0.0 for request in engine.requests[1:])
    assert metrics["heldout_reward"] == 1.0
    assert json.loads((tmp_path / "evals" / "metrics.json").read_text())["results"]["all"]["heldout_reward"] == 1.0
    assert len((tmp_path / "evals" / "samples.jsonl").read_text().splitlines()) == 10
