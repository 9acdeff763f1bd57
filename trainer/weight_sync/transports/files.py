"""Weights as folders `v<version>` on a disk that trainer and servers share: written whole or not at all, checked, cleared."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.weight_sync.errors import CorruptWeightsError, DiskFullError, WeightSyncError
from trainer.weight_sync.transports.safetensors_file import FileRecord, record_of, write_bytes

MANIFEST_NAME = "manifest.json"

# A server may still read the last version while the next one is written.
_LEAST_KEPT = 2
# A writer on another machine that has not touched its folder for so long is dead.
_ABANDONED_AFTER_S = 3600.0
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Whatever else lies in the folder is not ours to remove.
_VERSION_NAME = re.compile(r"v\d+")


@dataclass(frozen=True)
class Manifest:
    """What a version folder holds. `manifest.json` is written last, so a folder that has one was finished."""

    version: str
    tensors: int
    size_bytes: int
    """Of all files together, without the manifest."""
    files: Mapping[str, FileRecord]


class VersionFolders:
    """The versions in one folder. One process writes there; any number may read.

    Args:
        keep: versions that stay, the newest ones.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = max(keep, _LEAST_KEPT)

    def path(self, version: str) -> Path:
        """Where this version is, or would be."""
        return self._folder / f"v{version}"

    def write(
        self, version: str, fill: Callable[[Path], tuple[Mapping[str, FileRecord], int]], *, needed_bytes: int
    ) -> Path:
        """Let `fill` write a version into an empty folder, then put that in its place, instead of an earlier try.

        Args:
            fill: returns a record of each file, and the number of tensors.
            needed_bytes: about what it will write; 0 if nobody knows.

        Raises:
            DiskFullError: there is no room. What was there before is untouched.
            WeightSyncError: the folder cannot be written to.
        """
        with self._explained(version, needed_bytes):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._clear_temporary()
            if shutil.disk_usage(self._folder).free < needed_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            temporary = self._folder / _temporary_name("writing", f"v{version}")
            temporary.mkdir()
            try:
                files, tensors = fill(temporary)
                _write_manifest(temporary, version, files, tensors)
                self._put_in_place(temporary, self.path(version))
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            self._clear_old()
        return self.path(version)

    def _put_in_place(self, temporary: Path, path: Path) -> None:
        if path.exists():
            # A folder cannot be renamed onto one that is not empty.
            self._remove(path)
        temporary.rename(path)
        _sync_folder(self._folder)

    def _clear_old(self) -> None:
        """Remove all but the newest versions, by when they were written: a resumed trainer begins at a lower number."""
        finished = [
            path for path in self._folder.glob(f"v*/{MANIFEST_NAME}") if _VERSION_NAME.fullmatch(path.parent.name)
        ]
        finished.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for manifest in finished[self._keep :]:
            self._remove(manifest.parent)

    def _remove(self, path: Path) -> None:
        # Renamed first: what is left of a removal that breaks off must not look like a version.
        obsolete = self._folder / _temporary_name("obsolete", path.name)
        path.rename(obsolete)
        shutil.rmtree(obsolete, ignore_errors=True)

    def _clear_temporary(self) -> None:
        for path in [*self._folder.glob(".writing-*"), *self._folder.glob(".obsolete-*")]:
            idle_s = time.time() - path.stat().st_mtime
            if is_abandoned(path.name, hostname=socket.gethostname(), pid=os.getpid(), idle_s=idle_s):
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _explained(self, version: str, needed_bytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise WeightSyncError(
                    f"version {version} cannot be written to {self._folder}: {error}; "
                    "set weight_sync.folder to one that this process may write to"
                ) from error
            free_bytes = shutil.disk_usage(self._folder).free
            raise DiskFullError(
                self._folder, version, needed_bytes=needed_bytes, free_bytes=free_bytes, keep=self._keep
            ) from error


def check_folder(path: Path) -> Manifest:
    """Compare every file of a version with its record.

    Raises:
        CorruptWeightsError: one is missing, has another length or other bytes.
    """
    manifest = read_manifest(path)
    for name, expected in manifest.files.items():
        try:
            found_bytes = (path / name).stat().st_size
        except OSError:
            raise CorruptWeightsError(path / name, "is missing") from None
        if found_bytes != expected.size_bytes:
            raise CorruptWeightsError(path / name, f"has {found_bytes} bytes instead of {expected.size_bytes}")
        if (found := record_of(path / name)) != expected:
            raise CorruptWeightsError(path / name, f"has checksum {found.crc32} instead of {expected.crc32}")
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Read what a version folder should hold.

    Raises:
        CorruptWeightsError: there is no manifest, or it makes no sense.
    """
    try:
        content = json.loads((path / MANIFEST_NAME).read_bytes())
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        return Manifest(**content, files=files)
    except OSError:
        raise CorruptWeightsError(path / MANIFEST_NAME, "is missing: this is no finished version") from None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CorruptWeightsError(path / MANIFEST_NAME, f"is no manifest: {error}") from None


Stamps = Mapping[str, tuple[int, int, int]]
"""For each file what changes when somebody writes to it: size, and times of the last write and of the last change."""


def stamps(path: Path) -> Stamps:
    """Look at the files of a version without reading them; a missing one is absent here."""
    found = [entry for entry in path.iterdir() if entry.is_file()] if path.is_dir() else []
    return {
        entry.name: (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        for entry in found
        for status in [entry.stat()]
    }


def is_abandoned(name: str, *, hostname: str, pid: int, idle_s: float) -> bool:
    """Whether nobody writes to a temporary folder any more. Called when this process does not.

    Args:
        name: `.writing-v<version>-<hostname>-<pid>`.
        idle_s: since an entry was added to it.
    """
    writer_host, _, writer_pid = name.split("-", 2)[2].rpartition("-")
    if writer_host != hostname:
        return idle_s > _ABANDONED_AFTER_S
    return int(writer_pid) == pid or not _is_alive(int(writer_pid))


def copy_files(source: Path, target: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    """Copy small files and return their records."""
    return {name: write_bytes(target / name, [(source / name).read_bytes()]) for name in names}


def _temporary_name(purpose: str, version_name: str) -> str:
    return f".{purpose}-{version_name}-{socket.gethostname()}-{os.getpid()}"


def _write_manifest(folder: Path, version: str, files: Mapping[str, FileRecord], tensors: int) -> None:
    size_bytes = sum(record.size_bytes for record in files.values())
    manifest = Manifest(version, tensors, size_bytes, dict(files))
    write_bytes(folder / MANIFEST_NAME, [json.dumps(asdict(manifest), indent=1).encode()])
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
