"""load_splits: the rows of a configuration, filtered, capped, shuffled and split, with the count of each stage."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import islice

from atroposlib.data.config import DataConfig
from atroposlib.data.registry import Funnel, Row, find_loader
from atroposlib.data.splitting import shuffled, split_by_hash, split_by_order
from atroposlib.errors import DataError

log = logging.getLogger(__name__)
NEEDED_COLUMNS = ("prompt", "ground_truth", "messages", "source_id")
"""What trainers and environments read of a row that has it."""


@dataclass(frozen=True)
class Splits:
    """The rows of a data set."""

    train: list[Row]
    eval: list[Row]
    """Empty: nothing is held out, and evaluation is off."""
    funnel: dict[str, int]
    """How many rows each stage left, in the order of the stages."""


def load_splits(config: DataConfig) -> Splits:
    """Read a data set: its loader filters, then the rows are capped, shuffled and split by their sources.

    Raises:
        DataError: the source cannot be read, a row is not as promised, or no row is left; the funnel is in the message.
    """
    funnel: Funnel = Counter()
    rows = _rows(config, funnel)
    if config.val_split is not None:
        of_eval: Funnel = Counter()
        train, held_out = rows, _rows(config.model_copy(update={"dataset_split": config.val_split}), of_eval)
        funnel.update({f"{config.val_split}: {stage}": n for stage, n in of_eval.items()})
    else:
        train, held_out = _split(config, rows)
    funnel["train"], funnel["eval"] = len(train), len(held_out)
    if not train:
        raise DataError(f"no row is left to train on ({funnel_text(funnel)}); loosen the filters, or hold out less")
    if not held_out and (config.val_split is not None or config.held_out_share > 0):
        log.warning("no row is left to evaluate on (%s): evaluation is off", funnel_text(funnel))
    return Splits(train, held_out, dict(funnel))


def funnel_text(funnel: Funnel | dict[str, int]) -> str:
    """The stages in one line."""
    return " -> ".join(f"{stage} {n}" for stage, n in funnel.items())


def _rows(config: DataConfig, funnel: Funnel) -> list[Row]:
    rows = _first(find_loader(config.loader)(config, funnel), config.dataset_max_samples)
    if not rows:
        raise DataError(f"the data set has no row that can be used ({funnel_text(funnel) or 'nothing was read'})")
    if config.dataset_max_samples is not None:
        funnel["capped"] = len(rows)
    missing = next((number for number, row in enumerate(rows) if "source_id" not in row), None)
    if missing is not None:
        raise DataError(f"loader {config.loader!r} gave row {missing} without source_id, which splits go by; add it")
    rows = _keep(rows, config.keep_columns) if config.keep_columns is not None else rows
    return shuffled(rows, config.seed) if config.shuffle else rows


def _first(loaded: Iterable[Row], n_rows: int | None) -> list[Row]:
    """Lazily: what lies beyond the cap is not even read."""
    rows = list(islice(loaded, n_rows))
    # A loader that is stopped early has files and connections open.
    if isinstance(loaded, Generator):
        loaded.close()
    return rows


def _split(config: DataConfig, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    if config.held_out_share == 0:
        return rows, []
    split = split_by_hash if config.eval_split_method == "hash" else split_by_order
    train, held_out = split(rows, config.held_out_share, lambda row: str(row["source_id"]))
    # A single source: better no evaluation than no training.
    return (train, held_out) if train else (held_out, [])


def _keep(rows: list[Row], columns: tuple[str, ...]) -> list[Row]:
    known = dict.fromkeys(name for row in rows for name in row)
    lost = [name for name in NEEDED_COLUMNS if name in known and name not in columns]
    unknown = [name for name in columns if name not in known and name not in NEEDED_COLUMNS]
    if lost:
        raise DataError(f"keep_columns drops {', '.join(lost)}, without which rows are of no use; add them")
    if unknown:
        raise DataError(f"keep_columns names {', '.join(unknown)}; the columns are {', '.join(known)}")
    return [{name: value for name, value in row.items() if name in columns} for row in rows]
