"""Checkpoint folders that are whole or do not count. A marker, written last, says what the folder must hold.

A folder counts when its marker is there and every file has the size that the marker names; archives of weights and of
optimizer states must have a readable table of contents. Bits that rot inside a file of the right size are not noticed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

log = logging.getLogger(__name__)

MARKER = "atropos.json"

_ARCHIVES = (".pt", ".pth", ".bin")
"""What torch.save writes: zip files."""
_WRITE_FAILURES = ("PytorchStreamWriter", "inline_container", "unexpected pos", "No space left", "File too large")
"""How torch tells of a file that it could not write, in a RuntimeError."""


def mark_complete(folder: Path, *, step: int, run_name: str, settings: Mapping[str, Any] | None = None) -> None:
    """Say that the checkpoint after `step` steps is whole. When this returns, it survives a loss of power.

    Args:
        settings: the options that it was trained with, as far as they change what is learnt.
    Raises:
        OSError: it does not.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    for path in files:
        sync(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    facts = {"step": step, "run_name": run_name, "settings": dict(settings or {}), "files": sizes}
    temporary = folder / f"{MARKER}.tmp"
    temporary.write_text(json.dumps(facts, default=str) + "\n", encoding="utf-8")
    sync(temporary)
    temporary.replace(folder / MARKER)
    for place in (*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent):
        sync(place)


def last_complete(output_dir: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint and the number of steps behind it; None when there is none.

    A marked one that is damaged is passed over, and named in the log.
    """
    for step, folder in sorted(_folders(output_dir), reverse=True):
        if not (folder / MARKER).is_file():
            continue
        facts = _facts(folder)
        damage = "its marker cannot be read" if facts is None else damage_of(folder, facts["files"])
        if damage is None:
            return folder, step
        log.warning("checkpoint %s is damaged (%s) and not used; looking for the one before", folder, damage)
    return None


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings that mark_complete was given; empty where it was given none."""
    facts = _facts(folder)
    return {} if facts is None else dict(facts["settings"])


def damage_of(folder: Path, sizes: Mapping[str, int]) -> str | None:
    """What is wrong with a checkpoint; None when nothing is seen.

    Args:
        sizes: bytes of each file, by its path in the folder.
    """
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
        if not _is_readable(path):
            return f"{name} is no file of its kind any more"
    return None


def clear(folder: Path) -> None:
    """Remove what an earlier attempt left: the marker first, so that a half removed folder does not count."""
    if folder.is_dir():
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def clear_after(output_dir: Path, step: int) -> None:
    """Remove what stands after the newest whole checkpoint, which is after `step` steps: none of it is whole."""
    for number, folder in _folders(output_dir):
        if number > step:
            clear(folder)


def rotate(output_dir: Path, *, limit: int, best: str | None = None) -> None:
    """Remove the oldest checkpoints, all but `limit`.

    Args:
        limit: at least 2.
        best: name of the folder that stays, besides the newest.
    """
    folders = [folder for _, folder in sorted(_folders(output_dir))]
    spare = [folder for folder in folders[:-1] if folder.name != best]
    for folder in spare[: max(0, len(folders) - limit)]:
        clear(folder)


def put_in_place(written: Path, folder: Path) -> None:
    """Make a finished folder appear under its name, in the place of an older one."""
    clear(folder)
    written.replace(folder)


def is_write_failure(error: BaseException) -> bool:
    """Whether a disk, not our code, is to blame for a checkpoint that could not be written."""
    if isinstance(error, OSError | SafetensorError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _WRITE_FAILURES)


def lack_of_room(output_dir: Path) -> str | None:
    """Why no checkpoint as large as the largest one fits on the disk; None where one does, or none is there to tell."""
    sizes = [sum(facts["files"].values()) for _, folder in _folders(output_dir) if (facts := _facts(folder))]
    free = shutil.disk_usage(output_dir).free if sizes else 0
    if not sizes or free >= max(sizes):
        return None
    return f"{free / 2**20:.0f} MiB are free in {output_dir}, the largest one took {max(sizes) / 2**20:.0f} MiB"


def follow_umask(folder: Path) -> None:
    """Give the files the permissions that new files get: safetensors makes its own readable to their owner alone."""
    probe = folder / ".permissions"
    os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666))
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _folders(output_dir: Path) -> list[tuple[int, Path]]:
    named = ((re.fullmatch(r"checkpoint-(\d+)", folder.name), folder) for folder in output_dir.glob("checkpoint-*"))
    return [(int(match.group(1)), folder) for match, folder in named if match]


def _facts(folder: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = (
        isinstance(facts, dict) and isinstance(facts.get("files"), dict) and isinstance(facts.get("settings"), dict)
    )
    return facts if is_whole else None


def _is_readable(path: Path) -> bool:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="np"):
                return True
        except (SafetensorError, OSError):
            return False
    return path.suffix not in _ARCHIVES or zipfile.is_zipfile(path) or _is_pickle(path)


def _is_pickle(path: Path) -> bool:
    """training_args.bin and others may be plain pickles."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80"
