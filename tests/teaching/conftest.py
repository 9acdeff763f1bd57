from __future__ import annotations

from collections.abc import Iterator

import pytest

from atroposlib.envs import tokenizers
from atroposlib.testing.byte_tokenizer import save_byte_tokenizer
from atroposlib.testing.loop_watch import LoopWatch


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Path of a tokenizer that needs no download."""
    yield save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizers.load_tokenizer.cache_clear()


@pytest.fixture(autouse=True)
def patient_with_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine holds up an event loop for longer than the tenth of a second that check_env allows an environment."""
    defaults = LoopWatch.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "threshold_s", 5.0)
