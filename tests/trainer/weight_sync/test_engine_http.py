"""Closing a control while other threads are in the middle of calls."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.trainer.weight_sync.json_server import JsonServer
from trainer.weight_sync.engines.http import EngineHttp
from trainer.weight_sync.errors import ServerSyncError
from trainer.weight_sync.states import Edge


@pytest.fixture
def url() -> Iterator[str]:
    server = JsonServer(lambda *_: (200, {}))
    yield server.url
    server.die()


def test_a_call_that_was_connecting_when_its_control_closed_ends_and_leaves_no_socket(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, is_connecting, may_connect = socket.create_connection, threading.Event(), threading.Event()
    opened: list[socket.socket] = []

    def slowly(*args: Any, **options: Any) -> socket.socket:
        is_connecting.set()
        assert may_connect.wait(timeout=10)
        opened.append(connect(*args, **options))
        return opened[0]

    monkeypatch.setattr(socket, "create_connection", slowly)
    http = EngineHttp(url)
    with ThreadPoolExecutor() as threads:
        call = threads.submit(http.request, "GET", "/health", Edge.ATTACH, 10)
        assert is_connecting.wait(timeout=10)
        http.close()
        may_connect.set()

        assert call.result(timeout=10).status_code == 200
    assert [each.fileno() for each in opened] == [-1]


def test_a_closed_control_begins_no_call(url: str) -> None:
    http = EngineHttp(url)
    http.close()

    with pytest.raises(ServerSyncError, match=r"/health: this control is closed") as raised:
        http.request("GET", "/health", Edge.ATTACH, 10)
    assert raised.value.server == url
