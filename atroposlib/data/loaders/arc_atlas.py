"""Arc-ATLAS-Teach: problems with a student's approach and a teacher's help, for RL and for the warm-up of teachers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from atroposlib.data.config import DataConfig
from atroposlib.data.registry import Funnel, Row
from atroposlib.data.source_ids import source_id_of
from atroposlib.data.sources import local_file, usable_rows
from atroposlib.errors import DataError

FILES = {"rl": "curriculum/arc_atlas_teach_rl.jsonl", "sft": "training/sft.jsonl"}
"""File of each `dataset_split` on the hub."""
SYSTEM = (
    "You teach another model. Look at its approach to the problem, find where it goes wrong or what it lacks, and then "
    "help it to solve the problem itself, without giving the answer away."
)
PROMPT = ("prompt", "problem_text", "question", "input")
GROUND_TRUTH = ("ground_truth", "answer", "solution")
# The names that its files have, and those that its documentation gives.
APPROACH = ("student_approach", "student_response")
DIAGNOSIS = ("teacher_diagnosis",)
TEACHING = ("teacher_teaching", "teaching")
KEPT = (
    "enhanced_response",
    "baseline_score",
    "with_teaching_score",
    "reward",
    "problem_id",
    "student_level",
    "domain",
)


def load(config: DataConfig, funnel: Funnel) -> Iterator[Row]:
    """RL rows: prompt, ground_truth, additional_context, source_id. Conversations: messages, source_id."""
    is_chat = config.form == "conversation"
    split = config.dataset_split or ("sft" if is_chat else "rl")
    if local_file(config) is None and split not in FILES:
        raise DataError(f"Arc-ATLAS-Teach has no dataset_split={split!r}; there are {', '.join(FILES)}")

    def parse(row: Row) -> Row:
        return _conversation(row, config) if is_chat else _rl_row(row)

    return usable_rows(config, funnel, parse, hub_file=FILES.get(split))


def _rl_row(row: Row) -> Row:
    prompt = _needed(row, PROMPT)
    context = {
        "student_approach": _text(row, APPROACH),
        "teacher_diagnosis": _text(row, DIAGNOSIS),
        "teacher_teaching": _text(row, TEACHING),
    }
    made = {"prompt": prompt, "ground_truth": _needed(row, GROUND_TRUTH), "additional_context": context}
    kept = {name: row[name] for name in KEPT if name in row}
    return {**made, "source_id": source_id_of(row, prompt), **kept}


def _conversation(row: Row, config: DataConfig) -> Row:
    problem = _needed(row, PROMPT)
    form = _tagged if config.sft_output_format == "tags" else _labelled
    reply = form(_text(row, APPROACH), _text(row, DIAGNOSIS), _needed(row, TEACHING))
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": problem},
        {"role": "assistant", "content": reply},
    ]
    return {"messages": messages, "source_id": source_id_of(row, problem)}


def _labelled(approach: str, diagnosis: str, teaching: str) -> str:
    parts = {"Student approach": approach, "Diagnosis": diagnosis, "Teaching": teaching}
    return "\n\n".join(f"{label}: {text}" for label, text in parts.items() if text)


def _tagged(approach: str, diagnosis: str, teaching: str) -> str:
    thinking = f"<thinking>\n{diagnosis}\n</thinking>\n" if diagnosis else ""
    return f"{thinking}<teaching>\n{teaching}\n</teaching>"


def _text(row: Row, names: Sequence[str]) -> str:
    """The first of the columns that is not empty; "" without any."""
    for name in names:
        value = row.get(name)
        if value is None or value == "":
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise DataError(f"column {name!r} is {type(value).__name__}, expected text")
        if value.strip():
            return value
    return ""


def _needed(row: Row, names: Sequence[str]) -> str:
    text = _text(row, names)
    if not text:
        raise DataError(f"columns {', '.join(map(repr, row)) or 'none'}: expected text under {' or '.join(names)}")
    return text
