"""FAKE inference engine: vLLM's /health, /weight_info, /is_paused, /pause and /resume; generates nothing.

FAKE_ENGINE=fail: dies while it loads. FAKE_ENGINE=slow: never answers. FAKE_ENGINE=stubborn: ignores SIGTERM and has a
helper process that does too.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

STATE: dict[str, Any] = {"weight_version": "default", "is_paused": False}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        answers: dict[str, dict[str, Any]] = {
            "/health": {},
            "/weight_info": {"weight_version": STATE["weight_version"]},
            "/is_paused": {"is_paused": STATE["is_paused"]},
        }
        self._answer(answers.get(path))

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        match urlsplit(self.path).path:
            case "/pause":
                STATE["is_paused"] = True
            case "/resume":
                STATE["is_paused"] = False
            case "/update_weight_version":
                STATE["weight_version"] = body["new_version"]
            case _:
                return self._answer(None)
        return self._answer({})

    def _answer(self, body: dict[str, Any] | None) -> None:
        content = json.dumps(body or {}).encode()
        self.send_response(404 if body is None else 200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    options, _ = parser.parse_known_args()
    behaviour = os.environ.get("FAKE_ENGINE", "")
    print(f"FAKE engine, pid {os.getpid()}, loading weights", flush=True)
    if behaviour == "fail":
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
        sys.exit(1)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    while behaviour == "slow":
        time.sleep(1)
    ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()
