"""Versions on disk: written whole or not at all, checked file by file, cleared away in time."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from trainer.weight_sync.errors import CorruptWeightsError, DiskFullError, WeightSyncError
from trainer.weight_sync.transports import files
from trainer.weight_sync.transports.files import MANIFEST_NAME, VersionFolders, check_folder, is_abandoned
from trainer.weight_sync.transports.safetensors_file import (
    INDEX_NAME,
    FileRecord,
    spec_of,
    tensor_shapes,
    write_model,
    write_tensors,
)

Fill = Callable[[Path], tuple[Mapping[str, FileRecord], int]]

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def some_weights(value: float = 1.0, count: int = 4) -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": torch.full((8, 4), value + i) for i in range(count)}


def filling(weights: Mapping[str, torch.Tensor], *, shard_bytes: int = 2**20) -> Fill:
    return lambda folder: write_model(folder, weights.items(), dtype=torch.bfloat16, shard_bytes=shard_bytes)


def write(versions: VersionFolders, version: str, value: float = 1.0, *, needed_bytes: int = 0) -> Path:
    return versions.write(version, filling(some_weights(value)), needed_bytes=needed_bytes)


@pytest.fixture
def versions(tmp_path: Path) -> VersionFolders:
    return VersionFolders(tmp_path / "weights", keep=2)


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Make the kernel refuse to let files grow further, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    found = {}
    for i in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(FLOATS + OTHERS))
        found[f"model.{i}"] = (torch.randn(shape) * 3).to(dtype)
    return found


@given(weights=tensors(), shard_bytes=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_the_format_s_own_reader_finds_every_tensor_in_the_dtype_asked_for(
    tmp_path_factory: pytest.TempPathFactory, weights: dict[str, torch.Tensor], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("model")

    records, count = write_model(folder, weights.items(), dtype=torch.bfloat16, shard_bytes=shard_bytes)

    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == weights.keys()
    assert count == len(weights)
    for name, tensor in weights.items():
        expected = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
    assert {path.name for path in folder.iterdir()} == records.keys()
    assert tensor_shapes(folder) == {name: tuple(tensor.shape) for name, tensor in weights.items()}


def test_one_file_has_the_usual_name_and_says_that_it_is_for_pytorch(tmp_path: Path) -> None:
    write_model(tmp_path, some_weights().items(), dtype=torch.bfloat16, shard_bytes=2**20)

    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    weights = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(3), "c": torch.ones(2, dtype=torch.int64)}

    write_model(tmp_path, weights.items(), dtype=torch.bfloat16, shard_bytes=2**20)

    content = (tmp_path / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    starts = {name: header[name]["data_offsets"][0] for name in weights}
    assert header_bytes % 8 == 0
    assert (starts["b"] % 2, starts["c"] % 8) == (0, 0)


def test_shards_come_with_an_index_that_transformers_understands(tmp_path: Path) -> None:
    write_model(tmp_path, some_weights(count=5).items(), dtype=torch.bfloat16, shard_bytes=2 * 64)

    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 5 * 64
    for name, file_name in index["weight_map"].items():
        assert name in load_file(tmp_path / file_name)
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_a_stream_of_weights_is_held_shard_by_shard(tmp_path: Path) -> None:
    alive: set[int] = set()
    most = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for i in range(12):
            tensor = torch.ones(8, 4)
            alive.add(i)
            weakref.finalize(tensor, alive.discard, i)
            most = max(most, len(alive))
            yield f"layer.{i}", tensor

    write_model(tmp_path, stream(), dtype=torch.bfloat16, shard_bytes=3 * 64)

    assert most <= 4  # three in the shard, and the one that did not fit


def test_a_version_says_what_it_holds(versions: VersionFolders) -> None:
    path = write(versions, "7")

    manifest = check_folder(path)

    assert (path.name, manifest.version, manifest.tensors) == ("v7", "7", 4)
    assert manifest.size_bytes == (path / "model.safetensors").stat().st_size


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (Path.unlink, "model.safetensors is missing"),
        (_truncate, "model.safetensors has 574 bytes instead of 584"),
        (_flip, "model.safetensors has checksum .* instead of"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(
    versions: VersionFolders, damage: Callable[[Path], None], problem: str
) -> None:
    path = write(versions, "1")
    damage(path / "model.safetensors")

    with pytest.raises(CorruptWeightsError, match=problem):
        check_folder(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {"a": 1}}', '{"files": {}, "version": "1"}'])
def test_a_folder_without_a_sound_manifest_is_no_version(versions: VersionFolders, content: str) -> None:
    path = write(versions, "1")
    (path / MANIFEST_NAME).write_text(content)

    with pytest.raises(CorruptWeightsError, match=MANIFEST_NAME):
        check_folder(path)


def test_a_folder_that_is_not_there_is_no_version(versions: VersionFolders) -> None:
    with pytest.raises(CorruptWeightsError, match="is missing: this is no finished version"):
        check_folder(versions.path("9"))


def test_a_version_can_be_written_again(versions: VersionFolders) -> None:
    write(versions, "1", 1.0)

    path = write(versions, "1", 5.0)

    check_folder(path)
    assert load_file(path / "model.safetensors")["layer.0.weight"].float().eq(5.0).all()
    assert [entry.name for entry in path.parent.iterdir()] == ["v1"]


def test_the_newest_versions_stay(versions: VersionFolders) -> None:
    for version in ("8", "9", "10"):
        path = write(versions, version)

    assert sorted(entry.name for entry in path.parent.iterdir()) == ["v10", "v9"]


def test_two_versions_stay_however_few_are_asked_for(tmp_path: Path) -> None:
    versions = VersionFolders(tmp_path, keep=0)
    for version in ("1", "2", "3"):
        write(versions, version)

    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["v2", "v3"]


def test_a_trainer_that_resumed_at_a_lower_number_keeps_what_it_writes(versions: VersionFolders) -> None:
    for version in ("41", "42"):
        write(versions, version)

    path = write(versions, "7")

    check_folder(path)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["v42", "v7"]


def test_what_is_not_a_version_is_left_alone(versions: VersionFolders) -> None:
    path = write(versions, "1")
    foreign = path.parent / "vision"
    foreign.mkdir()
    (foreign / MANIFEST_NAME).write_text("{}")
    for version in ("2", "3", "4"):
        write(versions, version)

    assert (foreign / MANIFEST_NAME).exists()


def test_an_error_half_way_leaves_nothing_and_the_last_version_whole(versions: VersionFolders) -> None:
    path = write(versions, "1")

    def failing(folder: Path) -> tuple[Mapping[str, FileRecord], int]:
        filling(some_weights())(folder)
        raise MemoryError("no room to gather")

    with pytest.raises(MemoryError):
        versions.write("2", failing, needed_bytes=0)

    check_folder(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["v1"]


def test_a_disk_that_fills_up_is_named_and_leaves_the_last_version_whole(versions: VersionFolders) -> None:
    path = write(versions, "1")

    with largest_file(300), pytest.raises(DiskFullError) as caught:
        write(versions, "2", needed_bytes=256)

    free_bytes = caught.value.free_bytes
    assert f"no room in {path.parent} for version 2: it takes about 256 bytes, {free_bytes:,} are free" in str(
        caught.value
    )
    check_folder(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["v1"]
    assert versions.write("2", filling(some_weights()), needed_bytes=0).exists()


def test_a_version_that_cannot_fit_is_refused_before_anything_is_written(versions: VersionFolders) -> None:
    filled: list[Path] = []

    def fill(folder: Path) -> tuple[dict[str, FileRecord], int]:
        filled.append(folder)
        return {}, 0

    with pytest.raises(DiskFullError, match="it takes about 1,000,000,000,000,000,000 bytes"):
        versions.write("1", fill, needed_bytes=10**18)

    assert filled == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("a file, not a folder")

    with pytest.raises(WeightSyncError, match=r"version 1 cannot be written to .*weights: .*set weight_sync.folder"):
        write(VersionFolders(tmp_path / "weights", keep=2), "1")


def test_what_a_dead_writer_left_is_cleared_and_a_living_writer_s_is_not(versions: VersionFolders) -> None:
    folder = write(versions, "1").parent
    host = socket.gethostname()
    dead = folder / f".writing-v2-{host}-{_dead_pid()}"
    alive = folder / f".writing-v2-{host}-{os.getppid()}"
    for leftover in (dead, alive):
        leftover.mkdir()
        (leftover / "shard-0").write_bytes(b"x")

    write(versions, "2")

    assert not dead.exists()
    assert alive.exists()


@pytest.mark.parametrize(
    ("host", "pid", "idle_s", "expected"),
    [
        ("here-1", os.getpid(), 0.0, True),  # this process does not write at the moment: an earlier one had its number
        ("here-1", os.getppid(), 1e6, False),
        ("elsewhere", 1, 60.0, False),
        ("elsewhere", 1, 1e4, True),
    ],
    # Of its own: process numbers differ between the workers that run the tests.
    ids=["this process", "its parent", "elsewhere, a minute ago", "elsewhere, hours ago"],
)
def test_a_writer_elsewhere_is_given_an_hour(host: str, pid: int, idle_s: float, expected: bool) -> None:
    name = f".writing-v3-{host}-{pid}"

    assert is_abandoned(name, hostname="here-1", pid=os.getpid(), idle_s=idle_s) is expected


def test_stamps_change_when_a_file_is_written_to_even_if_its_times_are_set_back(versions: VersionFolders) -> None:
    path = write(versions, "1")
    before = files.stamps(path)
    status = (path / "model.safetensors").stat()

    _flip(path / "model.safetensors")
    os.utime(path / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))

    assert files.stamps(path) != before


def test_a_full_disk_is_told_from_other_trouble(versions: VersionFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(DiskFullError):
        write(versions, "1")


def test_a_tensor_larger_than_the_pieces_that_it_is_converted_in_arrives_whole(tmp_path: Path) -> None:
    tensor = torch.randn(300, 333)

    write_model(tmp_path, [("a", tensor)], dtype=torch.bfloat16, shard_bytes=2**20)

    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensor.to(torch.bfloat16))


def test_an_adapter_keeps_its_own_dtype(tmp_path: Path) -> None:
    tensor = torch.randn(3, 5, dtype=torch.float64).T

    write_tensors(tmp_path / "a.safetensors", [(spec_of("a", tensor, tensor.dtype), tensor)])

    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], tensor)


def _dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid
