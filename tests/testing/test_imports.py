"""The mock starts at once: it loads no model library, no web framework, no client."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"torch", "transformers", "openai", "fastapi", "aiohttp", "httpx", "rich", "jinja2", "pytest"}


def test_the_mock_and_the_package_are_light() -> None:
    code = (
        "import sys, atroposlib.testing, atroposlib.testing.mock_inference, atroposlib.testing.builders;"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30).stdout

    assert set(loaded.split()) & HEAVY == set()


def test_the_public_names_are_those_of_all() -> None:
    import atroposlib.testing

    assert sorted(atroposlib.testing.__all__) == sorted(atroposlib.testing._HOMES)
    assert all(getattr(atroposlib.testing, name) is not None for name in atroposlib.testing.__all__)
