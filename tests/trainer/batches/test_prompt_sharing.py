"""A prompt laid down once gives the values and gradients of whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.fakes import a_group, tiny_llama
from trainer.batches.micro_batch import build_micro_batch
from trainer.batches.prompt_sharing import cluster, prompt_length
from trainer.batches.step_batch import StepBatch, build_step_batch
from trainer.policy.attention import dense_mask
from trainer.policy.logprobs import PackedPolicy

PROMPT = (9, 2, 6, 5)
COMPLETIONS = [(7, 3), (4, 5, 6), (7, 3, 1, 1), (8,)]


def batch_of(*groups: Any) -> StepBatch:
    return build_step_batch(0, groups, advantage_scale="none", overlong="keep", temperature=1.0)


def two_groups() -> StepBatch:
    rewards = [1.0, 0.0, 0.0, 1.0]
    return batch_of(
        a_group("g", prompt=PROMPT, completions=COMPLETIONS, rewards=rewards),
        a_group("h", prompt=PROMPT[:2], completions=COMPLETIONS[::-1], rewards=rewards),
    )


def logprobs(lm: Any, batch: StepBatch, *, shares_prompts: bool) -> Tensor:
    clusters = cluster(batch.sequences, range(len(batch.sequences)), capacity=1000, shares_prompts=shares_prompts)
    micro = build_micro_batch(batch.sequences, clusters, [1.0] * len(batch.sequences))
    result, _ = PackedPolicy(lm, chunk_size=100)(
        micro.input_ids_1T,
        micro.position_ids_1T,
        micro.segments_1T,
        micro.prefixes_1T,
        micro.target_positions_M,
        micro.target_ids_M,
        micro.temperatures_M,
    )
    return result  # type: ignore[no-any-return]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_sharing_changes_neither_logprobs_nor_gradients(attn_implementation: str) -> None:
    shared, whole = (tiny_llama(attn_implementation=attn_implementation) for _ in range(2))

    once = logprobs(shared, two_groups(), shares_prompts=True)
    each = logprobs(whole, two_groups(), shares_prompts=False)
    (once * torch.arange(len(once))).sum().backward()
    (each * torch.arange(len(each))).sum().backward()

    torch.testing.assert_close(once, each, rtol=1e-4, atol=1e-5)
    for (name, parameter), other in zip(shared.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_completion_sees_its_prompt_and_itself_and_nothing_else() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2, 3]])
    prefixes = torch.tensor([[0, 0, 0, 0, 0, 3]])

    assert dense_mask(segments, prefixes)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_groups_of_the_same_question_stay_apart() -> None:
    batch = batch_of(a_group("g"), a_group("h"))

    clusters = cluster(batch.sequences, range(4), capacity=1000, shares_prompts=True)

    assert [part.members for part in clusters] == [(0, 1), (2, 3)]


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8), prompt=st.integers(1, 5), capacity=st.integers(1, 20)
)
def test_clusters_hold_every_sequence_once_and_never_more_than_fits(
    lengths: list[int], prompt: int, capacity: int
) -> None:
    completions = [tuple(range(1, length + 1)) for length in lengths]
    batch = batch_of(
        a_group("g", prompt=tuple(range(1, prompt + 1)), completions=completions, rewards=[0.0] * len(lengths))
    )

    clusters = cluster(batch.sequences, range(len(lengths)), capacity=capacity, shares_prompts=True)

    assert sorted(index for part in clusters for index in part.members) == list(range(len(lengths)))
    for part in clusters:
        assert part.tokens <= capacity or len(part.members) == 1
        rest = sum(len(batch.sequences[i].tokens_L) - prompt_length(batch.sequences[i]) for i in part.members)
        assert part.tokens == prompt + rest
