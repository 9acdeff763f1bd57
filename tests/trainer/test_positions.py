"""How long a sequence a model takes, by its configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from trainer.policy.loading import positions_of

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("positions", "scaling", "expected"),
    [
        (4096, None, 4096),
        (4096, {"rope_type": "linear", "factor": 2.0}, 8192),
        (131072, {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192, **LLAMA3}, 131072),
        (32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (32768, {"rope_type": "yarn", "factor": 4.0}, 131072),
        (163840, {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}, 163840),
    ],
    ids=["plain", "linear", "llama3", "yarn-first-length", "yarn-unnamed", "yarn-whole-length"],
)
def test_scaled_positions_are_counted_once(positions: int, scaling: dict[str, Any] | None, expected: int) -> None:
    config = LlamaConfig(max_position_embeddings=positions, rope_parameters=scaling and {"rope_theta": 1e4, **scaling})

    assert positions_of(config) == expected


def test_a_configuration_that_does_not_say_bounds_nothing() -> None:
    assert positions_of(SimpleNamespace()) is None
