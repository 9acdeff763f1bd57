"""The student's server: it must know the model by its name, and may leave the counting of tokens to us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atroposlib.errors import ConfigError
from tests.teaching.stand import ITEM, TeachingStand, a_data_set


@pytest.fixture
def stand(bytes_tokenizer: str) -> TeachingStand:
    return TeachingStand(bytes_tokenizer)


def changed(stand: TeachingStand, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """The student's server answers a path with a status and a content, or with its own content changed by a function."""
    answer = stand.student._answer

    async def other(method: str, path: str, body: dict[str, Any]) -> Any:
        change = changes.get(path)
        if isinstance(change, tuple):
            return change
        found: Any = await answer(method, path, body)
        return found if change is None else (found[0], change(found[1]))

    monkeypatch.setattr(stand.student, "_answer", other)


async def test_a_student_that_is_not_served_is_named_at_the_start(
    stand: TeachingStand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = 404, {"error": {"message": "The model `student` does not exist."}}
    changed(stand, monkeypatch, {"/v1/chat/completions": unknown, "/v1/models": (200, {"data": [{"id": "small"}]})})
    async with stand.env(data=a_data_set(tmp_path).model_dump()) as env:
        with pytest.raises(ConfigError, match=r"'student'.* serves 'small'; set --student\.model_name"):
            await env.setup()


async def test_a_server_that_lists_no_models_is_named_all_the_same(
    stand: TeachingStand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(stand, monkeypatch, {"/v1/chat/completions": (401, {}), "/v1/models": (401, {})})
    async with stand.env(data=a_data_set(tmp_path).model_dump()) as env:
        with pytest.raises(
            ConfigError, match=r"the student cannot be asked .*models that it does not list.*answered 401"
        ):
            await env.setup()


async def test_a_reference_that_is_not_served_is_named_at_the_start(
    stand: TeachingStand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unknown(method: str, path: str, body: dict[str, Any]) -> Any:
        return 404, {}

    monkeypatch.setattr(stand.reference, "_answer", unknown)
    async with stand.env(data=a_data_set(tmp_path).model_dump(), use_reference_teacher_model=True) as env:
        with pytest.raises(ConfigError, match=r"the reference teacher cannot be asked .*set --reference\.model_name"):
            await env.setup()


async def test_a_student_that_is_not_up_yet_is_waited_for_later(
    stand: TeachingStand, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stand.student.faults.refuse = 1
    async with stand.env(data=a_data_set(tmp_path).model_dump()) as env:
        await env.setup()
        probed = await env.diagnostic_probe(ITEM.question)

    assert "the student at" in caplog.text
    assert probed.probe_tokens > 0


async def test_the_check_costs_one_token(stand: TeachingStand, tmp_path: Path) -> None:
    async with stand.env(data=a_data_set(tmp_path).model_dump()) as env:
        await env.setup()

    assert [request["max_tokens"] for request in stand.student.requests] == [1]


@pytest.mark.parametrize("has_tokenizer", [True, False])
async def test_tokens_that_the_server_does_not_count_are_counted_here(
    stand: TeachingStand, bytes_tokenizer: str, monkeypatch: pytest.MonkeyPatch, has_tokenizer: bool
) -> None:
    changed(stand, monkeypatch, {"/v1/chat/completions": lambda content: {**content, "usage": None}})
    name = bytes_tokenizer if has_tokenizer else None
    async with stand.env(student_tokenizer_name_or_path=name) as env:
        probed = await env.diagnostic_probe(ITEM.question)

    said = "First add 20 and 22."
    assert probed.probe_tokens == (len(said) if has_tokenizer else len(said.split()))
