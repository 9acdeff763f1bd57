"""Payload files: what was written can be read, what is needed stays, what is not goes when room is needed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.stores import segments as module
from rollout_server.stores.direct_file import DirectFile
from rollout_server.stores.payloads import Place, split
from rollout_server.stores.segments import SegmentFiles


def a_folder(
    tmp_path: Path, *, retain_bytes: int = -1, segment_bytes: int = 100, is_synced: bool = False, recent_bytes: int = 0
) -> SegmentFiles:
    return SegmentFiles(
        tmp_path / "segments", is_synced=is_synced, retain_bytes=retain_bytes, segment_bytes=segment_bytes,
        recent_bytes=recent_bytes,
    )  # fmt: skip


def put(segments: SegmentFiles, *payloads: bytes) -> list[Place]:
    places = [segments.allocate(len(payload)) for payload in payloads]
    segments.write(list(zip(places, payloads, strict=True)))
    return places


def is_kept(segments: SegmentFiles, place: Place) -> bool:
    try:
        segments.read([place])
    except FileNotFoundError:
        return False
    return True


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "segments").iterdir())


@settings(max_examples=50, deadline=None)
@given(
    payloads=st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=30),
    is_synced=st.booleans(),
    recent_bytes=st.sampled_from([0, 40, 10_000]),
    data=st.data(),
)
def test_any_places_in_any_order_give_their_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    payloads: list[bytes],
    is_synced: bool,
    recent_bytes: int,
    data: st.DataObject,
) -> None:
    segments = a_folder(tmp_path_factory.mktemp("segments"), is_synced=is_synced, recent_bytes=recent_bytes)
    places = put(segments, *payloads)
    picked = data.draw(st.lists(st.sampled_from(range(len(payloads))), max_size=10))

    chosen = [places[index] for index in picked]

    assert [bytes(part) for part in split(segments.read(chosen), chosen)] == [payloads[index] for index in picked]
    segments.close()


def test_neighbours_are_read_in_one_piece(tmp_path: Path) -> None:
    segments = a_folder(tmp_path)

    places = put(segments, b"aa", b"bbb", b"c")

    assert segments.read(places) == [b"aabbbc"]


def test_a_restart_never_writes_over_what_was_there(tmp_path: Path) -> None:
    [place] = put(a_folder(tmp_path), b"before")

    again = a_folder(tmp_path)
    again.adopt([place])
    put(again, b"after!")

    assert again.read([place]) == [b"before"]


def test_released_payload_is_kept_while_there_is_room_and_the_oldest_goes_first(tmp_path: Path) -> None:
    segments = a_folder(tmp_path, retain_bytes=200)
    places = [put(segments, bytes([i]) * 100)[0] for i in range(5)]

    segments.release(places[:4])
    put(segments, b"x")

    assert [is_kept(segments, place) for place in places] == [False, False, True, True, True]


def test_a_payload_that_is_needed_keeps_its_file_whatever_the_room(tmp_path: Path) -> None:
    segments = a_folder(tmp_path, retain_bytes=0)
    first, second = put(segments, b"a" * 50, b"b" * 50)
    put(segments, b"c" * 100)

    segments.release([first])
    put(segments, b"d")

    assert segments.read([second]) == [b"b" * 50]


def test_files_are_used_again_and_do_not_pile_up(tmp_path: Path) -> None:
    segments = a_folder(tmp_path, retain_bytes=0)

    for i in range(50):
        [place] = put(segments, bytes([i]) * 100)
        assert segments.read([place]) == [bytes([i]) * 100]
        segments.release([place])

    assert len(files(tmp_path)) < 10


def test_what_is_being_read_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = a_folder(tmp_path, retain_bytes=0)
    [place] = put(segments, b"old" * 30)
    put(segments, b"x" * 100)
    read_all = module._read_all

    def slow_read(descriptor: int, offset: int, size: int) -> bytes:
        segments.release([place])
        for _ in range(3):
            put(segments, b"new" * 33)
        return read_all(descriptor, offset, size)

    monkeypatch.setattr(module, "_read_all", slow_read)

    assert segments.read([place]) == [b"old" * 30]


def test_a_file_that_ends_early_is_an_error_and_not_short_data(tmp_path: Path) -> None:
    segments = a_folder(tmp_path)
    [place] = put(segments, b"payload")
    (path,) = (tmp_path / "segments").iterdir()
    path.write_bytes(b"pay")

    with pytest.raises(OSError, match="the index promises"):
        segments.read([place])


def test_payload_that_just_came_needs_no_file_and_after_a_restart_the_file_has_it(tmp_path: Path) -> None:
    segments = a_folder(tmp_path, is_synced=True, recent_bytes=100)
    places = put(segments, b"one", b"two")
    (path,) = (tmp_path / "segments").iterdir()
    kept = path.rename(tmp_path / "elsewhere")

    assert segments.read(places) == [b"one", b"two"]

    kept.rename(path)
    segments.close()
    again = a_folder(tmp_path)
    again.adopt(places)
    assert again.read(places) == [b"onetwo"]


def test_a_file_system_without_direct_writes_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> DirectFile:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(module, "DirectFile", refuse)
    segments = a_folder(tmp_path, is_synced=True)

    places = put(segments, b"one", b"two")

    assert segments.read(places) == [b"onetwo"]


def test_a_file_put_away_by_another_process_while_it_is_read_is_gone_and_not_other_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, reader = a_folder(tmp_path, retain_bytes=0), a_folder(tmp_path)
    [place] = put(server, b"old" * 30)
    put(server, b"x" * 100)
    read_all = module._read_all

    def slow_read(descriptor: int, offset: int, size: int) -> bytes:
        server.release([place])
        for _ in range(3):
            put(server, b"new" * 33)
        return read_all(descriptor, offset, size)

    monkeypatch.setattr(module, "_read_all", slow_read)

    with pytest.raises(FileNotFoundError):
        reader.read([place])


def test_a_new_folder_is_as_durable_as_the_files_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(module, "_sync_folder", synced.append)

    put(a_folder(tmp_path, is_synced=True), b"one")
    put(a_folder(tmp_path, is_synced=True), b"two")

    assert synced == [tmp_path, tmp_path / "segments", tmp_path / "segments"]


def test_a_file_system_that_refuses_the_first_direct_write_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "pwrite", refuse)
    segments = a_folder(tmp_path, is_synced=True)

    places = put(segments, b"one", b"two")

    assert segments.read(places) == [b"onetwo"]
