from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atroposlib.envs.tokenizers import load_tokenizer
from atroposlib.testing.byte_tokenizer import byte_tokenizer

SMOLLM = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def smollm() -> Any:
    if not (SMOLLM / "tokenizer.json").is_file():
        pytest.skip("no demo model (scripts/install)")
    return load_tokenizer(str(SMOLLM))
