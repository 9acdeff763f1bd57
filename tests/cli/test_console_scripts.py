"""The smaller console scripts: run-api, view-run, view-run-multimodal, inference-node-wandb-watcher."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import httpx
import pytest

from atroposlib.cli import inference_node_wandb_watcher as watcher
from atroposlib.cli import run_api, view_run, view_run_multimodal
from atroposlib.cli.example_page import Examples, image_urls, page_server
from atroposlib.cli.old_routes import OldRoutes
from rollout_server.config import ServerConfig
from tests.compat.old_bodies import ENV, REGISTRATION, old_group
from tests.processes import free_port, rollout_server_on_a_thread


@contextmanager
def served(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def rollout_url(tmp_path: Path) -> Iterator[str]:
    with rollout_server_on_a_thread(ServerConfig(port=0, data_dir=tmp_path / "data")) as url:
        yield url


def decode(tokens: list[int]) -> str:
    return f"decoded {tokens}"


# run-api


def entry_points_of(**points: str) -> Any:
    return lambda *, group, name: [EntryPoint(name, points[key], group) for key in points if key == group.split(".")[0]]


STARTED: list[list[str]] = []


def test_run_api_hands_its_arguments_to_the_installed_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The console script may point at run_api itself.
    points = entry_points_of(atropos=f"{__name__}:STARTED.append", console_scripts="atroposlib.cli.run_api:main")
    monkeypatch.setattr(run_api, "entry_points", points)

    run_api.main(["--host", "0.0.0.0", "--port", "8000", "--reload"])

    assert STARTED.pop() == ["--host", "0.0.0.0", "--port", "8000"]
    assert "--reload is ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    "points", [{}, {"console_scripts": "atroposlib.cli.run_api:main"}, {"atropos": "no_such_module:main"}]
)
def test_run_api_without_the_server_names_what_to_install(
    points: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_api, "entry_points", entry_points_of(**points))

    with pytest.raises(SystemExit) as exit_info:
        run_api.main([])

    assert exit_info.value.code == 1
    assert "pip install 'atroposlib[server]'" in capsys.readouterr().err


def test_run_api_finds_the_server_that_is_installed_here() -> None:
    assert run_api._load().__module__ == "rollout_server.cli"


# view-run


def test_the_page_shows_groups_as_they_come_and_changes_nothing(rollout_url: str) -> None:
    httpx.post(f"{rollout_url}/register", json=REGISTRATION)
    httpx.post(f"{rollout_url}/register-env", json=ENV)
    with OldRoutes(rollout_url) as routes, served(page_server(Examples(routes, decode), 0)) as url:
        before = httpx.get(url).text
        for number in (1.0, 2.0):
            httpx.post(f"{rollout_url}/scored_data", json=old_group(number))
            page = httpx.get(url).text
            assert page == httpx.get(url).text, "the same group again is not another one"

    assert "No group has arrived yet" in before
    assert "Group 2" in page
    assert "Group 1" in page
    assert "decoded [1, 2, 3]" in page
    assert httpx.get(f"{rollout_url}/status").json() == {"current_step": 0, "queue_size": 2}
    assert httpx.get(f"{rollout_url}/wandb_info").json()["group"] == "g"


def test_the_page_says_when_the_server_is_away() -> None:
    with OldRoutes(f"127.0.0.1:{free_port()}") as routes:
        assert "does not answer" in Examples(routes, decode).html()


def test_other_pages_cannot_read_it_through_a_name_of_their_own() -> None:
    with OldRoutes("127.0.0.1:1") as routes, served(page_server(Examples(routes, decode), 0)) as url:
        assert httpx.get(url, headers={"Host": "evil.example:9001"}).status_code == 404
        assert httpx.get(f"{url}/else").status_code == 404


def test_messages_are_shown_as_text_never_as_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    with OldRoutes("127.0.0.1:1") as routes:
        group = {"tokens": [[1]], "scores": [1.0], "messages": ["<script>alert(1)</script>"], "images": ['"><script>']}
        monkeypatch.setattr(routes, "get", lambda path: group)

        page = Examples(routes, decode, has_images=True).html()

    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("images", "urls"),
    [
        (None, []),
        ([], []),
        ([["not base64!"]], []),
        (['eHh4">'], []),
        ([[base64.b64encode(b"\xff\xd8x").decode()], ["ignored"]], ["data:image/jpeg;base64,/9h4"]),
        (["data:image/png;base64,eHh4"], ["data:image/png;base64,eHh4"]),
    ],
)
def test_the_first_image_is_shown_where_it_is_one(images: Any, urls: list[str]) -> None:
    assert list(image_urls(images)) == urls


@pytest.mark.parametrize("script", [view_run, view_run_multimodal])
def test_the_flags_of_old_are_taken_and_a_taken_port_is_one_line(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        argv = ["--port", str(other.server_port), "--group-size", "4", "--max-token-len", "64", "--tokenizer", "x"]
        assert script.main(argv) == 1

    assert "error: cannot listen on port" in capsys.readouterr().err


# inference-node-wandb-watcher


class HealthHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health_generate" else 404)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def test_health_of_every_server_is_logged_at_the_run_step(rollout_url: str) -> None:
    logged: list[tuple[dict[str, int], dict[str, int]]] = []
    with served(ThreadingHTTPServer(("127.0.0.1", 0), HealthHandler)) as well, OldRoutes(rollout_url) as routes:
        urls = [f"{well}/health_generate", f"{well}/other", f"http://127.0.0.1:{free_port()}/health_generate"]
        watcher.log_health(routes, urls, 3, lambda metrics, **step: logged.append((metrics, step)))

    health = {"server/server_health_3_0": 1, "server/server_health_3_1": 0, "server/server_health_3_2": 0}
    assert logged == [(health, {"step": 0})]


def test_health_is_logged_while_the_rollout_server_is_away() -> None:
    logged: list[Any] = []
    with OldRoutes(f"127.0.0.1:{free_port()}") as routes:
        watcher.log_health(routes, [], 0, lambda metrics, **step: logged.append((metrics, step)))

    assert logged == [({}, {})]


@pytest.mark.parametrize(("tp", "ports"), [(1, range(9000, 9008)), (3, range(9000, 9002)), (8, range(9000, 9001))])
def test_one_server_for_so_many_gpus(tp: int, ports: range) -> None:
    assert watcher.health_urls(tp) == [f"http://localhost:{port}/health_generate" for port in ports]


@pytest.mark.parametrize("argv", [[], ["--api_addr", "x", "--tp", "0", "--node_num", "0"]])
def test_what_is_missing_or_impossible_is_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        watcher.main(argv)
    assert exit_info.value.code == 2
