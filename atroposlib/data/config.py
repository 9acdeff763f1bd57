"""DataConfig: which data set, which of its rows, and how they are split."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from atroposlib.data.presets import preset_values
from atroposlib.data.registry import canonical_name

Form = Literal["rl", "flat", "conversation"]


class DataConfig(BaseModel):
    """A data set, and what becomes of its rows: they are filtered, capped, shuffled and split, in this order."""

    # A mistyped key must not print the database's password.
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), hide_input_in_errors=True
    )

    loader: str = "rows"
    """What reads the data: rows (your own), math, arc_atlas, runtime_traces, runtime_pg, a name that was registered, or MODULE:FUNCTION."""
    loader_modules: tuple[str, ...] = ()
    """Modules that loader may import as MODULE:FUNCTION."""
    form: Form | None = None
    """rl: a prompt and what is right; conversation: a chat to learn from; flat: a trace's step as it is. Absent: the loader's own."""

    dataset_id_or_path: str | None = None
    """Data set of the hub (OWNER/NAME), or a file or folder."""
    dataset_path: Path | None = None
    """A file: .jsonl, .ndjson (each also .gz or .xz), .json or .parquet. Wins over dataset_id_or_path."""
    dataset_config: str | None = None
    """Configuration of a hub data set, such as main of gsm8k."""
    dataset_split: str | None = None
    """Split to read; absent: train_split."""
    train_split: str = "train"
    """Split of the training rows."""
    val_split: str | None = None
    """Split of the evaluation rows; absent: eval_split_ratio of the training rows is held out."""
    dataset_level_filter: str | None = None
    """Difficulty. On the hub a configuration of the data set (level_4_5); in a file the levels to keep, by the column `level`."""
    dataset_max_samples: int | None = Field(default=None, ge=1)
    """Rows to keep at most, before they are shuffled and split."""
    dataset_max_sessions: int | None = Field(default=None, ge=1)
    """Sessions to take at most (runtime_traces, runtime_pg)."""

    shuffle: bool = True
    """Permute the rows before they are split."""
    seed: int = 42
    """Of the permutation."""
    eval_split_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the sources (sessions, problems) that is held out; 0: none. Rows of one source stay together."""
    eval_split_method: Literal["order", "hash"] = "order"
    """order: the last sources of the (shuffled) order. hash: by a hash of the source, which stays on its side when rows are added."""
    keep_columns: tuple[str, ...] | None = None
    """Columns to keep; prompt, ground_truth, messages and source_id must be among them where the rows have them."""
    on_bad_line: Literal["error", "skip", "quarantine"] = "error"
    """A line that cannot be used ends the loading, is left out, or is left out and written to FILE.bad.jsonl."""

    db_url: SecretStr | None = None
    """Postgres: postgresql://USER:PASSWORD@HOST/NAME; absent: ATLAS_DB_URL, then ATLAS_DATABASE_URL."""
    min_reward: float = 0.0
    """Sessions that scored less are left out; above 0 also those without a score."""
    max_reward: float | None = None
    """Sessions that scored more, or have no score, are left out."""
    learning_key: str | None = None
    """Only sessions of this learning key."""
    status_filters: tuple[str, ...] | None = None
    """Only sessions with one of these statuses, such as succeeded."""
    review_status_filters: tuple[str, ...] | None = None
    """Only sessions with one of these review statuses: pending, approved, quarantined."""
    start_date: datetime | None = None
    """Only sessions that were created at this time or later."""
    end_date: datetime | None = None
    """Only sessions that were created before this time."""
    limit: int | None = Field(default=None, ge=1)
    """Postgres: sessions to select at most; absent: 1000."""
    offset: int = Field(default=0, ge=0)
    """Postgres: sessions to pass over, of the newest."""
    include_trajectory_events: bool = True
    """Postgres: read the events of the sessions. Conversations are made of them; without them loading is faster."""
    include_learning_data: bool = True
    """Postgres: read what was learned about student and teacher."""
    statement_timeout_s: float = Field(default=30.0, gt=0)
    """Postgres: seconds that one statement may take."""

    every_teacher_turn: bool = False
    """Conversations of traces: one example for each turn of the teacher, instead of one that ends in the last."""
    sft_output_format: Literal["labels", "tags"] = "labels"
    """arc_atlas conversations: three labelled paragraphs, or the <thinking> and <teaching> that teachers are trained to write."""

    @model_validator(mode="before")
    @classmethod
    def _known_loader(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("loader"), str):
            modules = data.get("loader_modules") or ()
            return {**data, "loader": canonical_name(data["loader"], modules)}
        return data

    @model_validator(mode="after")
    def _one_way_of_evaluating(self) -> Self:
        # Its default is no wish: a resolved configuration names every key.
        usual = type(self).model_fields["eval_split_ratio"].default
        if self.val_split is not None and self.eval_split_ratio not in (0, usual):
            raise ValueError(
                f"val_split={self.val_split!r} and eval_split_ratio={self.eval_split_ratio} both say what to evaluate on; "
                "set one of them"
            )
        return self

    @property
    def split(self) -> str:
        """The split to read."""
        return self.dataset_split or self.train_split

    @property
    def held_out_share(self) -> float:
        """Of the training rows; 0 where val_split gives the evaluation rows."""
        return 0.0 if self.val_split is not None else self.eval_split_ratio

    @classmethod
    def preset(cls, name: str, **over: Any) -> Self:
        """A documented data set, with some of its values replaced.

        Raises:
            DataError: there is no such preset.
        """
        return cls(**{**preset_values(name), **over})
