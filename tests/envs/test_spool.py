"""The journal of groups that the rollout server could not take yet."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from atroposlib.envs.serving.delivery import wire_group
from atroposlib.envs.serving.spool import Spool
from atroposlib.errors import GroupFormatError, SpoolError
from atroposlib.wire.columns import Group, encode_group
from tests.envs.fakes import a_scored_group

ROOMY = 1 << 20
OpenSpool: TypeAlias = Callable[..., Spool]


def a_group(group_id: str) -> Group:
    return wire_group(
        a_scored_group(), group_id=group_id, env_id=1, run_id="r", ticket="t", origins={}, fallback_version=0
    )


def ids(groups: list[Group]) -> list[str]:
    return [group.group_id for group in groups]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool" / "env.groups"


@pytest.fixture
def open_spool(path: Path) -> Iterator[OpenSpool]:
    """Spools on one path, each as if in a process of its own once the one before has `died`."""
    opened: list[Spool] = []

    def build(max_bytes: int = ROOMY) -> Spool:
        opened.append(Spool(path, max_bytes=max_bytes))
        return opened[-1]

    yield build
    for spool in opened:
        die(spool)


def die(spool: Spool) -> None:
    """As SIGKILL: the lock goes with the process, nothing else is tidied up."""
    if spool._file is not None:
        spool._file.close()
        spool._file = None


def test_what_was_not_delivered_is_there_for_the_next_process_whole_and_in_order(open_spool: OpenSpool) -> None:
    spool = open_spool()
    for name in ("a", "b", "c"):
        spool.keep(a_group(name))
    die(spool)

    found = open_spool().recover()

    assert [encode_group(group) for group in found] == [encode_group(a_group(name)) for name in ("a", "b", "c")]


def test_when_all_is_delivered_nothing_is_left(path: Path, open_spool: OpenSpool) -> None:
    spool = open_spool()
    spool.keep(a_group("a"))
    spool.keep(a_group("b"))

    spool.delivered("a")
    assert len(spool) == 1
    spool.delivered("b")

    assert path.stat().st_size == 0
    spool.close()
    assert not path.exists()


def test_a_group_is_written_once(path: Path, open_spool: OpenSpool) -> None:
    spool = open_spool()
    spool.keep(a_group("a"))
    size = path.stat().st_size
    spool.keep(a_group("a"))

    assert path.stat().st_size == size


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(min_value=1, max_value=len(encode_group(a_group("b")))))
def test_a_torn_tail_costs_only_the_group_that_was_being_written(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "torn.groups"
    whole = encode_group(a_group("a")) + encode_group(a_group("b"))
    path.write_bytes(whole[:-cut])

    spool = Spool(path, max_bytes=ROOMY)
    assert ids(spool.recover()) == ["a"]

    spool.keep(a_group("c"))
    spool.close()
    again = Spool(path, max_bytes=ROOMY)
    assert ids(again.recover()) == ["a", "c"]
    again.close()
    assert [file.name for file in tmp_path.iterdir()] == ["torn.groups"]


def an_invalid_group(group_id: str) -> Group:
    return replace(a_group(group_id), scores=np.array([0.0, np.nan]))


def test_a_group_that_nobody_could_read_again_is_not_written(open_spool: OpenSpool) -> None:
    spool = open_spool()
    spool.keep(a_group("a"))
    with pytest.raises(GroupFormatError, match="scores"):
        spool.keep(an_invalid_group("b"))
    spool.keep(a_group("c"))
    die(spool)

    assert ids(open_spool().recover()) == ["a", "c"]


@pytest.mark.parametrize("behind", [b"", encode_group(a_group("c"))], ids=["last", "in the middle"])
def test_groups_behind_a_damaged_one_are_set_aside_before_they_are_cut_off(
    path: Path, open_spool: OpenSpool, behind: bytes
) -> None:
    rest = encode_group(an_invalid_group("b")) + behind
    path.parent.mkdir()
    path.write_bytes(encode_group(a_group("a")) + rest)

    assert ids(open_spool().recover()) == ["a"]

    assert path.with_name("env.groups.bad").read_bytes() == rest


def test_a_damaged_length_does_not_pass_for_a_torn_tail(path: Path, open_spool: OpenSpool) -> None:
    rest = b"\xff" + encode_group(a_group("b"))[1:] + encode_group(a_group("c"))
    path.parent.mkdir()
    path.write_bytes(rest)

    assert open_spool().recover() == []

    assert path.with_name("env.groups.bad").read_bytes() == rest


def test_making_room_survives_a_group_that_the_disk_has_lost(path: Path, open_spool: OpenSpool) -> None:
    size = len(encode_group(a_group("a")))
    spool = open_spool(2 * size)
    spool.keep(a_group("a"))
    spool.keep(a_group("b"))
    os.truncate(path, 2 * size - 1)

    spool.keep(a_group("c"))

    assert "b" not in spool
    spool.close()
    assert ids(open_spool().recover()) == ["a", "c"]


def test_it_is_bounded_and_makes_room_by_leaving_out_what_was_delivered(path: Path, open_spool: OpenSpool) -> None:
    size = len(encode_group(a_group("a")))
    spool = open_spool(2 * size)
    spool.keep(a_group("a"))
    spool.keep(a_group("b"))
    with pytest.raises(SpoolError, match="max_spool_bytes"):
        spool.keep(a_group("c"))
    assert "c" not in spool

    spool.delivered("a")
    spool.keep(a_group("c"))

    assert path.stat().st_size == 2 * size
    spool.close()
    assert ids(open_spool().recover()) == ["b", "c"]


def test_two_processes_do_not_share_a_file(path: Path, open_spool: OpenSpool) -> None:
    spool = open_spool()
    spool.keep(a_group("a"))

    with pytest.raises(SpoolError, match=r"another process.*--wandb_name"):
        open_spool().recover()


def test_nothing_is_made_on_disk_before_it_is_needed(path: Path, open_spool: OpenSpool) -> None:
    spool = open_spool()

    assert spool.recover() == []
    spool.close()

    assert not path.parent.exists()


class SpoolMachine(RuleBasedStateMachine):
    """Keep, deliver, die, in any order: what is pending is what was kept and not delivered."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "s.groups"
        self.max_bytes = 3 * len(encode_group(a_group("g000")))
        self.pending: list[str] = []
        self.delivered: set[str] = set()
        self.count = 0
        self.spool = Spool(self.path, max_bytes=self.max_bytes)

    @rule()
    def keep(self) -> None:
        name = f"g{self.count:03}"
        self.count += 1
        if len(self.pending) >= 3:
            with pytest.raises(SpoolError):
                self.spool.keep(a_group(name))
        else:
            self.spool.keep(a_group(name))
            self.pending.append(name)

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.pending))
        self.spool.delivered(name)
        self.pending.remove(name)
        self.delivered.add(name)

    @rule()
    def die(self) -> None:
        die(self.spool)
        self.spool = Spool(self.path, max_bytes=self.max_bytes)
        found = ids(self.spool.recover())
        # A delivered group may come again, and is answered as a duplicate; one that was not must come.
        assert [name for name in found if name in self.pending] == self.pending
        assert set(found) <= self.delivered | set(self.pending)
        for name in set(found) - set(self.pending):
            self.spool.delivered(name)

    @invariant()
    def counts_agree_and_the_bound_holds(self) -> None:
        assert len(self.spool) == len(self.pending)
        assert not self.path.exists() or self.path.stat().st_size <= self.max_bytes

    def teardown(self) -> None:
        self.spool.close()
        self.folder.cleanup()


TestSpoolMachine = SpoolMachine.TestCase
TestSpoolMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_a_failed_write_leaves_the_file_as_it_was(
    path: Path, open_spool: OpenSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = open_spool()
    spool.keep(a_group("a"))
    size = path.stat().st_size
    flush, failures = os.fsync, iter([OSError(28, "No space left on device")])

    def full_once(number: int) -> None:
        if (error := next(failures, None)) is not None:
            raise error
        flush(number)

    monkeypatch.setattr("atroposlib.envs.serving.spool.os.fsync", full_once)
    with pytest.raises(OSError, match="No space"):
        spool.keep(a_group("b"))

    assert path.stat().st_size == size
    assert "b" not in spool
