"""Which sessions a configuration wants, as named tests: the stages of the funnel."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from atroposlib.data.config import DataConfig
from atroposlib.data.traces.session import Session

Test = Callable[[Session], bool]


def session_tests(config: DataConfig) -> list[tuple[str, Test]]:
    """Name and test of each filter that is set, in the order in which they are applied."""
    tests: list[tuple[str, Test]] = []
    if config.status_filters is not None:
        wanted = config.status_filters
        tests.append((f"status {' or '.join(wanted)}", lambda session: session.status in wanted))
    if config.review_status_filters is not None:
        reviews = config.review_status_filters
        tests.append((f"review {' or '.join(reviews)}", lambda session: session.review_status in reviews))
    if config.learning_key is not None:
        key = config.learning_key
        tests.append((f"learning_key {key}", lambda session: session.learning_key == key))
    return tests + _by_reward(config) + _by_date(config)


def _by_reward(config: DataConfig) -> list[tuple[str, Test]]:
    lowest, highest = config.min_reward, config.max_reward
    tests: list[tuple[str, Test]] = []
    if lowest > 0:
        tests.append((f"reward >= {lowest}", lambda session: session.score is not None and session.score >= lowest))
    else:
        # What has no score is not bad: nobody has judged it.
        tests.append((f"reward >= {lowest}", lambda session: session.score is None or session.score >= lowest))
    if highest is not None:
        tests.append((f"reward <= {highest}", lambda session: session.score is not None and session.score <= highest))
    return tests


def _by_date(config: DataConfig) -> list[tuple[str, Test]]:
    tests: list[tuple[str, Test]] = []
    if config.start_date is not None:
        start = utc(config.start_date)
        tests.append(
            (f"from {start:%Y-%m-%d}", lambda session: (made := session.created) is not None and made >= start)
        )
    if config.end_date is not None:
        end = utc(config.end_date)
        tests.append((f"before {end:%Y-%m-%d}", lambda session: (made := session.created) is not None and made < end))
    return tests


def utc(time: datetime) -> datetime:
    """The time with a zone: UTC where it names none."""
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
