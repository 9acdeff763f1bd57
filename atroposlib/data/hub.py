"""Data sets of the Hugging Face hub, or of a local folder, through the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from atroposlib.data.entries import Entry
from atroposlib.data.files import FILE_ENDINGS, as_entry
from atroposlib.errors import DataError


def read_hub(source: str, config: str | None, split: str, *, file: str | None = None) -> Iterator[Entry]:
    """Every row of one split, in its order.

    Args:
        source: OWNER/NAME, or a folder.
        config: configuration of the data set, where it has several.
        file: read this file of the data set alone.
    Raises:
        DataError: the library is missing, or cannot load it.
    """
    library = _library(source)
    options: dict[str, Any] = {"split": split} if file is None else {"split": split, "data_files": {split: file}}
    try:
        rows = library.load_dataset(source, config, **options)
    # Whatever the library and the network raise, the reader needs the same facts.
    except Exception as error:
        what = f"{source!r}, {f'file {file!r}' if file else f'split {split!r}'}"
        raise DataError(f"cannot load {what}, from the hub: {error}") from error
    for number, row in enumerate(rows):
        yield as_entry(f"{source}, split {split}, row {number}", dict(row))


def _library(source: str) -> Any:
    try:
        return import_module("datasets")
    except ModuleNotFoundError as error:
        raise DataError(
            f"there is no file {source!r}, and data sets of the hub need `pip install datasets`; "
            f"give a path that ends in {', '.join(FILE_ENDINGS)}, or install it"
        ) from error
