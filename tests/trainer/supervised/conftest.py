"""What tests of the trainers on data sets share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> Iterator[None]:
    # transformers collects garbage after each run: without all that is imported, that is quick.
    gc.freeze()
    yield
    gc.unfreeze()
