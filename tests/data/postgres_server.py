"""A real Postgres server for tests, in a folder of its own, on a free port, with a password."""

from __future__ import annotations

import glob
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.processes import free_port

USER = "reader"
PASSWORD = "s3cret@of/the:db"
QUOTED_PASSWORD = "s3cret%40of%2Fthe%3Adb"
START_TIMEOUT_S = 30.0


def _binaries() -> Path | None:
    """The folder with initdb and postgres: on the PATH, or where Debian puts them."""
    found = [shutil.which("initdb"), *sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), reverse=True)]
    return next((Path(path).parent for path in found if path), None)


class PostgresProcess:
    """One server. Postgres refuses to run as root, who runs it as the user `postgres`."""

    def __init__(self) -> None:
        binaries = _binaries()
        if binaries is None:
            pytest.skip("no Postgres server (initdb); apt-get install postgresql")
        if importlib.util.find_spec("psycopg") is None:
            pytest.skip('no psycopg; pip install "psycopg[binary]"')
        self._binaries = binaries
        self._as_user = "postgres" if os.geteuid() == 0 else None
        # Not below pytest's own folder, which other users may not enter.
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str = "postgres", *, password: str = QUOTED_PASSWORD) -> str:
        return f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        (self._folder / "password").write_text(PASSWORD)
        if self._as_user is not None:
            for path in (self._folder, self._folder / "password"):
                shutil.chown(path, self._as_user)
        data = str(self._folder / "data")
        options = ["-U", USER, "--pwfile", str(self._folder / "password"), "-A", "scram-sha-256", "-E", "UTF8", "-N"]
        made = subprocess.run(
            [str(self._binaries / "initdb"), "-D", data, *options],
            user=self._as_user, cwd=self._folder, capture_output=True, timeout=60,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr.decode()
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [str(self._binaries / "postgres"), "-D", data, "-k", str(self._folder), "-p", str(self.port),
                 "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=10"],
                user=self._as_user, cwd=self._folder, stdout=log, stderr=log,
            )  # fmt: skip
        self._wait()

    def _wait(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < end, "Postgres did not start"
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        psycopg = importlib.import_module("psycopg")
        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            # Fast shutdown: connections are ended.
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(timeout=10)
        shutil.rmtree(self._folder, ignore_errors=True)
