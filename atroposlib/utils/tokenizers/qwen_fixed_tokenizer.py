"""A Qwen tokenizer whose chat template leaves earlier turns as they were, thinking included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TEMPLATE = Path(__file__).with_suffix(".jinja")


class QwenFixedTokenizer:
    """Everything of the tokenizer `name`, with a chat template made for training.

    Qwen's own template drops the thinking of earlier turns, so the tokens of a conversation change when it goes on.
    This one renders what was said, and tools in the Hermes form that Qwen was trained on.

    Args:
        name: a folder or a Hugging Face name.
        kwargs: for AutoTokenizer.from_pretrained.
    Raises:
        ConfigError: there is no such tokenizer.
    """

    def __init__(self, name: str, **kwargs: Any) -> None:
        self.tokenizer = _load(name, kwargs)
        self.chat_template = _TEMPLATE.read_text(encoding="utf-8")

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """As the tokenizer's, with this template unless the call brings its own."""
        return self.tokenizer.apply_chat_template(conversation, **{"chat_template": self.chat_template, **kwargs})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode text, as the tokenizer does."""
        return self.tokenizer(*args, **kwargs)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling ask before __init__ has run.
        if name == "tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)


def _load(name: str, kwargs: dict[str, Any]) -> Any:
    if kwargs:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name, **kwargs)
    from atroposlib.envs.tokenizers import load_tokenizer

    return load_tokenizer(name)
