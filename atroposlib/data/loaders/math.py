"""Word problems with one answer: GSM8K, MetaMathQA, Big-Math, and files with their columns."""

from __future__ import annotations

from collections.abc import Iterator

from atroposlib.data.answers import bare_answer_of, final_answer, marked_answer, question_of, solution_of
from atroposlib.data.config import DataConfig
from atroposlib.data.levels import check_level, of_level
from atroposlib.data.registry import Funnel, Row
from atroposlib.data.source_ids import hashed, source_id_of
from atroposlib.data.sources import usable_rows
from atroposlib.errors import DataError
from atroposlib.type_definitions import Message

SYSTEM = 'Work through the problem step by step. Write the result on the last line, as "Final Answer: " and the value.'


def load(config: DataConfig, funnel: Funnel) -> Iterator[Row]:
    """RL rows: prompt (the system's word and the question), ground_truth, meta_messages, source_id, level.

    Conversations: messages that end in the worked solution and its final answer, final_answer, source_id.
    """
    parse = _conversation if config.form == "conversation" else _rl_row
    # Levels first: the columns of the source are gone afterwards.
    raw = of_level(usable_rows(config, funnel, lambda row: _checked(row, config)), config, funnel)
    return (parse(row) for row in raw)


def _checked(row: Row, config: DataConfig) -> Row:
    check_level(row, config)
    question_of(row)
    if not _answer(row):
        raise DataError(f"no answer in the columns {', '.join(row)}; expected a worked solution or final_answer")
    return row


def _asked(row: Row) -> list[Message]:
    """What the policy sees: never the solution."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question_of(row)}]


def _rl_row(row: Row) -> Row:
    prompt = _asked(row)
    found = {"prompt": prompt, "ground_truth": _answer(row), "meta_messages": prompt, "source_id": _source_id(row)}
    return {**found, **{name: row[name] for name in ("level", "source", "type", "domain") if name in row}}


def _conversation(row: Row) -> Row:
    answer = _answer(row)
    worked = (solution_of(row) or "").split("####")[0].strip()
    text = (
        worked if final_answer(worked) == answer and "Final Answer:" in worked else f"{worked}\nFinal Answer: {answer}"
    )
    messages = [*_asked(row), {"role": "assistant", "content": text.strip()}]
    return {"messages": messages, "final_answer": answer, "source_id": _source_id(row)}


def _answer(row: Row) -> str:
    given = bare_answer_of(row)
    if given is not None:
        return given.strip()
    solution = (solution_of(row) or "").strip()
    # One line without a mark is the answer itself, such as 3:2.
    return final_answer(solution) if "\n" in solution or marked_answer(solution) else solution


def _source_id(row: Row) -> str:
    original = row.get("original_question")
    # Rewordings of one problem are one source: none of them may be evaluated on where another is trained on.
    return hashed(original) if isinstance(original, str) and original else source_id_of(row, question_of(row))
