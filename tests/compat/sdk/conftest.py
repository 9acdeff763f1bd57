from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from atroposlib.envs import tokenizers
from atroposlib.testing.byte_tokenizer import byte_tokenizer, save_byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_name(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizers.load_tokenizer.cache_clear()
