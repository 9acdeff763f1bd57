"""What the section `trainer` of a config refuses: keys that would not do there what they say."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from atroposlib.launch.trainer_section import TrainerSection

FOUR = {"batch_size": 8, "max_steps": 2, "max_staleness": 1, "learning_rate": 1e-6}


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ({"recipe": "dapo"}, "recipe=dapo"),
        ({"run": "dapo"}, "run=dapo"),
        ({"trainer": "grpo"}, "trainer=grpo"),
        ({"data": "on_policy"}, "data=on_policy"),
        ({"reward": "group_std"}, "reward=group_std"),
        ({"model": "qwen3_8b"}, "model=qwen3_8b"),
        ({"recipe@_global_": "dapo"}, "recipe@_global_=dapo"),
        ({"+override /recipe@_global_": "dapo"}, "+override /recipe@_global_=dapo"),
        ({"args": {"trainer.recipe": "dapo"}}, "trainer.recipe=dapo"),
    ],
)
def test_a_preset_stands_beside_the_keys_that_it_may_choose(keys: dict[str, Any], shown: str) -> None:
    assert TrainerSection.model_validate({**keys, **FOUR}).batch_size == 8

    for name in FOUR:
        given = {key: value for key, value in FOUR.items() if key != name}
        with pytest.raises(ValidationError) as caught:
            TrainerSection.model_validate({**keys, **given})
        assert f"{shown} may choose {name} too" in str(caught.value)
        assert f"give trainer.{name} beside it" in str(caught.value)


@pytest.mark.parametrize("keys", [{"bf16": True}, {"trainer": {"bf16": True}}, {"recipe": None}, {"data_seed": "a"}])
def test_other_keys_leave_the_defaults(keys: dict[str, Any]) -> None:
    assert TrainerSection.model_validate(keys).batch_size == 64


@pytest.mark.parametrize("method", ["sft", "gkd"])
def test_a_method_without_servers_is_refused_with_its_own_command(method: str) -> None:
    with pytest.raises(ValidationError, match=f"run atropos-trainer method={method} model_name_or_path=FOLDER"):
        TrainerSection.model_validate({"method": method})


def test_grpo_is_what_the_section_is_for() -> None:
    assert TrainerSection.model_validate({"method": "grpo"}).model_extra == {"method": "grpo"}
