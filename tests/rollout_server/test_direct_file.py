"""Writes past the page cache: whatever the sizes, the file holds what was written, and a block is only ever added to."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.stores import direct_file
from rollout_server.stores.direct_file import BLOCK_BYTES, DirectFile

sizes = st.one_of(st.integers(1, 300), st.integers(BLOCK_BYTES - 2, BLOCK_BYTES + 2), st.integers(1, 3 * BLOCK_BYTES))


def a_file(path: Path) -> DirectFile:
    try:
        return DirectFile(path)
    except OSError as error:
        if error.errno == errno.EINVAL:
            pytest.skip("this file system has no direct writes")
        raise


@settings(max_examples=60, deadline=None)
@given(writes=st.lists(st.tuples(st.integers(0, 200), st.lists(sizes, min_size=1, max_size=5)), max_size=8))
def test_the_file_holds_what_was_written_where_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, list[int]]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct_file, "BUFFER_BYTES", 2 * BLOCK_BYTES)
        path = tmp_path_factory.mktemp("direct") / "file"
        file = a_file(path)
        expected = b""
        for number, (gap, lengths) in enumerate(writes):
            payloads = [bytes([1 + (number + i) % 250]) * length for i, length in enumerate(lengths)]
            file.write(len(expected) + gap, [memoryview(payload) for payload in payloads])
            expected += bytes(gap) + b"".join(payloads)

            assert path.read_bytes()[: len(expected)] == expected
        file.close()


def test_what_was_written_is_never_gone_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write of a block repeats what the block held: torn anywhere, it damages nothing older."""
    file = a_file(tmp_path / "file")
    written: list[tuple[int, bytes]] = []
    pwrite = os.pwrite

    def note(descriptor: int, data: memoryview, offset: int) -> int:
        written.append((offset, bytes(data)))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", note)
    file.write(0, [b"a" * 10])
    file.write(10, [b"b" * BLOCK_BYTES])
    file.close()

    assert [(offset, data[:10]) for offset, data in written] == [(0, b"a" * 10), (0, b"a" * 10)]


def test_payload_is_only_appended(tmp_path: Path) -> None:
    file = a_file(tmp_path / "file")
    file.write(0, [b"0123456789"])

    with pytest.raises(ValueError, match="lies before the end, 10"):
        file.write(4, [b"x"])
    file.close()


def test_a_file_that_refuses_its_first_write_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_file(tmp_path / "file").close()
    descriptors: list[int] = []

    def refuse(descriptor: int, data: memoryview, offset: int) -> int:
        descriptors.append(descriptor)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="Invalid argument"):
        DirectFile(tmp_path / "file")

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])
