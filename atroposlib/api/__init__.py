"""The rollout server's application at the import path that Atropos users know: `uvicorn atroposlib.api:app`."""

from __future__ import annotations

from typing import Any

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name == "app":
        from atroposlib.api.application import load_app

        return load_app()
    raise AttributeError(f"module 'atroposlib.api' has no attribute {name!r}")
