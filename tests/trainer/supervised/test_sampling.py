"""Sampling: how many tokens a completion may have, and which prompts are sampled together."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from atroposlib.testing.byte_tokenizer import byte_tokenizer
from trainer.supervised.sampling import Sampler, Sampling, batches_of

POSITIONS = 12


def absolute_positions() -> Any:
    """A model that has no position after the twelfth, and never ends."""
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=1, n_positions=POSITIONS, eos_token_id=None)
    )
    return lm.eval()


def endless(lm: Any) -> Sampler:
    sampler = Sampler(lm, byte_tokenizer())
    sampler.ends = frozenset()
    return sampler


def test_a_completion_ends_where_the_positions_do() -> None:
    prompts = [[5] * length for length in (2, 9, 11)]

    found = endless(absolute_positions()).sample(prompts, Sampling(1.0, 6, batch_size=1, max_tokens=POSITIONS), seed=0)

    assert [len(completion) for completion in found] == [6, 3, 1]


def test_a_long_prompt_shortens_none_that_has_room() -> None:
    found = endless(absolute_positions()).sample(
        [[5] * 11, [5] * 2], Sampling(1.0, 6, batch_size=2, max_tokens=POSITIONS), seed=0
    )

    assert [len(completion) for completion in found] == [1, 6]


@given(
    lengths=st.lists(st.integers(1, 9), max_size=12),
    max_new_tokens=st.integers(1, 6),
    batch_size=st.integers(1, 4),
    max_tokens=st.none() | st.integers(10, 14),
)
def test_every_prompt_is_in_one_batch_with_its_like(
    lengths: list[int], max_new_tokens: int, batch_size: int, max_tokens: int | None
) -> None:
    prompts = [[5] * length for length in lengths]
    sampling = Sampling(1.0, max_new_tokens, batch_size, max_tokens)

    batches = batches_of(prompts, sampling)

    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    for batch in batches:
        rooms = [sampling.room(prompts[place]) for place in batch]
        assert max(rooms) == min(rooms) or max(rooms) < max_new_tokens
        if max_tokens is not None:
            assert all(lengths[place] + min(rooms) <= max_tokens for place in batch)
