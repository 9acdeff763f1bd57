"""reasoning_tasks: any task by name, paid by its own rule, and never trained on what is held out."""

from __future__ import annotations

import inspect
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from atroposlib.envs.cli import main
from atroposlib.errors import ConfigError
from environments.reasoning_tasks import Problem, ReasoningTasksConfig, ReasoningTasksEnv
from environments.reasoning_tasks.problems import EVALUATED_BY, TaskMix, extract_answer, score
from tests.environments.running import Stand, alternating
from tests.processes import RolloutServerProcess

EVALUATION = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")
EVALUATE_THEIR_OWN = {"basic_arithmetic", "bitwise_arithmetic", "codeio", "number_sorting", "propositional_logic"}
"""Looked through: what they evaluate is their own problem, or `parse_expr` is a parser of their own."""
GENERATORS = {"generators_00_49.py", "generators_50_99.py"}
"""They make problems, and see no answers."""
TASKS = ["chain_sum", "gcd"]
SETTINGS = {"tasks": TASKS, "eval_size": 6, "problems_per_task": 200}


def solve(question: str) -> str:
    """Right for both tasks: a sum, or a greatest common divisor."""
    numbers = [int(number) for number in re.findall(r"-?\d+", question.partition(":")[2])]
    if "GCD" in question:
        return f"<answer>{max(d for d in range(1, 2000) if all(n % d == 0 for n in numbers))}</answer>"
    expression = re.search(r"-?\d+(?: [-+] \d+)+", question)
    assert expression is not None
    return f"so <answer> {eval(expression[0])} </answer>"  # the generator's own arithmetic


@pytest.fixture
def stand(bytes_tokenizer: str) -> Stand:
    policy = alternating(solve, lambda question: "<answer>no idea</answer>")
    return Stand(ReasoningTasksEnv, policy, bytes_tokenizer, group_size=2, **SETTINGS)


async def an_env(**settings: Any) -> ReasoningTasksEnv:
    config = ReasoningTasksConfig(tokenizer_name=None, **{**SETTINGS, **settings})
    env = ReasoningTasksEnv(config, ReasoningTasksEnv.config_init()[1])
    await env.setup()
    return env


