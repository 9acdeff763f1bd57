"""check_env runs an environment and explains what is wrong with it: one broken environment a check."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig
from atroposlib.errors import ConfigError
from atroposlib.testing import CheckReport, check_env, env_check
from atroposlib.testing.byte_tokenizer import save_byte_tokenizer
from atroposlib.testing.env_check import EnvCheckError
from atroposlib.testing.env_loading import load_env_class
from atroposlib.testing.findings import Finding
from atroposlib.testing.loop_watch import LoopWatch, blamed
from atroposlib.testing.mock.policies import OneOf

FOUR_OR_FIVE = OneOf(("4", "5"))


class Sums(BaseEnv):
    """An environment that is right."""

    name: ClassVar[str | None] = "sums"

    @classmethod
    def config_init(cls) -> Any:
        return BaseEnvConfig(group_size=4), [APIServerConfig(base_url="http://nowhere.invalid/v1", server_type="vllm")]

    async def setup(self) -> None:
        self.rng = random.Random(self.config.seed)

    async def get_next_item(self) -> Any:
        return self.rng.randint(2, 1000)

    async def collect_trajectories(self, item: Any) -> Any:
        return await self.group(item), []

    async def group(self, item: Any) -> Any:
        messages: Any = [{"role": "user", "content": f"{item}?"}]
        return await self.rollout_group(messages, reward=lambda text: float(text == "4"), max_tokens=8)

    async def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        return {"heldout_reward": float((await self.sample([{"role": "user", "content": "2+2"}]))[0][0] == "4")}


@pytest.fixture(autouse=True)
def one_tokenizer(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "one_tokenizer"
    name = str(folder) if folder.exists() else save_byte_tokenizer(folder)
    monkeypatch.setattr(env_check, "_byte_tokenizer", lambda _: name)


async def check(env_cls: Any, **options: Any) -> CheckReport:
    return await check_env(
        env_cls, **{"reply": FOUR_OR_FIVE, "stages_outage": False, "n_items": 3, "deadline_s": 10.0, **options}
    )


def named(report: CheckReport, name: str) -> Finding:
    found: list[Finding] = [finding for finding in report.findings if finding.check == name]
    assert len(found) == 1, report.findings
    assert found[0].fix
    return found[0]


async def test_a_right_environment_has_no_finding() -> None:
    report = await check(Sums, stages_outage=True)

    assert report.findings == []
    assert report.ok
    assert (report.items, report.groups, report.sequences) == (3, 3, 12)
    assert report.requests == 12 + 1, "the rollouts and the evaluation"
    assert report.is_evaluated
    report.raise_for_errors()


@pytest.mark.parametrize("stage", ["config_init", "setup", "get_next_item", "evaluate"])
async def test_a_method_that_raises_is_named_with_its_line(stage: str) -> None:
    async def broken(self: Any) -> Any:
        raise KeyError("answer")

    def broken_now(cls: Any) -> Any:
        raise KeyError("answer")

    method: Any = classmethod(broken_now) if stage == "config_init" else broken
    report = await check(type("Broken", (Sums,), {stage: method}))

    finding = named(report, f"{stage}_runs")
    assert "KeyError: 'answer'" in finding.message
    assert not report.ok


class NoLine(Sums):
    async def collect_trajectories(self, item: Any) -> Any:
        nothing: dict[str, Any] = {}
        return nothing["tokens"], []


async def test_the_line_of_the_author_is_named() -> None:
    finding = named(await check(NoLine), "collect_trajectories_runs")

    assert finding.where.startswith("test_env_check.py:")
    assert finding.where.endswith("in collect_trajectories")


async def test_a_constructor_that_raises_is_named() -> None:
    class Broken(Sums):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError("no data")

    assert "no data" in named(await check(Broken), "constructor_runs").message


async def test_a_rollout_that_never_ends_is_given_up() -> None:
    class Endless(Sums):
        async def collect_trajectories(self, item: Any) -> Any:
            await asyncio.Event().wait()

    finding = named(await check(Endless, deadline_s=0.3), "collect_trajectories_runs")
    assert "did not end within 0.3 s" in finding.message


async def test_no_items_at_all_is_an_error_and_few_are_worth_knowing() -> None:
    class Empty(Sums):
        async def get_next_item(self) -> Any:
            return None

    class Two(Sums):
        async def setup(self) -> None:
            self.left = [1, 2]

        async def get_next_item(self) -> Any:
            return self.left.pop() if self.left else None

    assert named(await check(Empty), "items_come").severity == "error"
    assert named(await check(Two), "items_come").severity == "info"


async def test_items_of_an_unseeded_order_are_found() -> None:
    numbers = itertools.count()

    class Unseeded(Sums):
        async def get_next_item(self) -> Any:
            return next(numbers)

    class Objects(Sums):
        async def get_next_item(self) -> Any:
            return object()

    assert named(await check(Unseeded), "order_is_repeatable").severity == "warning"
    assert (await check(Objects)).findings == [], "an address is no difference"


async def test_a_missing_backlog_and_a_wrong_one_are_found() -> None:
    class Bare(Sums):
        async def collect_trajectories(self, item: Any) -> Any:
            return await self.group(item)

    class Wrong(Sums):
        async def collect_trajectories(self, item: Any) -> Any:
            return await self.group(item), item

    assert named(await check(Bare), "result_form").severity == "info"
    assert named(await check(Wrong), "result_form").severity == "error"


async def test_groups_are_checked_and_each_fault_is_told_once() -> None:
    class ZeroOne(Sums):
        async def collect_trajectories(self, item: Any) -> Any:
            group = await self.group(item)
            group["masks"] = [[int(mask != -100) for mask in row] for row in group["masks"]]
            return group, []

    report = await check(ZeroOne)

    assert "holds 0 and 1" in named(report, "mask_values").message
    assert report.groups == 3


async def test_groups_that_never_come_are_found() -> None:
    class Nothing(Sums):
        async def collect_trajectories(self, item: Any) -> Any:
            return None, []

    assert "none of 3 items" in named(await check(Nothing), "groups_come").message


async def test_a_reward_that_does_not_look_at_the_reply_is_found() -> None:
    class Generous(Sums):
        async def group(self, item: Any) -> Any:
            return await self.rollout_group([{"role": "user", "content": str(item)}], reward=lambda text: 1.0)

    assert named(await check(Generous), "scores_differ").severity == "warning"


async def test_a_missing_evaluation_and_name_are_found() -> None:
    class Bare(Sums):
        name = None
        evaluate = BaseEnv.evaluate

    report = await check(Bare)
    assert named(report, "evaluation_exists").severity == "warning"
    assert named(report, "name_is_set").severity == "info"
    assert not report.is_evaluated


class Blocking(Sums):
    async def collect_trajectories(self, item: Any) -> Any:
        grade_slowly()
        return await self.group(item), []


def grade_slowly() -> None:
    time.sleep(0.2)


async def test_a_blocked_event_loop_is_found_with_its_line() -> None:
    finding = named(await check(Blocking, n_items=1), "loop_is_free")

    assert finding.where.startswith("test_env_check.py:")
    assert "asyncio.to_thread" in finding.fix


async def test_a_loop_that_only_waits_is_not_blamed() -> None:
    async with LoopWatch(Path(__file__), threshold_s=0.0) as watch:
        await asyncio.sleep(0.15)

    assert watch.blocked == {}


def test_the_caller_in_the_authors_file_is_blamed_not_the_library() -> None:
    # The innermost frame is this very line.
    assert blamed(sys._getframe(), __file__ or "") is not None
    assert blamed(sys._getframe(), "another.py") is None


def test_the_file_that_started_the_loop_is_not_blamed_for_what_others_do() -> None:
    seen: list[str | None] = []
    names: dict[str, Any] = {"seen": seen, "blamed": blamed, "sys": sys, "file": __file__}
    exec(compile("def look(): seen.append(blamed(sys._getframe(), file))", "elsewhere.py", "exec"), names)

    async def main() -> None:
        asyncio.get_running_loop().call_soon(names["look"])
        await asyncio.sleep(0)

    asyncio.run(main())

    assert seen == [None]


async def test_a_slow_setup_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from atroposlib.testing import stage_checks

    monkeypatch.setattr(stage_checks, "SLOW_SETUP_S", 0.01)

    class Slow(Sums):
        async def setup(self) -> None:
            await super().setup()
            await asyncio.sleep(0.05)

    assert named(await check(Slow), "setup_is_quick").severity == "warning"


async def test_a_server_type_without_tokens_is_told() -> None:
    class OpenAI(Sums):
        @classmethod
        def config_init(cls) -> Any:
            return BaseEnvConfig(group_size=4), [APIServerConfig(base_url="http://nowhere.invalid/v1")]

    assert "openai" in named(await check(OpenAI), "server_type_fits").message


async def test_an_outage_that_becomes_a_reward_is_an_error() -> None:
    class Forgiving(Sums):
        last: Any = None

        async def group(self, item: Any) -> Any:
            try:
                self.last = await super().group(item)
            except Exception:
                return {**self.last, "scores": [0.0] * 4}
            return self.last

    report = await check(Forgiving, stages_outage=True)
    assert named(report, "outage_is_no_reward").severity == "error"
    with pytest.raises(EnvCheckError, match="outage becomes a reward"):
        report.raise_for_errors()


# Files

FILE = """
from dataclasses import dataclass
from atroposlib.envs.base import BaseEnv

@dataclass
class Item:
    text: str

class Base(BaseEnv):
    async def get_next_item(self):
        return Item("a")
    async def evaluate(self):
        return {}

class One(Base):
    pass
"""


def test_the_class_of_a_file_is_found(tmp_path: Path) -> None:
    file = tmp_path / "json.py"
    file.write_text(FILE)

    assert load_env_class(file).__name__ == "One"
    assert load_env_class(file, "Base").__name__ == "Base"
    with pytest.raises(ConfigError, match="no environment 'Two'; it has Base, One"):
        load_env_class(file, "Two")
    file.write_text(FILE + "\nclass Two(Base):\n    pass\n")
    with pytest.raises(ConfigError, match="--class NAME"):
        load_env_class(file)


def test_a_file_without_an_environment_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "empty.py"
    with pytest.raises(ConfigError, match="no file"):
        load_env_class(file)
    file.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="no subclass of BaseEnv"):
        load_env_class(file)
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(ConfigError, match="nothing_of_that_name"):
        load_env_class(file)
