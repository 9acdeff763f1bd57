"""Attention over a packed micro batch: a token looks back in its own segment and in the prompt that the segment goes on from.

Shapes: T tokens of a packed micro batch in segments, L tokens of a segment, P of its prompt, H query heads, G key heads, D
head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from atroposlib.errors import ConfigError

SEGMENT_SDPA = "segment_sdpa"
"""torch's attention, segment by segment on a CPU and where layers see only a window; plain sdpa without a layout."""
SHARES_PROMPTS = ("sdpa", "eager", SEGMENT_SDPA)
"""Attention that can be told of prompts. Others find sequence boundaries in the position ids, and share no prompts."""


def prepare(lm: Any) -> None:
    """Let a model that uses sdpa do it segment by segment. Calls without a layout do what they did.

    Raises:
        ConfigError: eager attention, and a model whose layers see only a window.
    """
    AttentionInterface.register(SEGMENT_SDPA, segment_attention)
    AttentionMaskInterface.register(SEGMENT_SDPA, sdpa_mask)
    if lm.config._attn_implementation == "sdpa":
        lm.set_attn_implementation(SEGMENT_SDPA)
    elif lm.config._attn_implementation == "eager" and sliding_window_of(lm) is not None:
        raise ConfigError(
            "attn_implementation=eager knows no sliding window over packed sequences, and this model has one: use sdpa"
        )


def packed_mask(lm: Any, segments_1T: Tensor, prefixes_1T: Tensor) -> Tensor | None:
    """What to give the model as its attention_mask.

    Args:
        segments_1T: [1, T] which segment each token is in, counted from 0 in order.
        prefixes_1T: [1, T] the segment that it goes on from; its own where there is none.
    """
    kind = lm.config._attn_implementation
    if kind not in SHARES_PROMPTS:
        return None
    if kind == SEGMENT_SDPA and (segments_1T.device.type == "cpu" or sliding_window_of(lm) is not None):
        return torch.stack([segments_1T, prefixes_1T], dim=1)[:, None]
    mask = dense_mask(segments_1T, prefixes_1T)
    if kind != "eager":
        return mask
    # Eager attention adds its mask to the scores.
    return torch.zeros(mask.shape, dtype=lm.dtype, device=mask.device).masked_fill(~mask, torch.finfo(lm.dtype).min)


def sliding_window_of(lm: Any) -> int | None:
    """Tokens that a layer of the model sees at most; None where every layer sees all."""
    window: int | None = getattr(lm.config.get_text_config(), "sliding_window", None)
    return window


def dense_mask(segments_1T: Tensor, prefixes_1T: Tensor) -> Tensor:
    """[1, 1, T, T] True where a token may look. Arguments as for packed_mask."""
    seen_11T = segments_1T[:, None, :]
    is_own = segments_1T[:, :, None] == seen_11T
    is_prompt = prefixes_1T[:, :, None] == seen_11T
    return (is_own | is_prompt).tril()[:, None]


def segment_attention(
    module: Any,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[1, T, H, D] attention as transformers calls it; work grows with each segment's length squared, not with T squared.

    Args:
        attention_mask: [1, 1, 2, T] integers of packed_mask. Anything else goes to transformers' sdpa as it is.
        sliding_window: tokens that a token sees, itself among them; None for all.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_1HTD, key_1GTD, value_1GTD, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    lengths, prefixes = _runs(attention_mask)
    # One split of the whole: a slice for each segment would make the backward pass add up T-long gradients.
    queries = torch.split(query_1HTD, lengths, dim=2)
    keys = torch.split(_for_all_heads(key_1GTD, query_1HTD), lengths, dim=2)
    values = torch.split(_for_all_heads(value_1GTD, query_1HTD), lengths, dim=2)
    outputs = []
    for i, prefix in enumerate(prefixes):
        key, value = keys[i], values[i]
        if prefix != i:
            key, value = torch.cat([keys[prefix], key], dim=2), torch.cat([values[prefix], value], dim=2)
        mask = _segment_mask(queries[i].shape[2], key.shape[2], sliding_window, key.device)
        outputs.append(
            scaled_dot_product_attention(
                queries[i], key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _runs(layout_112T: Tensor) -> tuple[list[int], list[int]]:
    """Length and prefix of each segment."""
    segments_T, prefixes_T = layout_112T[0, 0]
    lengths = torch.unique_consecutive(segments_T, return_counts=True)[1]
    first = lengths.cumsum(0) - lengths
    return lengths.tolist(), prefixes_T[first].tolist()


def _for_all_heads(states_1GTD: Tensor, query_1HTD: Tensor) -> Tensor:
    return states_1GTD.repeat_interleave(query_1HTD.shape[1] // states_1GTD.shape[1], dim=1)


def _segment_mask(length: int, seen: int, window: int | None, device: torch.device) -> Tensor | None:
    """[L, P + L] True where a segment may look; None where plain causal attention says the same."""
    before = seen - length
    is_windowed = window is not None and window < seen
    if not before and not is_windowed:
        return None
    mask = torch.ones(length, seen, dtype=torch.bool, device=device).tril(before)
    return mask.triu(before - window + 1) if is_windowed and window is not None else mask
