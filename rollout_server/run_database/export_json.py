"""Exported groups as JSON lines: ours, which says everything, and the form of Atropos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from atroposlib.wire.columns import Group
from atroposlib.wire.json_codec import group_to_json
from atroposlib.wire.models import GroupRecord

TOKEN_COLUMNS = (
    "tokens", "loss_mask", "inference_logprobs", "advantages", "ref_logprobs", "labels", "distill_token_ids",
    "distill_logprobs",
)  # fmt: skip
"""One row for each of the T tokens; a list for each sequence when exported."""
HEADER_FACTS = (
    "run_id", "ticket", "finish_reasons", "messages", "generation_params", "overrides", "group_overrides", "images",
    "extra",
)  # fmt: skip


class JsonLinesWriter:
    """One group a line: where it is, its facts, and a list for each sequence.

    Args:
        path: a new file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._encoder = msgspec.json.Encoder()

    def write(self, record: GroupRecord, group: Group) -> None:
        """One line."""
        self._file.write(self._encoder.encode(self._line(record, group)) + b"\n")

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def _line(self, record: GroupRecord, group: Group) -> Mapping[str, Any]:
        return (
            {"group_id": group.group_id, "env_id": group.env_id, "state": record.state, "step": record.step}
            | {"reason": record.reason, "scores": group.scores.tolist()}
            | {name: per_sequence(group, getattr(group, name)) for name in TOKEN_COLUMNS}
            | {"policy_versions": per_sequence(group, group.versions_per_token())}
            | {name: getattr(group, name) for name in HEADER_FACTS}
        )


class AtroposWriter(JsonLinesWriter):
    """One group a line, with the keys that Atropos' environments save their groups with."""

    def _line(self, record: GroupRecord, group: Group) -> Mapping[str, Any]:
        return {key: value for key, value in group_to_json(group).items() if key != "env_id"}


def per_sequence(group: Group, column: npt.NDArray[Any] | None) -> list[Any] | None:
    """A [T] or [T, K] column as a list for each sequence."""
    return None if column is None else [part.tolist() for part in np.split(column, group.cu_seqlens[1:-1])]
