"""Small valid trajectories and groups for tests of environments, trainers and tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from atroposlib.testing.mock.codec import ByteCodec
from atroposlib.testing.mock.generation import mock_logprobs
from atroposlib.type_definitions import MASKED, ScoredDataGroup, ScoredDataItem
from atroposlib.wire.layout import NOT_SAMPLED

UNSAMPLED_LOGPROB = 1.0


def build_item(
    prompt: str = "2+2=",
    completion: str = "4",
    score: float = 1.0,
    *,
    tokenizer: Any = None,
    policy_version: int = 0,
    is_terminated: bool = True,
    **columns: Any,
) -> ScoredDataItem:
    """One trajectory as an environment returns it.

    Args:
        tokenizer: whose ids; None: bytes, as byte_tokenizer().
        is_terminated: whether the policy ended its reply; False: a limit cut it.
        columns: any other column, or another value of one that is made here.
    """
    prompt_ids, completion_ids = _encode(tokenizer, prompt), _encode(tokenizer, completion)
    if is_terminated:
        completion_ids = [*completion_ids, ByteCodec.eos_id if tokenizer is None else tokenizer.eos_token_id]
    item: dict[str, Any] = {
        "tokens": prompt_ids + completion_ids,
        "masks": [MASKED] * len(prompt_ids) + completion_ids,
        "scores": score,
        "inference_logprobs": [UNSAMPLED_LOGPROB] * len(prompt_ids) + mock_logprobs(len(completion_ids)),
        "policy_versions": [(NOT_SAMPLED, len(prompt_ids)), (policy_version, len(completion_ids))],
        "finish_reason": "stop" if is_terminated else "length",
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}],
    }
    return cast(ScoredDataItem, {**item, **columns})


def build_group(
    completions: Sequence[str] = ("4", "5"),
    scores: Sequence[float] = (1.0, 0.0),
    *,
    prompt: str = "2+2=",
    tokenizer: Any = None,
    policy_version: int = 0,
    **columns: Any,
) -> ScoredDataGroup:
    """The completions of one prompt with their scores.

    Args:
        columns: other columns of the group, or other values.
    Raises:
        ValueError: as many scores as completions are needed.
    """
    items = [
        build_item(prompt, completion, score, tokenizer=tokenizer, policy_version=policy_version)
        for completion, score in zip(completions, scores, strict=True)
    ]
    names = ("tokens", "masks", "scores", "inference_logprobs", "policy_versions", "messages")
    group: dict[str, Any] = {name: [item[name] for item in items] for name in names}  # type: ignore[literal-required]
    group["finish_reasons"] = [item["finish_reason"] for item in items]
    return cast(ScoredDataGroup, {**group, **columns})


def _encode(tokenizer: Any, text: str) -> list[int]:
    return ByteCodec().encode(text) if tokenizer is None else list(tokenizer.encode(text, add_special_tokens=False))
