"""The section `trainer` of a config of `atropos up`: keys that go on to atropos-trainer, and those that cannot stand there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

WIRING = frozenset(
    {"model_name_or_path", "rollout_server_url", "run_name", "inference_servers", "run_dir", "output_dir", "seed"}
)
"""Trainer keys that connect the processes."""

PRESET_GROUPS = frozenset({"recipe", "run", "model", "data", "trainer", "reward"})
"""Trainer keys that choose further keys by a name."""

WITHOUT_SERVERS = frozenset({"sft", "gkd"})
"""Methods of the trainer that read a data set."""

_SPELLING = re.compile(r"\+{0,2}(?:override )?/?([\w.]+)(?:@_global_)?")


class TrainerSection(BaseModel):
    """Keys for atropos-trainer. Those that `atropos up` needs to know stand here; it passes all of them on."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    batch_size: int = Field(default=64, ge=1)
    """Sequences of one optimizer step."""
    max_steps: int = Field(default=24, ge=1)
    max_staleness: int = Field(default=2, ge=0)
    """A sequence trained at version v was sampled by no version older than v - max_staleness."""
    learning_rate: float = Field(default=1e-5, gt=0)

    @model_validator(mode="after")
    def _leaves_wiring_to_us(self) -> TrainerSection:
        if ours := sorted(WIRING & (self.model_extra or {}).keys()):
            raise ValueError(f"{', '.join(ours)}: set by atropos up; remove it")
        return self

    @model_validator(mode="after")
    def _trains_on_rollouts(self) -> TrainerSection:
        method = (self.model_extra or {}).get("method")
        if method in WITHOUT_SERVERS:
            raise ValueError(
                f"method={method} learns from a data set, without servers and environments: run "
                f"atropos-trainer method={method} model_name_or_path=FOLDER dataset_path=FILE instead"
            )
        return self

    @model_validator(mode="after")
    def _says_what_a_preset_may_say(self) -> TrainerSection:
        unset = sorted(type(self).model_fields.keys() - self.model_fields_set)
        chosen = next(_presets(self.model_extra or {}), None)
        if chosen and unset:
            raise ValueError(
                f"{chosen} may choose {', '.join(unset)} too, and the defaults of atropos up would win: give "
                f"trainer.{', trainer.'.join(unset)} beside it"
            )
        return self


def _presets(keys: Mapping[str, Any]) -> Iterator[str]:
    """Presets that are chosen, as written; a trainer's file may hold them in sections."""
    for key, value in keys.items():
        match = _SPELLING.fullmatch(key)
        if isinstance(value, Mapping):
            yield from _presets(value)
        elif match and match[1].rpartition(".")[2] in PRESET_GROUPS and isinstance(value, str):
            yield f"{key}={value}"
