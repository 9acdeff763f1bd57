"""The SDK is light to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "fastapi", "vllm", "openai", "aiohttp", "reasoning_gym")


@pytest.mark.parametrize(
    "module",
    [
        "atroposlib",
        "atroposlib.envs",
        "atroposlib.envs.base",
        "atroposlib.envs.cli",
        "atroposlib.envs.reward_fns",
        "atroposlib.api",
        "atroposlib.client",
    ],
)
def test_nothing_heavy_is_loaded(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.strip() == "[]"


def test_a_generic_tokenizer_is_loaded_without_torch(tokenizer_name: str) -> None:
    code = (
        "import sys; from atroposlib.envs.tokenizers import load_tokenizer;"
        f"load_tokenizer({tokenizer_name!r}).encode('x'); print('torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.strip() == "False"
