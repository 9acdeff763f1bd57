from __future__ import annotations

from collections.abc import Iterator

import pytest

from atroposlib.envs import tokenizers
from atroposlib.testing.byte_tokenizer import save_byte_tokenizer


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Path of a tokenizer that needs no download."""
    yield save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizers.load_tokenizer.cache_clear()
