"""evaluate: items at once, a journal for those that are finished, files, and evaluations without an environment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs.cli import main
from atroposlib.envs.eval import EvalBase, eval_runner, evaluate_log, openai_url, pass_at_k
from atroposlib.envs.eval_items import evaluate_items
from atroposlib.errors import RolloutError
from tests.envs.test_cli import TaskEnv


async def test_results_stand_in_the_order_of_the_items_and_no_more_run_than_allowed() -> None:
    running = peak = 0

    async def score(item: int) -> int:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.01 / (1 + item))
        running -= 1
        return item * item

    assert await evaluate_items(range(9), score, max_workers=3, progress=False) == [i * i for i in range(9)]
    assert peak == 3


class Scorer:
    """Fails from the item `fails_at` on."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.asked = fails_at, list[int]()

    async def __call__(self, item: int) -> dict[str, int]:
        self.asked.append(item)
        if self.fails_at is not None and item >= self.fails_at:
            raise KeyError("broken")
        return {"score": item}


async def interrupted(journal: Path, *, key: str = "", at: int = 3) -> None:
    with pytest.raises(ExceptionGroup):
        await evaluate_items(range(5), Scorer(at), journal_path=journal, max_workers=1, run_key=key, progress=False)


async def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    journal = tmp_path / "math.journal.jsonl"
    await interrupted(journal)
    with journal.open("a") as file:
        file.write('{"item": 3, "res')

    scorer = Scorer()
    results = await evaluate_items(range(5), scorer, journal_path=journal, progress=False)

    assert results == [{"score": item} for item in range(5)]
    assert sorted(scorer.asked) == [3, 4]
    assert not journal.exists(), "the next evaluation starts anew"


async def test_a_second_interruption_keeps_what_both_finished(tmp_path: Path) -> None:
    journal = tmp_path / "math.journal.jsonl"
    await interrupted(journal, at=2)
    await interrupted(journal, at=4)

    scorer = Scorer()
    await evaluate_items(range(5), scorer, journal_path=journal, progress=False)
    assert scorer.asked == [4]


@pytest.mark.parametrize(("key", "items"), [("policy 2", range(5)), ("policy 1", range(1, 6))])
async def test_a_journal_counts_only_for_the_same_items_and_policy(tmp_path: Path, key: str, items: range) -> None:
    journal = tmp_path / "math.journal.jsonl"
    await interrupted(journal, key="policy 1")

    scorer = Scorer()
    await evaluate_items(items, scorer, journal_path=journal, run_key=key, progress=False)
    assert sorted(scorer.asked) == list(items)


@pytest.mark.parametrize("failure", [RolloutError("no server"), ExceptionGroup("two", [RolloutError("no server")] * 2)])
async def test_infrastructure_failures_are_tried_again_and_never_become_a_result(failure: Exception) -> None:
    tries = 0

    async def score(item: int) -> int:
        nonlocal tries
        tries += 1
        raise failure

    with pytest.raises(ExceptionGroup) as caught:
        await evaluate_items([1], score, progress=False)
    assert caught.group_contains(RolloutError)
    assert tries == 3


class Resumable(TaskEnv):
    """Evaluates five items; breaks down where the class says so."""

    scorer = Scorer()

    async def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        journal = Path(self.config.data_dir_to_save_evals) / "task.journal.jsonl"
        results = await evaluate_items(range(5), type(self).scorer, journal_path=journal, max_workers=1)
        return {"score": sum(result["score"] for result in results)}


@pytest.mark.parametrize(("flags", "asked"), [(["--resume"], [3, 4]), ([], [0, 1, 2, 3, 4])])
def test_evaluate_goes_on_only_when_asked(flags: list[str], asked: list[int], tmp_path: Path) -> None:
    argv = ["evaluate", "--data_dir_to_save_evals", str(tmp_path)]
    with pytest.raises(ExceptionGroup):
        main(type("Broken", (Resumable,), {"scorer": Scorer(3)}), argv)
    scorer = Scorer()

    main(type("Mended", (Resumable,), {"scorer": scorer}), [*argv, *flags])

    assert scorer.asked == asked
    assert json.loads((tmp_path / "metrics.json").read_text())["results"]["all"] == {"score": 10}


def test_the_configuration_is_there_although_the_evaluation_fails(tmp_path: Path) -> None:
    with contextlib.suppress(ExceptionGroup):
        main(
            type("Broken", (Resumable,), {"scorer": Scorer(0)}), ["evaluate", "--data_dir_to_save_evals", str(tmp_path)]
        )

    assert set(yaml.safe_load((tmp_path / "evaluate_config.yaml").read_text())) >= {"env", "openai", "slurm", "testing"}


@given(data=st.data(), m=st.integers(1, 7))
def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_sample(data: st.DataObject, m: int) -> None:
    c, k = data.draw(st.integers(0, m)), data.draw(st.integers(1, m))
    choices = list(combinations([True] * c + [False] * (m - c), k))

    assert pass_at_k(m, c, k) == pytest.approx(sum(any(choice) for choice in choices) / math.comb(m, k))


def test_pass_at_k_of_too_few_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="k=3"):
        pass_at_k(2, 1, 3)


class Capitals(EvalBase):
    def setup_data(self) -> list[dict[str, str]]:
        return [{"q": "France", "a": "Paris"}, {"q": "Peru", "a": "Lima"}]

    async def run_item(self, server: Any, data_item: Any) -> Any:
        answer = await self.chat_completion(server, [{"role": "user", "content": data_item["q"]}])
        text = answer.choices[0].message.content
        metrics = {"accuracy": float(text == data_item["a"])}
        return (metrics if data_item["q"] == "Peru" else {**metrics, "only_france": 4.0}), [{"text": text}]


class SaysParis:
    """A server manager that answers Paris."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.servers = [type("S", (), {"config": type("C", (), {"model_name": "m"})})]

    async def chat_completion(self, **kwargs: Any) -> Any:
        from openai.types.chat import ChatCompletion

        self.requests.append(kwargs)
        return ChatCompletion.model_validate(
            {
                "id": "x", "object": "chat.completion", "created": 0, "model": "m",
                "choices": [
                    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Paris"}}
                ],
            }
        )  # fmt: skip


async def test_an_evaluation_averages_its_items_and_writes_the_files(tmp_path: Path) -> None:
    server: Any = SaysParis()

    metrics = await Capitals(1, 4, temperature=0.5, eval_dir=str(tmp_path))(server)

    assert metrics == {"accuracy": 0.5, "only_france": 4.0}
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["results"]["atropos|Capitals@1:4|0"] == metrics
    assert report["config_general"]["generation_parameters"] == {
        "temperature": 0.5, "n": 4, "top_p": 1.0, "max_tokens": -1,
    }  # fmt: skip
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2
    assert server.requests[0]["n"] == 4
    assert "max_tokens" not in server.requests[0]


def test_the_log_without_a_folder_prints_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate_log({"accuracy": 0.25}, task_name="capitals")

    assert "| accuracy | 0.2500 |" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given_url", "used"),
    [("http://h:8000", "http://h:8000/v1"), ("http://h:8000/", "http://h:8000/v1"), ("http://h/v1", "http://h/v1")],
)
def test_the_runner_adds_the_path_of_the_routes(given_url: str, used: str) -> None:
    assert openai_url(given_url) == used


async def test_the_runner_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        await eval_runner(Capitals(), ["--help"])

    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--server-url", "--model-name", "http://localhost:8000"))
