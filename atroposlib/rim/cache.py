"""Verdicts that were given before: in memory, and in a folder that later runs can share."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atroposlib.rim.asking import JudgeCall
from atroposlib.rim.config import RIMConfig
from atroposlib.rim.verdict import Principle, Verdict

log = logging.getLogger(__name__)


class VerdictCache:
    """The latest verdicts by key. Several threads, and several processes with one folder, may use it.

    Args:
        size: verdicts kept in memory.
        folder: one small file for each verdict; None: memory only.
    """

    def __init__(self, size: int, folder: Path | None = None) -> None:
        self._size = size
        self._folder = folder
        self._verdicts: OrderedDict[str, Verdict] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def is_on_disk(self) -> bool:
        """Whether get and put may take as long as a file system does."""
        return self._folder is not None

    def get(self, key: str) -> Verdict | None:
        """The verdict of a key; an unreadable file is none."""
        with self._lock:
            if key in self._verdicts:
                self._verdicts.move_to_end(key)
                return self._verdicts[key]
        found = None if self._folder is None else _read(_file(self._folder, key))
        if found is not None:
            self._keep(key, found)
        return found

    def put(self, key: str, verdict: Verdict) -> None:
        """Remember it. A folder that cannot be written costs the file, not the verdict."""
        self._keep(key, verdict)
        if self._folder is not None:
            try:
                _write(_file(self._folder, key), verdict)
            except OSError as error:
                log.warning("a verdict is not kept in rim.cache_dir: %s", error)

    def _keep(self, key: str, verdict: Verdict) -> None:
        with self._lock:
            self._verdicts[key] = verdict
            self._verdicts.move_to_end(key)
            while len(self._verdicts) > self._size:
                self._verdicts.popitem(last=False)


def cache_key(call: JudgeCall, config: RIMConfig) -> str:
    """Names the question: judge, model and its server, prompt, temperature and which sample."""
    models, servers = config.models, config.model_configs
    model, server = (models.large_model, servers.large) if call.is_large else (models.small_model, servers.default)
    asked = json.dumps([call.judge, model, server.base_url, call.prompt, call.temperature, call.nth])
    return hashlib.sha256(asked.encode()).hexdigest()


def _file(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key[2:]}.json"


def _read(file: Path) -> Verdict | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        principles = tuple(Principle(**one) for one in data.pop("principles"))
        # Files of earlier versions hold no evidence.
        evidence = tuple(map(str, data.pop("evidence", ())))
        return Verdict(**data, principles=principles, evidence=evidence)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s is no verdict and is ignored: %s", file, error)
        return None


def _write(file: Path, verdict: Verdict) -> None:
    data: dict[str, Any] = asdict(verdict)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as target:
            json.dump(data, target)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
