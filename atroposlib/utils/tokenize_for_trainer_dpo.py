"""Turns a preference pair into token columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atroposlib.type_definitions import MASKED
from atroposlib.utils.chat_tokens import as_messages, chat_token_ids, shared_prefix_length


def tokenize_for_trainer_dpo(
    tokenizer: Any, pair: Mapping[str, Any], max_length: int | None = None
) -> dict[str, list[int]]:
    """Tokens of prompt + chosen and of prompt + rejected.

    Args:
        pair: {"prompt": text or messages, "chosen": text, "rejected": text}.
        max_length: tokens kept of each sequence, from the left; None keeps all.
    Returns:
        For side in chosen, rejected: "<side>_input_ids" [T], "<side>_attention_mask" [T] of ones, "<side>_labels" [T]
        with -100 over the prompt; and "prompt_input_ids".
    """
    prompt = _messages(pair["prompt"])
    prompt_ids = chat_token_ids(tokenizer, prompt, add_generation_prompt=True)
    columns = {"prompt_input_ids": prompt_ids}
    for side in ("chosen", "rejected"):
        ids = chat_token_ids(tokenizer, [*prompt, {"role": "assistant", "content": pair[side]}])[:max_length]
        n_prompt = shared_prefix_length(prompt_ids, ids)
        columns[f"{side}_input_ids"] = ids
        columns[f"{side}_attention_mask"] = [1] * len(ids)
        columns[f"{side}_labels"] = [MASKED] * n_prompt + ids[n_prompt:]
    return columns


def _messages(prompt: str | Sequence[Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else as_messages(prompt)
