"""The token ids of a request's prompt."""

from __future__ import annotations

from typing import Any, Protocol

from atroposlib.envs.tokenizers import load_tokenizer


class _TokenServer(Protocol):
    config: Any

    @property
    def tokenizer(self) -> Any: ...


_TRANSPORT = ("timeout", "extra_body", "extra_headers")
"""Arguments of the openai package that say how a request travels: token routes would read them as sampling parameters."""


def take_prompt_ids(server: _TokenServer, kwargs: dict[str, Any]) -> list[int]:
    """Take the prompt out of a request's arguments: `input_ids` as they are, or `prompt` or `messages` tokenised.

    The arguments that are left are sampling parameters: how the request travels is taken out too.

    Raises:
        ValueError: there is no prompt.
    """
    input_ids, prompt, messages = (kwargs.pop(name, None) for name in ("input_ids", "prompt", "messages"))
    for name in _TRANSPORT:
        kwargs.pop(name, None)
    if input_ids is not None:
        return list(input_ids)
    if isinstance(prompt, list):
        return list(prompt)
    if prompt is None:
        if messages is None:
            raise ValueError("a token request needs input_ids, prompt or messages")
        prompt = server.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return encode_prompt(server.tokenizer, prompt)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Tokenise a text; where its template wrote the BOS already, it is not doubled."""
    ids: list[int] = tokenizer.encode(prompt)
    bos = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def served_tokenizer(config: Any) -> Any:
    """The tokenizer that a server's config names; where it names none, the model's."""
    return load_tokenizer(config.model_name if config.tokenizer_name == "none" else config.tokenizer_name)
