from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atroposlib.envs import tokenizers
from atroposlib.envs.base import APIServerConfig
from atroposlib.testing.byte_tokenizer import byte_tokenizer, save_byte_tokenizer
from tests.envs.fakes import CountingEnv


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_name(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizers.load_tokenizer.cache_clear()


@pytest.fixture
def make_env(tmp_path: Path) -> Callable[..., CountingEnv]:
    """A fresh class each time, so that a test may replace `make`."""

    def build(make: Callable[[int], Any] | None = None, **config: Any) -> CountingEnv:
        cls: Any = type("AnEnv", (CountingEnv,), {} if make is None else {"make": staticmethod(make)})
        settings = {"group_size": 2, "tokenizer_name": None, "run_dir": tmp_path / "run", "steps_per_eval": 0, **config}
        env: CountingEnv = cls(
            cls.env_config_cls(**settings), [APIServerConfig(base_url="http://localhost:1/v1", server_type="vllm")]
        )
        return env

    return build