@pytest.mark.parametrize(
    ("text", "answer"),
    [("<answer>1</answer> no <answer>\n2 </answer>", "2"), ("<answer>1", None), ("1", None), ("<answer></answer>", "")],
)
def test_the_last_answer_counts(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


async def test_tasks_come_by_turns_in_an_order_that_the_seed_decides() -> None:
    async def first(seed: int) -> list[Problem]:
        env = await an_env(seed=seed)
        problems = [await env.get_next_item() for _ in range(6)]
        await env.aclose()
        return [problem for problem in problems if problem is not None]

    assert [problem.task for problem in await first(1)] == TASKS * 3
    assert await first(1) == await first(1)
    assert await first(1) != await first(2)


async def test_no_held_out_question_is_trained_on() -> None:
    # So small a space that the two streams meet all the time.
    options = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
    env = await an_env(tasks=["chain_sum"], task_options=options, eval_size=60, problems_per_task=300)

    drawn = [await env.get_next_item() for _ in range(100)]
    await env.aclose()

    assert not {problem.question for problem in drawn if problem} & env.heldout_questions


async def test_where_every_question_is_held_out_there_is_nothing_to_train_on() -> None:
    options = {"coin_flip": {"min_trials": 3, "max_trials": 3}}
    env = await an_env(tasks=["coin_flip"], task_options=options, eval_size=50, problems_per_task=20)
    env.heldout_questions = {env.mix.problem(index).question for index in range(20)}

    assert await env.get_next_item() is None
    await env.aclose()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"tasks": ["leg_countin"]}, "leg_counting"),
        ({"task_options": {"gcd": {"max_numberz": 2}}}, "max_numberz"),
        ({"task_options": {"gcd": {"min_value": -2}}}, "refuses"),
        ({"task_options": {"lcm": {}}}, "not among"),
    ],
)
async def test_mistakes_in_the_options_are_named(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        await an_env(**settings)


def test_partial_credit_is_the_tasks_own_and_may_be_switched_off() -> None:
    mix = TaskMix(["letter_counting", "prime_factorization"], {}, seed=1, size=4)
    letters, factors = mix.problem(0), mix.problem(1)

    assert score(letters.task, {}, letters.entry, f"<answer>{letters.entry['answer']}</answer>") == 1.0
    assert score(letters.task, {}, letters.entry, str(letters.entry["answer"])) == 0.0, "the answer must be marked"
    assert score(factors.task, {}, factors.entry, "<answer>[[</answer>") == 0.0, "its rule cannot read that, and raises"


async def test_exact_pays_nothing_for_a_part() -> None:
    env = await an_env(tasks=["prime_factorization"], is_exact=True)
    problem = env.mix.problem(0)
    right = problem.entry["answer"]
    part = right.partition(" ")[0] + " \u00d7 97"

    assert 0 < score(problem.task, {}, problem.entry, f"<answer>{part}</answer>") < 1
    assert [await env.pay(problem, f"<answer>{text}</answer>") for text in (right, part)] == [1.0, 0.0]
    await env.aclose()


def test_the_table_of_tasks_that_evaluate_answers_is_that_of_the_installed_package() -> None:
    names_by_module = defaultdict(set)
    for name, (kind, _) in DATASETS.items():
        names_by_module[Path(inspect.getfile(kind))].add(name)
    root = Path(reasoning_gym.__file__).parent
    evaluating = {path for path in root.rglob("*.py") if EVALUATION.search(path.read_text(encoding="utf-8"))}
    found = {name for path in evaluating for name in names_by_module[path]}

    assert found | {"composite"} == set(EVALUATED_BY) | EVALUATE_THEIR_OWN
    assert {path.name for path in evaluating if not names_by_module[path]} == GENERATORS


@pytest.mark.parametrize("task", ["n_queens", "countdown"])
async def test_the_policy_s_text_does_not_run_as_code_unless_that_is_allowed(task: str, tmp_path: Path) -> None:
    place = tmp_path / "ran"
    exploit = f"<answer>__import__('pathlib').Path({str(place)!r}).touch() or [['Q']]</answer>"
    settings = {"tasks": [task], "eval_size": 1, "problems_per_task": 4}

    with pytest.raises(ConfigError, match="allows_eval"):
        await an_env(**settings)
    env = await an_env(**settings, allows_eval=True)
    assert await env.pay(env.mix.problem(0), exploit) < 1
    await env.aclose()

    assert place.exists(), "else the exploit is none, and the refusal not shown to be needed"


async def test_rules_run_in_a_process_that_can_be_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    text = f"<answer>__import__('pathlib').Path({str(told)!r}).write_text(str(__import__('os').getpid()))</answer>"
    env = await an_env(tasks=["n_queens"], eval_size=1, problems_per_task=4, allows_eval=True)
    await env.pay(env.mix.problem(0), text)
    await env.aclose()

    assert int(told.read_text()) != os.getpid()


async def test_process(stand: Stand, tmp_path: Path) -> None:
    groups = await stand.processed(tmp_path / "groups.jsonl")

    assert [group["scores"][0] for group in groups] == [1.0, 1.0]
    assert all(group["scores"][1] < 0.1 for group in groups)


async def test_serve(stand: Stand, rollout_server: RolloutServerProcess, tmp_path: Path) -> None:
    batch = await stand.leased(rollout_server, tmp_path / "run")

    assert [group.scores.tolist()[0] for group in batch] == [1.0, 1.0]


async def test_evaluate(stand: Stand, tmp_path: Path) -> None:
    metrics, samples = await stand.evaluated(tmp_path)

    assert metrics == {"heldout_reward": 1.0, "heldout_size": 6} | {f"heldout_reward/{task}": 1.0 for task in TASKS}
    assert [sample["task"] for sample in samples] == TASKS * 3


async def test_check_env_finds_nothing(stand: Stand) -> None:
    assert await stand.check() == []


def test_tasks_and_their_options_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = '{"gcd": {"max_value": 9}}'

    main(ReasoningTasksEnv, ["serve", "--dry-run", "--tasks", "gcd", "chain_sum", "--task_options", options])

    assert "max_value: 9" in capsys.readouterr().out
