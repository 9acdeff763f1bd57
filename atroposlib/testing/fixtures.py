"""pytest fixtures: `pytest_plugins = ["atroposlib.testing.fixtures"]` in conftest.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atroposlib.testing.mock_inference import MockInferenceServer, in_thread


@pytest.fixture
def mock_inference() -> Iterator[MockInferenceServer]:
    """A mock inference server on a thread of its own; replace `mock_inference.policy` to script it."""
    with in_thread(MockInferenceServer()) as server:
        yield server


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The byte tokenizer."""
    from atroposlib.testing.byte_tokenizer import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the byte tokenizer, for `tokenizer_name` of a config."""
    from atroposlib.testing.byte_tokenizer import save_byte_tokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return save_byte_tokenizer(folder)
