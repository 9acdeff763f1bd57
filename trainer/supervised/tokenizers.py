"""Load tokenizers, and tell whether two say the same."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from atroposlib.errors import ConfigError


def load_tokenizer(name: str, *, key: str, trust_remote_code: bool) -> Any:
    """A tokenizer by folder or Hub id.

    Args:
        key: the option that names it, for the message.
    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"no tokenizer in {name!r}: {first}\nhint: give {key}=FOLDER") from error


def has_same_vocabulary(one: Any, other: Any) -> bool:
    """Whether ids of one mean the same to the other."""
    return bool(one.get_vocab() == other.get_vocab() and one.eos_token_id == other.eos_token_id)


def is_same_tokenizer(one: Any, other: Any) -> bool:
    """Whether ids of one mean the same to the other, and chats are rendered alike."""
    return has_same_vocabulary(one, other) and (
        getattr(one, "chat_template", None) == getattr(other, "chat_template", None)
    )
