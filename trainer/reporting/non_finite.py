"""What a batch was whose loss or gradient is no number, for whoever has to find out why."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.batches.step_batch import StepBatch, TrainSequence

log = logging.getLogger(__name__)


def write_report(folder: Path, batch: StepBatch, figures: Mapping[str, Any]) -> Path | None:
    """Write folder/non_finite_step_N.json: the step's figures, and each group with its sequences, without their tokens.

    A number that is none stands there as text: "nan", "inf", "-inf".

    Returns:
        The file; None where it cannot be written, which is logged.
    """
    path = folder / f"non_finite_step_{batch.step}.json"
    groups: list[dict[str, Any]] = [{"group_id": group_id, "sequences": []} for group_id in batch.group_ids]
    for sequence in batch.sequences:
        groups[sequence.group_index]["sequences"].append(_facts(sequence))
    figures = {name: _number(value) for name, value in figures.items()}
    try:
        path.write_text(json.dumps({"step": batch.step, "figures": figures, "groups": groups}, indent=1) + "\n")
    except OSError as error:
        # The run ends for another reason, which must be the one that is told.
        log.warning("%s cannot be written: %s", path, error.strerror or error)
        return None
    return path


def _facts(sequence: TrainSequence) -> dict[str, Any]:
    is_trained_L = sequence.is_trained_L
    return {
        "score": _number(sequence.reward),
        "tokens": len(sequence.tokens_L),
        "completion_tokens": sequence.completion_tokens,
        "trained_tokens": sequence.trained_tokens,
        "is_truncated": sequence.is_truncated,
        "oldest_version": sequence.oldest_version,
        "temperature": sequence.temperature,
        "advantages_min_max": _bounds(sequence.advantages_L, is_trained_L),
        "inference_logprobs_min_max": _bounds(sequence.inference_logprobs_L, is_trained_L),
        "ref_logprobs_min_max": _bounds(sequence.ref_logprobs_L, is_trained_L),
    }


def _bounds(column_L: npt.NDArray[Any] | None, is_trained_L: npt.NDArray[np.bool_]) -> list[Any] | None:
    """Smallest and largest of the trained tokens; None where there are none."""
    if column_L is None or not is_trained_L.any():
        return None
    trained = column_L[is_trained_L]
    return [_number(float(trained.min())), _number(float(trained.max()))]


def _number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
