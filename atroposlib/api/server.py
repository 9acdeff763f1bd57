"""The rollout server's application at its older import path: `uvicorn atroposlib.api.server:app`."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "app":
        from atroposlib.api.application import load_app

        return load_app()
    raise AttributeError(f"module 'atroposlib.api.server' has no attribute {name!r}")
