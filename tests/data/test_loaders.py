"""The documented data sets: their columns become the rows that training takes, and no prompt holds its solution."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atroposlib.data import DataConfig, load_splits
from atroposlib.data.answers import exact_match, final_answer, ground_truth_of, question_of
from atroposlib.data.presets import PRESETS
from atroposlib.errors import DataError
from tests.data.conftest import Write

GSM8K = {"question": "What is 1 + 2?", "answer": "Three of them: 1 + 2 = 3.\n#### 3"}
META = {"query": "What is one and two?", "response": "It is\nThe answer is: 3", "original_question": "What is 1 + 2?"}
BIG = {"prompt": "The ratio?", "solution": "3:2", "domain": ["Maths"], "source": "s"}
ARC = {
    "problem_text": "What is 1 + 2?",
    "ground_truth": "3",
    "student_approach": "I multiply",
    "teacher_diagnosis": "wrong operation",
    "teacher_teaching": "what does + mean?",
}
ARC_DOCUMENTED = {
    "prompt": "What is 1 + 2?",
    "ground_truth": "3",
    "student_response": "I multiply",
    "teaching": "what does + mean?",
    "problem_id": "p1",
    "student_level": "weak",
    "reward": 0.5,
}


class Hub:
    """Stands in for the `datasets` library."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.rows = rows
        library = ModuleType("datasets")
        library.load_dataset = self.load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", library)

    def load_dataset(self, name: str, config: str | None, **options: Any) -> list[dict[str, Any]]:
        self.asked.append((name, config, options))
        return self.rows


def loaded(preset: str, **over: Any) -> dict[str, Any]:
    row: dict[str, Any] = load_splits(DataConfig.preset(preset, eval_split_ratio=0, **over)).train[0]
    return row


def test_gsm8k_asks_without_the_solution(written: Write) -> None:
    row = loaded("gsm8k_grpo", dataset_path=written([GSM8K]))

    assert row["ground_truth"] == "3"
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["prompt"][1]["content"] == GSM8K["question"]
    assert "Three of them" not in str(row), "nor is it anywhere else"


def test_gsm8k_conversations_end_in_the_final_answer(written: Write) -> None:
    row = loaded("gsm8k_gkd", dataset_path=written([GSM8K]))

    assert row["final_answer"] == "3"
    assert row["messages"][-1] == {
        "role": "assistant",
        "content": "Three of them: 1 + 2 = 3.\nFinal Answer: 3",
    }
    assert "Three" not in str(row["messages"][:-1])


def test_rewordings_of_a_problem_are_one_source(written: Write) -> None:
    rows = [META, {**META, "query": "1 + 2 is?"}]
    first, second = load_splits(
        DataConfig.preset("meta_math_grpo", dataset_path=written(rows), eval_split_ratio=0)
    ).train

    assert first["source_id"] == second["source_id"]
    assert first["prompt"] != second["prompt"]
    assert first["ground_truth"] == "3"


def test_the_answers_of_big_math_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, [BIG])

    row = loaded("big_math_rl")

    assert row["ground_truth"] == "3:2"
    assert hub.asked == [("open-r1/Big-Math-RL-Verified-Processed", "level_4_5", {"split": "train"})]


def test_levels_of_a_file_are_told_by_its_column(written: Write) -> None:
    rows = [{**BIG, "prompt": level, "level": level} for level in ("Level 1", "Level 4", 5, "easy")]
    path = written(rows)

    def levels(wanted: str) -> set[Any]:
        splits = load_splits(DataConfig.preset("big_math_rl", dataset_path=path, dataset_level_filter=wanted))
        return {row["level"] for row in splits.train}

    path = written([{**row, "prompt": str(row["prompt"])} for row in rows])
    assert levels("level_4_5") == {"Level 4", 5}
    assert levels("Easy") == {"easy"}


def test_arc_atlas_reads_the_split_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, [ARC])

    loaded("arc_atlas_rl")
    loaded("arc_atlas_sft", dataset_id_or_path="Arc-Intelligence/Arc-ATLAS-Teach-v1")

    rl, sft = "curriculum/arc_atlas_teach_rl.jsonl", "training/sft.jsonl"
    assert hub.asked == [
        ("Arc-Intelligence/Arc-ATLAS-Teach-v0", None, {"split": "rl", "data_files": {"rl": rl}}),
        ("Arc-Intelligence/Arc-ATLAS-Teach-v1", None, {"split": "sft", "data_files": {"sft": sft}}),
    ]
    with pytest.raises(DataError, match="no dataset_split='test'; there are rl, sft"):
        loaded("arc_atlas_rl", dataset_split="test")


