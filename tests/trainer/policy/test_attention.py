"""Packed attention lets nothing across a boundary, is as right as a dense mask, and never builds one on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

from atroposlib.errors import ConfigError
from tests.trainer.fakes import VOCABULARY, tiny_llama
from trainer.policy.attention import SEGMENT_SDPA, dense_mask, packed_mask, segment_attention
from trainer.policy.logprobs import PackedPolicy, TokenScores

BACKENDS = ["sdpa", "eager"]  # flash_attention_2 and flex_attention need a GPU


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_contiguous():
                self.numel = max(self.numel, tensor.numel())
        return result


def score(policy: PackedPolicy, sequences: list[list[int]]) -> TokenScores:
    tokens = torch.tensor([[token for sequence in sequences for token in sequence]])
    positions = torch.tensor([[i for sequence in sequences for i in range(len(sequence))]])
    segments = torch.tensor([[i for i, sequence in enumerate(sequences) for _ in sequence]])
    targets = torch.nonzero(positions[0] > 0)[:, 0]
    scores: TokenScores = policy(
        tokens, positions, segments, segments, targets - 1, tokens[0, targets], torch.ones(len(targets))
    )
    return scores


@pytest.mark.parametrize("attn_implementation", BACKENDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sequence_changes_no_bit_and_no_gradient_of_its_neighbours(
    attn_implementation: str, checkpointing: bool
) -> None:
    mine = [2, 6, 5, 3, 9]

    def of_mine(before: list[int], after: list[int]) -> tuple[Tensor, list[Tensor]]:
        lm = tiny_llama(attn_implementation=attn_implementation).train()
        policy = PackedPolicy(lm, chunk_size=3)
        if checkpointing:
            policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logprobs_M = score(policy, [before, mine, after]).logprobs_M[len(before) - 1 :][: len(mine) - 1]
        logprobs_M.sum().backward()
        return logprobs_M.detach(), [parameter.grad for parameter in lm.parameters()]

    first, first_gradients = of_mine([3, 1, 4], [1, 5])
    second, second_gradients = of_mine([8, 8, 8], [7, 7])

    assert first.tolist() == second.tolist()
    for one, other in zip(first_gradients, second_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-6)


class _Module:
    is_causal = True
    num_key_value_groups = 2


@settings(deadline=None, max_examples=50)
@given(
    segments=st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 8),
)
def test_segment_by_segment_is_what_a_dense_mask_says(segments: list[tuple[int, bool]], window: int | None) -> None:
    lengths, prefixes, positions = _layout(segments)
    segment_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    prefix_T = torch.tensor(prefixes)[segment_T]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, len(segment_T), 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)
    )
    may_look = dense_mask(segment_T[None], prefix_T[None])
    position_T = torch.tensor(positions)
    if window is not None:
        may_look = may_look & (position_T[:, None] - position_T[None] < window)
    layout = torch.stack([segment_T[None], prefix_T[None]], dim=1)[:, None]

    found, _ = segment_attention(_Module(), query, key, value, layout, sliding_window=window)
    expected, _ = segment_attention(_Module(), query, key, value, may_look)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    seed = torch.randn(found.shape, generator=generator)
    for one, other in zip(
        torch.autograd.grad(found, (query, key, value), seed),
        torch.autograd.grad(expected, (query, key, value), seed),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _layout(segments: list[tuple[int, bool]]) -> tuple[list[int], list[int], list[int]]:
    """Length and prefix of each segment, position of each token; True: goes on from the last segment that does not."""
    lengths = [length for length, _ in segments]
    prefixes: list[int] = []
    positions: list[int] = []
    root = 0
    for i, (length, goes_on) in enumerate(segments):
        root = root if goes_on and i else i
        prefixes.append(root)
        start = 0 if root == i else lengths[root]
        positions.extend(range(start, start + length))
    return lengths, prefixes, positions


def test_no_tensor_grows_with_the_square_of_the_tokens() -> None:
    policy = PackedPolicy(tiny_llama(), chunk_size=8)
    sequences = [[1 + i % 7] * 8 for i in range(64)]

    with Largest() as largest:
        score(policy, sequences).logprobs_M.sum().backward()

    tokens = 8 * 64
    assert largest.numel < tokens * tokens / 4
    assert largest.numel >= 8 * VOCABULARY


def test_an_ordinary_call_still_is_sdpa() -> None:
    plain, wrapped = tiny_llama().eval(), tiny_llama().eval()
    PackedPolicy(wrapped, chunk_size=8)
    ids, mask = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])

    assert wrapped.config._attn_implementation == SEGMENT_SDPA
    torch.testing.assert_close(
        wrapped(input_ids=ids, attention_mask=mask).logits, plain(input_ids=ids, attention_mask=mask).logits
    )
    assert wrapped.generate(ids[:1], max_new_tokens=4, do_sample=False).tolist() == (
        plain.generate(ids[:1], max_new_tokens=4, do_sample=False).tolist()
    )


def test_the_written_configuration_names_no_attention_of_ours(tmp_path: Any) -> None:
    lm = tiny_llama()
    PackedPolicy(lm, chunk_size=8)

    lm.save_pretrained(tmp_path)

    assert SEGMENT_SDPA not in (tmp_path / "config.json").read_text()


def test_an_accelerator_gets_a_dense_mask() -> None:
    policy = PackedPolicy(tiny_llama(), chunk_size=8)
    segments = torch.zeros(1, 4, dtype=torch.int64, device="meta")

    mask = packed_mask(policy.lm, segments, segments)

    assert mask is not None
    assert (tuple(mask.shape), mask.dtype) == ((1, 1, 4, 4), torch.bool)


def a_windowed_model(attn_implementation: str) -> Any:
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=4, attn_implementation=attn_implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    return MistralForCausalLM(config).eval()


def test_a_model_that_sees_only_a_window_is_packed_with_that_window() -> None:
    lm = a_windowed_model("sdpa")
    sequences = [[5, 9, 2, 7, 7, 3, 1, 8, 4, 6], [3, 1, 4, 1, 5, 9, 2, 6]]
    with torch.no_grad():
        alone = [lm(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in sequences]
        expected = [
            logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
            for logits, ids in zip(alone, sequences, strict=True)
        ]
        found_M = score(PackedPolicy(lm, chunk_size=100), sequences).logprobs_M

    torch.testing.assert_close(found_M, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_the_window_holds_on_an_accelerator_too() -> None:
    segments = torch.zeros(1, 6, dtype=torch.int64, device="meta")
    windowed, plain = a_windowed_model("sdpa"), tiny_llama()
    for lm in (windowed, plain):
        PackedPolicy(lm, chunk_size=1)

    # The layout leads to attention segment by segment, which knows the window; a dense mask does not.
    assert packed_mask(windowed, segments, segments).dtype == torch.int64  # type: ignore[union-attr]
    assert packed_mask(plain, segments, segments).dtype == torch.bool  # type: ignore[union-attr]


def test_eager_attention_is_refused_where_layers_see_only_a_window() -> None:
    with pytest.raises(ConfigError, match="use sdpa"):
        PackedPolicy(a_windowed_model("eager"), chunk_size=1)
