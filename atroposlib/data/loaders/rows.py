"""Your own rows: `prompt` with `ground_truth` for RL, one of the five supervised forms for conversations."""

from __future__ import annotations

from collections.abc import Iterator

from atroposlib.data.answers import QUESTION_COLUMNS, ground_truth_of, question_of
from atroposlib.data.chats import as_messages
from atroposlib.data.config import DataConfig
from atroposlib.data.levels import check_level, of_level
from atroposlib.data.registry import Funnel, Row
from atroposlib.data.source_ids import source_id_of
from atroposlib.data.sources import usable_rows
from atroposlib.errors import DataError


def load(config: DataConfig, funnel: Funnel) -> Iterator[Row]:
    """The rows with all their columns; prompt, ground_truth and source_id are added where they are missing."""
    form = _conversation if config.form == "conversation" else _rl_row

    def parse(row: Row) -> Row:
        check_level(row, config)
        return form(row)

    return of_level(usable_rows(config, funnel, parse), config, funnel)


def _rl_row(row: Row) -> Row:
    prompt = row.get("prompt") or _question(row)
    if not isinstance(prompt, str):
        _check_chat(prompt)
    ground_truth = ground_truth_of(row)
    added = {"prompt": prompt, "source_id": source_id_of(row, prompt)}
    return {**row, **added} if ground_truth is None else {**row, **added, "ground_truth": ground_truth}


def _question(row: Row) -> str:
    try:
        return question_of(row)
    except DataError as error:
        raise DataError(f"{error}; rows to learn from as they stand need form=conversation") from error


def _check_chat(prompt: object) -> None:
    if not isinstance(prompt, list):
        raise DataError(f"'prompt' is {type(prompt).__name__}; expected text or a list of messages")
    if as_messages({"messages": prompt})[-1]["role"] == "assistant":
        raise DataError("'prompt' ends in a turn of the assistant; take the answer out of it")


def _conversation(row: Row) -> Row:
    messages = as_messages(row)
    question = next((row[name] for name in QUESTION_COLUMNS if row.get(name)), None) or messages[:-1] or messages
    return {**row, "source_id": source_id_of(row, question)}