@pytest.mark.parametrize(("row", "diagnosis"), [(ARC, "wrong operation"), (ARC_DOCUMENTED, "")])
def test_arc_atlas_takes_both_sets_of_columns(written: Write, row: dict[str, Any], diagnosis: str) -> None:
    got = loaded("arc_atlas_rl", dataset_path=written([row]))

    assert got["prompt"] == "What is 1 + 2?"
    assert got["ground_truth"] == "3"
    assert got["additional_context"] == {
        "student_approach": "I multiply",
        "teacher_diagnosis": diagnosis,
        "teacher_teaching": "what does + mean?",
    }
    if row is ARC_DOCUMENTED:
        assert (got["source_id"], got["student_level"], got["reward"]) == ("p1", "weak", 0.5)


def test_arc_atlas_warms_a_teacher_up_in_either_format(written: Write) -> None:
    labels = loaded("arc_atlas_sft", dataset_path=written([ARC]))["messages"]
    tags = loaded("arc_atlas_sft", dataset_path=written([ARC]), sft_output_format="tags")["messages"]

    assert [message["role"] for message in labels] == ["system", "user", "assistant"]
    assert labels[1]["content"] == ARC["problem_text"]
    assert labels[2]["content"] == (
        "Student approach: I multiply\n\nDiagnosis: wrong operation\n\nTeaching: what does + mean?"
    )
    assert tags[2]["content"] == (
        "<thinking>\nwrong operation\n</thinking>\n<teaching>\nwhat does + mean?\n</teaching>"
    )


@pytest.mark.parametrize(
    ("preset", "row", "complaint"),
    [
        ("gsm8k_grpo", {"answer": "#### 3"}, "line 1: .*expected a question"),
        ("gsm8k_grpo", {"question": "q"}, "line 1: no answer"),
        ("arc_atlas_rl", {"prompt": " "}, "line 1: .*expected text under prompt or problem_text"),
        ("arc_atlas_rl", {"prompt": ["q"]}, "line 1: column 'prompt' is list"),
        ("arc_atlas_rl", {"prompt": "q"}, "line 1: .*ground_truth or answer"),
        ("arc_atlas_sft", {"prompt": "q"}, "line 1: .*teacher_teaching or teaching"),
    ],
)
def test_rows_without_their_columns_are_named(written: Write, preset: str, row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        loaded(preset, dataset_path=written([row]))


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"runtime_traces", "runtime_pg"}))
@given(
    row=st.dictionaries(
        st.sampled_from(["prompt", "question", "answer", "ground_truth", "teaching", "level", "solution"]),
        st.none() | st.text(max_size=5) | st.integers() | st.booleans() | st.lists(st.text(max_size=2), max_size=2),
    )
)
@settings(max_examples=30)
def test_garbage_columns_raise_nothing_but_data_errors(preset: str, row: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        Hub(monkeypatch, [row])
        try:
            got = loaded(preset)
        except DataError:
            return
    assert {"source_id"} < got.keys()


def test_questions_and_answers_have_many_names() -> None:
    assert question_of({"problem": " ", "query": "q"}) == "q"
    assert question_of({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}) == "q"
    assert ground_truth_of({"ground_truth": "#### 3"}) == "#### 3", "taken whole"
    assert ground_truth_of({"answer": "so\n#### 3"}) == "3"
    assert ground_truth_of({"solution": {"a": 1}}) == '{"a": 1}'
    assert ground_truth_of({"answer": 0}) == "0"
    assert ground_truth_of({"answer": " "}) is None
    with pytest.raises(DataError, match="expected a question under question, problem"):
        question_of({"answer": "3"})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a: b\n#### 1,000", "1,000"),
        ("so\nFinal Answer: 7.", "7"),
        ("Final answer is 7\nmore", "7"),
        ("think\nThe result: 5", "5"),
        ("no mark", "no mark"),
        ("", ""),
    ],
)
def test_the_final_answer_of_a_solution(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_the_strict_rule_compares_letters() -> None:
    assert exact_match("so\nFinal Answer:  x  y.", "x y") == 1.0
    assert exact_match("Final Answer: 3.0", "3") == 0.0


@pytest.mark.parametrize("column", ["final_answer", "ground_truth", "expected_answer"])
@pytest.mark.parametrize("answer", [0, "0", 0.5])
def test_the_answer_of_a_problem_stands_under_the_same_names_everywhere(
    written: Write, column: str, answer: str | float
) -> None:
    path = written([{"problem": "p", column: answer, "solution": "work\nFinal Answer: 7"}])

    [row] = load_splits(DataConfig(loader="math", dataset_path=path, eval_split_ratio=0)).train

    assert row["ground_truth"] == str(answer) == ground_truth_of({column: answer})
