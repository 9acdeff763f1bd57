"""Data sets under the names that recipes know them by."""

from __future__ import annotations

from typing import Any

from atroposlib.errors import DataError

_ARC = {"loader": "arc_atlas", "dataset_id_or_path": "Arc-Intelligence/Arc-ATLAS-Teach-v0"}
_GSM8K = {"loader": "math", "dataset_id_or_path": "openai/gsm8k", "dataset_config": "main"}

PRESETS: dict[str, dict[str, Any]] = {
    "runtime_traces": {"loader": "runtime_traces"},
    "runtime_pg": {"loader": "runtime_pg", "form": "conversation"},
    "arc_atlas_rl": {**_ARC, "form": "rl", "dataset_split": "rl"},
    "arc_atlas_sft": {**_ARC, "form": "conversation", "dataset_split": "sft", "eval_split_ratio": 0.0},
    "big_math_rl": {
        "loader": "math",
        "dataset_id_or_path": "open-r1/Big-Math-RL-Verified-Processed",
        "dataset_level_filter": "level_4_5",
        "dataset_max_samples": 1000,
        "eval_split_ratio": 0.0,
    },
    "gsm8k_grpo": {**_GSM8K, "form": "rl"},
    "gsm8k_gkd": {**_GSM8K, "form": "conversation"},
    "meta_math_grpo": {"loader": "math", "dataset_id_or_path": "meta-math/MetaMathQA", "form": "rl"},
}


def preset_values(name: str) -> dict[str, Any]:
    """What a preset sets.

    Raises:
        DataError: there is no such preset.
    """
    try:
        return PRESETS[name]
    except KeyError as error:
        raise DataError(f"there is no data preset {name!r}; there are {', '.join(PRESETS)}") from error
