"""multimodal: a valid PNG reaches the model and the trainer, and the tokens are those that the engine sampled from."""

from __future__ import annotations

import base64
import struct
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs import tokenizers
from atroposlib.envs.processing.limits import ProcessFailedError
from atroposlib.errors import ConfigError, RolloutError
from atroposlib.testing.mock.policies import Prompt, PromptFunction
from environments.multimodal import CountSquaresEnv
from environments.multimodal.chat_tokens import chat_samples
from environments.multimodal.env import SAMPLE, Picture, picture_of, reward
from environments.multimodal.pictures import CELL_PX, CELLS, COLOURS, SQUARE_PX, draw_squares, png
from environments.rows import load_rows
from tests.environments.running import Stand
from tests.processes import RolloutServerProcess

ROWS = load_rows(SAMPLE, fields={"red": int, "green": int, "blue": int, "colour": str})


def pixels(data: bytes) -> list[list[tuple[int, ...]]]:
    """A reader of its own: chunks with their checksums, no filter, 8-bit RGB."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = [], 8
    while at < len(data):
        [size] = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size) == (zlib.crc32(kind + body),)
        chunks.append((kind, body))
        at += size + 12
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *form = struct.unpack(">II5B", chunks[0][1])
    assert form == [8, 2, 0, 0, 0]
    raw, stride = zlib.decompress(chunks[1][1]), 1 + 3 * width
    assert len(raw) == height * stride
    lines = [raw[y * stride : (y + 1) * stride] for y in range(height)]
    assert {line[0] for line in lines} == {0}
    return [[tuple(line[1 + 3 * x : 4 + 3 * x]) for x in range(width)] for line in lines]


def squares(data: bytes) -> Counter[str]:
    """What somebody sees who looks at the middle of each cell."""
    names = {colour: name for name, colour in COLOURS.items()}
    rows, middle = pixels(data), SQUARE_PX // 2
    seen = [rows[y * CELL_PX + middle][x * CELL_PX + middle] for y in range(CELLS) for x in range(CELLS)]
    return Counter(names[pixel] for pixel in seen if pixel in names)


def look_and_count(prompt: Prompt) -> str:
    """A model that sees: it reads the picture of the request. Every other choice of a group is one too many."""
    assert prompt.known_messages is not None
    [image, text] = prompt.known_messages[-1]["content"]
    data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"), validate=True)
    [colour] = [name for name in COLOURS if name in text["text"]]
    return str(squares(data)[colour] + prompt.index % 2)


@pytest.fixture
def stand(bytes_tokenizer: str) -> Stand:
    return Stand(CountSquaresEnv, PromptFunction(look_and_count), bytes_tokenizer, group_size=2)


# Pictures


@given(st.tuples(*(st.integers(0, 5) for _ in COLOURS)))
def test_a_picture_shows_what_was_asked_for(counts: tuple[int, ...]) -> None:
    wanted = dict(zip(COLOURS, counts, strict=True))

    assert squares(draw_squares(wanted)) == Counter(wanted)
    assert draw_squares(wanted) == draw_squares(wanted)


@given(st.lists(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=2, max_size=2), min_size=1, max_size=3))
def test_pixels_come_back_as_they_were_drawn(rows: list[list[tuple[int, int, int]]]) -> None:
    assert pixels(png(rows)) == rows


def test_more_squares_than_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="room for 16 squares, not for 17"):
        draw_squares({"red": 17})


@pytest.mark.parametrize(
    ("text", "paid"),
    [("3", 1.0), (" 3\n", 1.0), ("3 squares", 0.5), ("4", 0.0), ("2 or 3", 0.0), ("", 0.0), ("33", 0.0)],
)
def test_the_right_number_alone_pays_most(text: str, paid: float) -> None:
    assert reward(Picture(red=3, green=1, blue=0, colour="red"), text) == paid


@pytest.mark.parametrize("change", [{"colour": "pink"}, {"red": 15}])
def test_a_row_of_which_no_picture_can_be_drawn_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no picture can be drawn"):
        picture_of({"red": 1, "green": 1, "blue": 1, "colour": "red", **change})


# Tokens over the chat route


def an_answer(**changes: Any) -> Any:
    choice = {
        "token_ids": [7, 2],
        "logprobs": SimpleNamespace(content=[SimpleNamespace(logprob=-0.5), SimpleNamespace(logprob=-0.25)]),
        "message": SimpleNamespace(content="3"),
        "finish_reason": "stop",
        **changes,
    }
    return SimpleNamespace(prompt_token_ids=[4, 5], choices=[SimpleNamespace(**choice)])


def test_prompt_is_masked_and_completion_trained() -> None:
    [sample] = chat_samples(an_answer())

    assert (sample.tokens, sample.masks) == ([4, 5, 7, 2], [-100, -100, 7, 2])
    assert sample.logprobs == [1.0, 1.0, -0.5, -0.25]


@pytest.mark.parametrize("changes", [{"token_ids": None}, {"logprobs": None}, {"token_ids": [7]}])
def test_a_server_without_token_ids_is_a_failure_not_a_reward(changes: dict[str, Any]) -> None:
    with pytest.raises(RolloutError, match=r"no token ids|0 logprobs|2 logprobs for 1"):
        chat_samples(an_answer(**changes))


# The whole environment


async def test_process_pays_who_looked(stand: Stand, tmp_path: Path) -> None:
    groups = await stand.processed(tmp_path / "groups.jsonl")

    for group in groups:
        assert group["scores"] == [1.0, 0.0]
        [first, second] = group["images"]
        assert first == second
        asked = group["messages"][0][0]["content"]
        assert asked[0]["image_url"]["url"] == f"data:image/png;base64,{first}"
        right = group["messages"][0][1]["content"]
        assert str(squares(base64.b64decode(first))[asked[1]["text"].split()[2]]) == right


async def test_the_picture_reaches_the_trainer_beside_the_engine_s_own_tokens(
    stand: Stand, rollout_server: RolloutServerProcess, tmp_path: Path, bytes_tokenizer: str
) -> None:
    tokenizer = tokenizers.load_tokenizer(bytes_tokenizer)

    batch = await stand.leased(rollout_server, tmp_path / "run")

    for group in batch:
        assert group.scores.tolist() == [1.0, 0.0]
        colour = tokenizer.decode(group.tokens).split("How many ")[1].split()[0]
        count = squares(base64.b64decode(group.images[0]))[colour]
        mask = group.loss_mask.astype(bool)
        assert tokenizer.decode(group.tokens[mask]) == f"{count}<|im_end|>{count + 1}<|im_end|>"
        assert tokenizer.decode(group.tokens).count("<image_url>How many") == 2
        assert group.inference_logprobs is not None
        assert (group.inference_logprobs[mask] < 0).all()
        assert group.version_range == (0, 0)


async def test_evaluate(stand: Stand, tmp_path: Path) -> None:
    metrics, samples = await stand.evaluated(tmp_path)

    assert metrics["heldout_reward"] == 1.0
    assert 0 < metrics["heldout_size"] == len(samples) < len(ROWS)


async def test_check_env_finds_nothing(stand: Stand) -> None:
    assert await stand.check() == []


async def test_replies_without_token_ids_give_no_group(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("environments.multimodal.env.ASK_FOR_TOKENS", {"logprobs": True})

    with pytest.raises(ExceptionGroup) as failure:
        await stand.processed(tmp_path / "groups.jsonl", groups=1)

    assert failure.group_contains(ProcessFailedError, match="no token ids")
