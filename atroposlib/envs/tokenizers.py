"""Loads tokenizers without loading torch where that is possible."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from atroposlib.errors import ConfigError

# Classes that are nothing but their tokenizer.json, so the generic class reads them the same.
_GENERIC_CLASSES = {"TokenizersBackend", "PreTrainedTokenizerFast"}


@lru_cache(maxsize=8)
def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or a Hugging Face name.

    Its apply_chat_template returns plain token ids unless return_dict=True is asked for: so it was before transformers 5,
    and environments count the ids of what it returns.

    transformers' AutoTokenizer imports torch where torch is installed (five seconds, 200 MB). A local folder whose
    tokenizer is of the generic class is read without it.

    Raises:
        ConfigError: there is no such tokenizer.
    """
    try:
        if _is_generic(Path(name)):
            from transformers import PreTrainedTokenizerFast

            return _with_plain_ids(PreTrainedTokenizerFast.from_pretrained(name))
        from transformers import AutoTokenizer

        return _with_plain_ids(AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot load the tokenizer {name!r}: {str(error).splitlines()[0]}; set --tokenizer_name to a folder or a model name"
        ) from error


def _with_plain_ids(tokenizer: Any) -> Any:
    # On the object, not in a subclass: pickling and save_pretrained go by the class.
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, return_dict=False)
    return tokenizer


def _is_generic(folder: Path) -> bool:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (folder / "tokenizer.json").is_file() and config.get("tokenizer_class") in _GENERIC_CLASSES
