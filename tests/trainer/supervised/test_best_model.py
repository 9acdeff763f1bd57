"""The best checkpoint: only a run that is over takes it, and it must be there and have been measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from atroposlib.errors import ConfigError
from tests.trainer.supervised.fakes import ROWS
from tests.trainer.supervised.test_gkd_trainer import a_trainer as a_gkd_trainer
from tests.trainer.supervised.test_sft_trainer import StopAfter, a_trainer, lines_of, weights_of
from trainer.errors import CheckpointError
from trainer.supervised import dataset_trainer

# So large a rate that the weights of the best step are not nearly those of the last.
BIG_STEPS: dict[str, Any] = {
    "max_steps": 6, "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.3,
}  # fmt: skip
PROMPTS = [{"prompt": f"say {word}", "ground_truth": word} for word in "abcd"]
SILENT = [{"prompt": "say a"}]


def test_a_run_that_was_stopped_saves_the_weights_of_its_step_not_the_best(tmp_path: Path) -> None:
    a_trainer(tmp_path / "whole", **BIG_STEPS).train()
    a_trainer(tmp_path / "cut", callbacks=[StopAfter(5)], **BIG_STEPS).train()
    a_trainer(tmp_path / "cut", **BIG_STEPS).train()

    assert [line["step"] for line in lines_of(tmp_path / "cut") if "eval_loss" in line] == [2, 4, 6]
    whole, cut = (weights_of(tmp_path / run / "checkpoints" / "checkpoint-6") for run in ("whole", "cut"))
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_best_checkpoint_that_is_gone_names_the_way_on(tmp_path: Path) -> None:
    class Lose(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                shutil.rmtree(state.best_model_checkpoint)

    with pytest.raises(CheckpointError, match="load_best_model_at_end=false"):
        a_trainer(tmp_path, callbacks=[Lose()], **{**BIG_STEPS, "max_steps": 2}).train()


def test_a_final_model_that_cannot_be_written_is_known_to_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def together(do: Callable[[], Any], *, ranks: int) -> Any:
        try:
            return do()
        except Exception as error:
            told.append(f"{ranks}: {error}")
            raise

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset_trainer, "together", together)
    trainer = a_trainer(tmp_path, max_steps=1)
    monkeypatch.setattr(trainer, "save_model", full)

    with pytest.raises(CheckpointError):
        trainer.train()

    assert [text.split(" could")[0] for text in told] == ["1: the final model"]


@pytest.mark.parametrize(
    ("metric", "held_out", "fix"),
    [
        ("eval_success_rate", SILENT, "give metric_for_best_model=eval_avg_tokens, or load_best_model_at_end=false"),
        ("eval_success_rate", ROWS[:1], "give metric_for_best_model=eval_loss, or"),
        ("eval_loss", PROMPTS, "give metric_for_best_model=eval_success_rate, or"),
    ],
    ids=["no-truth", "no-truth-but-replies", "no-replies"],
)
def test_a_best_checkpoint_by_what_nobody_measures_is_refused_at_start(
    tmp_path: Path, metric: str, held_out: list[dict[str, Any]], fix: str
) -> None:
    with pytest.raises(ConfigError, match=f"metric_for_best_model={metric} is measured on .*{fix}"):
        gkd_run(tmp_path, metric, held_out)


@pytest.mark.parametrize(("metric", "held_out"), [("eval_avg_tokens", SILENT), ("success_rate", PROMPTS)])
def test_prompts_alone_can_choose_the_best_checkpoint(
    tmp_path: Path, metric: str, held_out: list[dict[str, Any]]
) -> None:
    gkd_run(tmp_path, metric, held_out).train()

    assert (tmp_path / "final").is_dir()


def test_where_no_best_is_chosen_no_figure_has_to_be_measured(tmp_path: Path) -> None:
    gkd_run(tmp_path, "eval_loss", PROMPTS, load_best_model_at_end=False).train()

    assert any("eval_avg_tokens" in line for line in lines_of(tmp_path))


def gkd_run(run_dir: Path, metric: str, held_out: list[dict[str, Any]], **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "eval_on_start": False,
    }  # fmt: skip
    return a_gkd_trainer(run_dir, metric_for_best_model=metric, eval_dataset=held_out, **{**defaults, **options})
