"""Loads tokenizers without loading torch where that is possible."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from atroposlib.errors import ConfigError

# Classes that are nothing but their tokenizer.json, so the generic class reads them the same.
_GENERIC_CLASSES = {"TokenizersBackend", "PreTrainedTokenizerFast"}


@lru_cache(maxsize=8)
def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or a Hugging Face name.

    transformers' AutoTokenizer imports torch where torch is installed (five seconds, 200 MB). A local folder whose
    tokenizer is of the generic class is read without it.

    Raises:
        ConfigError: there is no such tokenizer.
    """
    try:
        if _is_generic(Path(name)):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(name)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot load the tokenizer {name!r}: {str(error).splitlines()[0]}; set --tokenizer_name to a folder or a model name"
        ) from error


def _is_generic(folder: Path) -> bool:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (folder / "tokenizer.json").is_file() and config.get("tokenizer_class") in _GENERIC_CLASSES
