"""Verdicts are remembered, and judges that fail too often stop the scoring."""

from __future__ import annotations

from pathlib import Path

import pytest

from atroposlib.rim.asking import JudgeCall
from atroposlib.rim.breaker import JudgeBreaker
from atroposlib.rim.cache import VerdictCache, cache_key
from atroposlib.rim.config import Breaker, RIMConfig
from atroposlib.rim.meter import percentile
from atroposlib.rim.verdict import Principle, Verdict

FULL = Verdict(0.5, 0.25, "why {", (Principle("p", 0.5, "d"),), ("line 3",), is_clamped=True)
MODELS = {"small_model": "http://a/v1#s", "large_model": "http://a/v1#l"}


def test_the_oldest_verdict_makes_room() -> None:
    cache = VerdictCache(2)
    for key in ("a1", "b1"):
        cache.put(key, FULL)
    cache.get("a1")
    cache.put("c1", FULL)

    assert [key for key in ("a1", "b1", "c1") if cache.get(key)] == ["a1", "c1"]


def test_another_process_reads_the_whole_verdict(tmp_path: Path) -> None:
    VerdictCache(1, tmp_path).put("a1b2", FULL)

    assert VerdictCache(1, tmp_path).get("a1b2") == FULL
    assert VerdictCache(0, tmp_path).get("a1b2") == FULL
    assert VerdictCache(1, tmp_path).get("a1b3") is None


def test_a_file_without_evidence_is_a_verdict(tmp_path: Path) -> None:
    (tmp_path / "a1").mkdir()
    (tmp_path / "a1" / "b2.json").write_text('{"score": 0.5, "uncertainty": 0.25, "principles": []}')

    assert VerdictCache(1, tmp_path).get("a1b2") == Verdict(0.5, 0.25)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"score": 1, "uncertainty": 0, "principles": [], "evidence": 3}',
        '{"score": 1}',
        '{"principles": 3}',
        "\x00",
    ],
)
def test_a_broken_file_is_no_verdict(tmp_path: Path, content: str) -> None:
    (tmp_path / "a1").mkdir()
    (tmp_path / "a1" / "b2.json").write_text(content)

    assert VerdictCache(1, tmp_path).get("a1b2") is None


def test_nothing_half_written_stays_behind(tmp_path: Path) -> None:
    VerdictCache(1, tmp_path).put("a1b2", FULL)

    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["b2.json"]


def test_a_folder_that_cannot_be_written_costs_only_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = VerdictCache(1, tmp_path / "file")

    cache.put("a1b2", FULL)

    assert cache.get("a1b2") == FULL
    assert "rim.cache_dir" in caplog.text


def test_the_key_tells_judge_model_prompt_and_temperature_apart() -> None:
    config = RIMConfig.read({"models": MODELS})
    call = JudgeCall("process", "p", 0.2)
    others = [
        JudgeCall("accuracy", "p", 0.2),
        JudgeCall("process", "q", 0.2),
        JudgeCall("process", "p", 0.5),
        JudgeCall("process", "p", 0.2, is_large=True),
        JudgeCall("process", "p", 0.2, nth=1),
    ]

    keys = {cache_key(one, config) for one in [call, *others]}
    elsewhere = RIMConfig.read({"models": MODELS | {"small_model": "http://b/v1#s"}})

    assert len(keys) == 6
    assert cache_key(JudgeCall("process", "p", 0.2), config) in keys
    assert cache_key(call, elsewhere) not in keys


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def breaker(clock: Clock, *failures: int, window: int = 10) -> JudgeBreaker:
    made = JudgeBreaker(Breaker(window=window, pause_s=60), clock)
    for failure in failures:
        made.record("it broke" if failure else "")
    return made


def test_too_few_judgements_never_stop_the_scoring() -> None:
    assert not breaker(Clock(), *[1] * 9).is_open


def test_the_share_that_is_allowed_does_not_stop_it() -> None:
    assert not breaker(Clock(), *[1] * 3, *[0] * 7).is_open


def test_more_than_that_does_and_says_why() -> None:
    stopped = breaker(Clock(), *[1] * 4, *[0] * 6)

    assert stopped.is_open
    assert str(stopped) == "judges gave no score in 4 of the last 10 judgements; the last reason: it broke"


def test_old_judgements_are_forgotten() -> None:
    assert not breaker(Clock(), *[1] * 3, *[0] * 10, *[1] * 3).is_open


def test_after_the_pause_the_judges_may_be_tried() -> None:
    clock = Clock()
    stopped = breaker(clock, *[1] * 10)
    pauses = []
    for clock.now in (10.0, 60.0):
        pauses.append(stopped.pause_left_s())
    stopped.pause_again()
    pauses.append(stopped.pause_left_s())
    stopped.close()

    assert pauses == [50.0, 0.0, 60.0]
    assert not stopped.is_open
    assert stopped.abstain_share == 0.0


@pytest.mark.parametrize(("values", "p95"), [([3.0], 3.0), (range(1, 101), 95), (range(1, 21), 19), ([2, 1], 2)])
def test_the_95th_percentile(values: list[float], p95: float) -> None:
    assert percentile(values, 0.95) == p95
