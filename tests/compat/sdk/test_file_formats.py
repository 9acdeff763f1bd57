"""Files that old environments write and other tools read: groups, pages, evaluations, checkpoints; and a job's servers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from atroposlib.envs.base import APIServerConfig, ServerBaseline, ServerManager
from atroposlib.envs.eval import evaluate_log
from atroposlib.frontend.jsonl2html import create_html_for_group, generate_html, get_score_class
from tests.compat.sdk.old_env import OldConfig, OldEnv, a_group

# Groups


async def test_a_line_holds_what_the_environment_set_and_five_nulls(tmp_path: Path) -> None:
    env = OldEnv.make(data_path_to_save_groups=str(tmp_path / "deep" / "groups.jsonl"))

    await env.handle_send_to_api(a_group(0.0, 1.0, messages=[[{"role": "user", "content": "é"}]] * 2))

    [line] = (tmp_path / "deep" / "groups.jsonl").read_text(encoding="utf-8").splitlines()
    group = json.loads(line)
    nulls = {"ref_logprobs", "overrides", "group_overrides", "distill_token_ids", "distill_logprobs"}
    assert set(group) == {"tokens", "masks", "scores", "messages"} | nulls
    assert {name for name in group if group[name] is None} == nulls
    assert "env_id" not in group
    assert (group["scores"], group["messages"][0][0]["content"]) == ([0.0, 1.0], "é")
    await env.aclose()


async def test_existing_files_are_left_alone_and_the_config_names_the_one_in_use(tmp_path: Path) -> None:
    for name in ("groups.jsonl", "groups_1.jsonl"):
        (tmp_path / name).write_text("old\n")
    env = OldEnv.make(data_path_to_save_groups=str(tmp_path / "groups.jsonl"))

    await env.handle_send_to_api(a_group(0.0, 1.0))

    assert env.config.data_path_to_save_groups == str(tmp_path / "groups_2.jsonl")
    assert (tmp_path / "groups.jsonl").read_text() == "old\n"
    assert len((tmp_path / "groups_2.jsonl").read_text().splitlines()) == 1
    await env.aclose()


async def test_a_dropped_group_is_not_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    env = OldEnv.make(data_path_to_save_groups=str(path))

    await env.handle_send_to_api([a_group(1.0, 1.0), a_group(0.0, 1.0)])

    assert [json.loads(line)["scores"] for line in path.read_text().splitlines()] == [[0.0, 1.0]]
    await env.aclose()


# The page


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_page_stands_beside_its_file_and_shows_texts_and_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "**bold** and `code`"}]
    source = write_lines(
        tmp_path / "groups.jsonl",
        {"messages": ["plain text", chat], "scores": [1.0, -1.0]},
        "{broken",
        {"scores": [1.0]},
    )

    generate_html(str(source))

    page = (tmp_path / "groups.html").read_text()
    assert "plain text" in page
    assert "<strong>bold</strong>" in page
    assert "user" in page
    assert ("reward-positive" in page, "reward-negative" in page) == (True, True)


def test_a_page_goes_where_it_is_asked_for(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "g.jsonl", {"messages": ["x"], "scores": [0.0]})

    generate_html(str(source), str(tmp_path / "page.html"))

    assert "reward-zero" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(("score", "name"), [(1, "reward-positive"), (0, "reward-zero"), (-0.5, "reward-negative")])
def test_the_class_of_a_score(score: float, name: str) -> None:
    assert get_score_class(score) == name


def test_the_longer_of_messages_and_scores_is_cut() -> None:
    block = create_html_for_group({"messages": ["one", "two", "three"], "scores": [1.0, 0.0]}, 0)

    assert ("two" in block, "three" in block) == (True, False)


def test_a_missing_file_is_exit_status_1(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_info:
        generate_html(str(tmp_path / "none.jsonl"))

    assert exit_info.value.code == 1


# Evaluations


def check_metrics(folder: Path, *, task: str, model: str, parameters: dict[str, Any]) -> None:
    text = (folder / "metrics.json").read_text()
    report = json.loads(text)
    assert text.startswith('{\n  "config_general"')
    seconds = report["config_general"].pop("total_evaluation_time_seconds")
    assert isinstance(seconds, str)
    assert float(seconds) == pytest.approx(5.0)
    assert report == {
        "config_general": {"model_name": model, "generation_parameters": parameters},
        "results": {f"atropos|{task}|0": {"accuracy": 0.5}, "all": {"accuracy": 0.5}},
    }


async def test_the_files_of_an_environments_evaluation(tmp_path: Path) -> None:
    env = OldEnv.make(data_dir_to_save_evals=str(tmp_path), max_token_length=99)
    env.server.servers[0].config.model_name = "served"

    for samples in ([{"q": 1}, {"q": 2}], [{"q": 3}]):
        await env.evaluate_log(
            {"accuracy": 0.5}, start_time=10.0, end_time=15.0, generation_parameters={"temperature": 0.0},
            samples=samples, verbose=False,
        )  # fmt: skip

    check_metrics(tmp_path, task="old_eval", model="served", parameters={"max_new_tokens": 99, "temperature": 0.0})
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [{"q": 3}], (
        "overwritten"
    )


async def test_without_samples_there_is_no_samples_file(tmp_path: Path) -> None:
    env = OldEnv.make(data_dir_to_save_evals=str(tmp_path))

    await env.evaluate_log({"accuracy": 0.5}, "task", "model", samples=[], verbose=False)

    assert os.listdir(tmp_path) == ["metrics.json"]


def test_the_function_writes_the_same_form(tmp_path: Path) -> None:
    evaluate_log({"accuracy": 0.5}, str(tmp_path), "task", "model", 10.0, 15.0, {"temperature": 1.0}, verbose=False)

    check_metrics(tmp_path, task="task", model="model", parameters={"temperature": 1.0})


# Checkpoints


def saving_env(folder: Path, step: int, prepend: str) -> OldEnv:
    env = OldEnv.make()
    env.checkpoint_dir, env.wandb_prepend, env.curr_step = str(folder), prepend, step
    return env


def test_a_checkpoint_is_a_flat_json_object_under_the_name_of_the_environment(tmp_path: Path) -> None:
    saving_env(tmp_path, 5, "old_0").save_checkpoint(5, {"iter": 7, "seen": [1]})

    path = tmp_path / "env_checkpoints" / "old_0" / "step-5.json"
    assert json.loads(path.read_text()) == {"iter": 7, "seen": [1]}


def test_without_data_nothing_is_written(tmp_path: Path) -> None:
    saving_env(tmp_path, 5, "old_0").save_checkpoint(5)

    assert list(tmp_path.iterdir()) == []


def test_every_key_becomes_an_attribute(tmp_path: Path) -> None:
    saving_env(tmp_path, 5, "old_0").save_checkpoint(5, {"iter": 7})
    env = saving_env(tmp_path, 5, "old_0")

    env.load_checkpoint()

    assert env.iter == 7  # type: ignore[attr-defined]


# A SLURM job

JOB = {"SLURM_JOB_NODELIST": "n[1-3]", "NUM_TRAINING_NODES": "1"}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A job of three nodes on a machine without scontrol."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("INFER_TP", raising=False)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def urls_of(manager: ServerManager) -> list[str | None]:
    return [server.config.base_url for server in manager.servers]


TEMPLATE = [APIServerConfig(base_url="http://template/v1", model_name="m")]


@pytest.mark.parametrize(
    ("tp", "ports"), [(None, range(9000, 9008)), ("4", range(9000, 9002)), ("8", range(9000, 9001))]
)
def test_each_node_beyond_the_training_nodes_has_servers(tp: str | None, ports: range, job: pytest.MonkeyPatch) -> None:
    if tp is not None:
        job.setenv("INFER_TP", tp)

    manager = ServerManager(TEMPLATE, slurm=True)

    assert urls_of(manager) == [f"http://{node}:{port}/v1" for node in ("n2", "n3") for port in ports]
    assert {server.config.model_name for server in manager.servers} == {"m"}, "the first config is the template"


@pytest.mark.usefixtures("job")
def test_a_baseline_needs_no_flag_and_a_list_does() -> None:
    assert len(ServerManager(ServerBaseline()).servers) == 16
    assert urls_of(ServerManager(TEMPLATE)) == ["http://template/v1"]


def test_a_job_of_one_node_changes_nothing(job: pytest.MonkeyPatch) -> None:
    job.setenv("SLURM_JOB_NODELIST", "n1")

    assert urls_of(ServerManager(TEMPLATE, slurm=True)) == ["http://template/v1"]
    assert len(ServerManager(ServerBaseline()).servers) == 4


def test_an_environment_hands_slurm_over(job: pytest.MonkeyPatch) -> None:
    job.setenv("INFER_TP", "8")

    env = OldEnv(OldConfig(), TEMPLATE, True)

    assert urls_of(env.server) == ["http://n2:9000/v1", "http://n3:9000/v1"]
