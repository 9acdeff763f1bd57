"""code_execution: the tests decide, by values alone; what the code does is the policy's doing, what the sandbox does is not."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from atroposlib.errors import ConfigError
from environments.code_execution import CodeExecutionConfig, CodeExecutionEnv, sandbox
from environments.code_execution import env as code_env
from environments.code_execution.env import FIELDS, SAMPLE, extract_code, passed, same, task_of
from environments.code_execution.sandbox import Execution, Limits, execute
from environments.rows import load_rows
from tests.environments.running import Stand, alternating
from tests.processes import RolloutServerProcess

ROWS = load_rows(SAMPLE, fields={**FIELDS, "solution": str})


def block(code: str) -> str:
    return f"Here it is.\n```python\n{code}```\nDone."


def solve(question: str) -> str:
    [row] = [row for row in ROWS if question.startswith(row["task"])]
    return block(row["solution"])


@pytest.fixture
def stand(bytes_tokenizer: str) -> Stand:
    policy = alternating(solve, lambda question: block("import sys\nsys.exit(0)\n"))
    return Stand(CodeExecutionEnv, policy, bytes_tokenizer, group_size=2, sandboxes=2)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```\nor\n```py\nb\n```", "b\n"),
        ("def f(): pass", None),
        ("```python\nnever closed", None),
        ("", None),
    ],
)
def test_the_last_block_is_the_code(text: str, code: str | None) -> None:
    assert extract_code(text) == code


@pytest.mark.parametrize(
    ("expected", "found"), [(1, 1), (1.0, 1), (0.1 + 0.2, 0.3), ([1, {"a": None}], [1, {"a": None}]), ("x", "x")]
)
def test_equal_values(expected: Any, found: Any) -> None:
    assert same(expected, found)


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        *((1, True), (True, 1), (1, 2), (2**60, 2**60 + 1), ("1", 1), (None, False), (1.0, float("nan"))),
        *((2.0, 10**400), (10**400, 2.0), ([2.0], [-(10**400)])),
        *(([1], [1, 2]), ({"a": 1}, {"b": 1}), ([], {})),
    ],
)
def test_other_values(expected: Any, found: Any) -> None:
    assert not same(expected, found)


async def test_every_solution_of_the_sample_passes_its_tests() -> None:
    for row in ROWS:
        task = task_of(row)
        execution = await execute(row["solution"], task.function, task.calls, Limits(wall_s=15))
        assert passed(task, execution) == len(task.expected), (row["task"], execution)


def test_the_model_sees_two_tests_and_not_the_others() -> None:
    task = task_of({"task": "t", "function": "f", "tests": [{"args": [i], "expected": 10 * i} for i in range(3)]})

    assert "f(1) == 10" in str(task.messages)
    assert "f(2)" not in str(task.messages)


@pytest.mark.parametrize("tests", [[], ["assert f() == 1"], [{"expected": 1}], [{"args": 3}]])
def test_tests_of_another_form_are_refused(tests: list[Any]) -> None:
    with pytest.raises(ConfigError, match="list of"):
        task_of({"task": "t", "function": "f", "tests": tests})


async def test_process(stand: Stand, tmp_path: Path) -> None:
    groups = await stand.processed(tmp_path / "groups.jsonl")

    assert [group["scores"] for group in groups] == [[1.0, 0.0]] * 2


async def test_serve(stand: Stand, rollout_server: RolloutServerProcess, tmp_path: Path) -> None:
    batch = await stand.leased(rollout_server, tmp_path / "run")

    assert [group.scores.tolist() for group in batch] == [[1.0, 0.0]] * 2


async def test_evaluate(stand: Stand, tmp_path: Path) -> None:
    metrics, samples = await stand.evaluated(tmp_path)

    assert metrics["heldout_reward"] == 1.0
    assert 0 < metrics["heldout_size"] == len(samples) < len(ROWS)


async def test_check_env_finds_nothing(stand: Stand) -> None:
    assert await stand.check() == []


async def test_share_pays_for_the_tests_that_pass() -> None:
    config = CodeExecutionConfig(tokenizer_name=None, reward="share")
    env = CodeExecutionEnv(config, CodeExecutionEnv.config_init()[1])
    await env.setup()
    tests = [{"args": [i], "expected": i} for i in range(4)]
    task = task_of({"task": "t", "function": "f", "tests": tests})

    assert await env.pay(task, block("def f(i): return i if i < 3 else 1 / 0\n")) == 0.75
    assert await env.pay(task, "no code") == 0.0
    await env.aclose()


@pytest.mark.parametrize(
    ("has_namespaces", "landlock", "needs_isolation", "outcome"),
    [
        *((True, 4, True, ""), (True, 4, False, ""), (True, 0, False, ""), (False, 4, False, "")),
        *(
            (False, 0, False, "warns"),
            (False, 0, True, "refuses"),
            (True, 0, True, "refuses"),
            (False, 4, True, "refuses"),
        ),
    ],
)
async def test_a_kernel_without_isolation_is_told_of_or_refused(
    has_namespaces: bool,
    landlock: int,
    needs_isolation: bool,
    outcome: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def trial(*args: Any) -> Execution:
        return Execution((), has_namespaces=has_namespaces, landlock=landlock)

    monkeypatch.setattr(code_env, "execute", trial)
    config = CodeExecutionConfig(tokenizer_name=None, needs_isolation=needs_isolation)
    env = CodeExecutionEnv(config, CodeExecutionEnv.config_init()[1])

    with pytest.raises(ConfigError, match="needs_isolation") if outcome == "refuses" else nullcontext():
        await env.setup()
    await env.aclose()

    assert ("neither namespaces nor Landlock" in caplog.text) == (outcome == "warns")


async def test_a_sandbox_that_fails_pays_nobody_nothing(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = sandbox._start
    starts: list[int] = []

    async def start(folder: str, limits: Limits) -> Any:
        starts.append(1)
        if len(starts) == 2:  # the first is setup's trial
            raise sandbox.SandboxError("no more processes")
        return await real(folder, limits)

    monkeypatch.setattr(sandbox, "_start", start)
    stand.settings |= {"group_size": 3, "min_valid_per_group": 2}

    [group] = await stand.processed(tmp_path / "groups.jsonl", groups=1)

    assert len(group["scores"]) == 2
