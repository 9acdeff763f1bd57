"""Packed logprobs are those of each sequence alone, in value and gradient, and never need all logits."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from atroposlib.errors import ConfigError
from tests.trainer.fakes import VOCABULARY, tiny_llama
from trainer.policy import logprobs as logprobs_module
from trainer.policy.loading import build_policy
from trainer.policy.logprobs import PackedPolicy
from trainer.weight_sync.sources import weight_source

SEQUENCES = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [3, 5, 8, 9, 7, 9, 3]]


def reference(lm: Any, tokens: list[int], temperature: float) -> tuple[Tensor, Tensor]:
    """Logprobs of all tokens but the first, and entropies, from plain logits of one sequence."""
    logits_TV = lm(input_ids=torch.tensor([tokens])).logits[0, :-1] / temperature
    all_TV = logits_TV.log_softmax(-1)
    return all_TV.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0], -(all_TV.exp() * all_TV).sum(-1)


def packed(policy: PackedPolicy, sequences: list[list[int]], temperatures: list[float]) -> tuple[Tensor, Tensor]:
    tokens = [token for sequence in sequences for token in sequence]
    positions = [i for sequence in sequences for i in range(len(sequence))]
    segments = torch.tensor([[i for i, sequence in enumerate(sequences) for _ in sequence]])
    targets = [i for i, position in enumerate(positions) if position > 0]
    of_token = [t for sequence, t in zip(sequences, temperatures, strict=True) for _ in sequence]
    result: tuple[Tensor, Tensor] = policy(
        torch.tensor([tokens]),
        torch.tensor([positions]),
        segments,
        segments,
        torch.tensor(targets, dtype=torch.int64) - 1,
        torch.tensor([tokens[i] for i in targets], dtype=torch.int64),
        torch.tensor([of_token[i] for i in targets]),
    )
    return result


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_packed_sequences_do_not_see_each_other(attn_implementation: str, chunk_size: int) -> None:
    lm = tiny_llama(attn_implementation=attn_implementation).eval()
    temperatures = [1.0, 0.5, 0.7, 1.6]

    logprobs, entropies = packed(PackedPolicy(lm, chunk_size=chunk_size), SEQUENCES, temperatures)

    expected = [reference(lm, tokens, t) for tokens, t in zip(SEQUENCES, temperatures, strict=True) if len(tokens) > 1]
    torch.testing.assert_close(logprobs, torch.cat([part[0] for part in expected]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropies, torch.cat([part[1] for part in expected]), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("c++") is None, reason="flex attention is compiled, and there is no C++ compiler")
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # transformers gives it
@torch.no_grad()  # torch has no backward pass of flex attention on a CPU
def test_with_flex_attention_packed_sequences_do_not_see_each_other() -> None:
    policy = PackedPolicy(tiny_llama(attn_implementation="flex_attention").eval(), chunk_size=100)

    logprobs, _ = packed(policy, SEQUENCES, [1.0] * 4)

    expected = [reference(tiny_llama().eval(), tokens, 1.0)[0] for tokens in SEQUENCES if len(tokens) > 1]
    torch.testing.assert_close(logprobs, torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_neighbour_changes_no_bit(attn_implementation: str) -> None:
    policy = PackedPolicy(tiny_llama(attn_implementation=attn_implementation).eval(), chunk_size=100)

    first, _ = packed(policy, [[3, 1, 4], [2, 6, 5, 3]], [1.0, 1.0])
    second, _ = packed(policy, [[8, 8, 8], [2, 6, 5, 3]], [1.0, 1.0])

    assert first[2:].tolist() == second[2:].tolist()
    assert first[:2].tolist() != second[:2].tolist()


@pytest.mark.parametrize("kept_bytes", [0, 2**20])
def test_the_gradient_is_that_of_each_sequence_alone(monkeypatch: pytest.MonkeyPatch, kept_bytes: int) -> None:
    monkeypatch.setattr(logprobs_module, "KEPT_LOGITS_BYTES", kept_bytes)
    lm, alone = tiny_llama(), tiny_llama()

    packed(PackedPolicy(lm, chunk_size=3), SEQUENCES, [1.0] * 4)[0].sum().backward()
    torch.cat([reference(alone, tokens, 1.0)[0] for tokens in SEQUENCES if len(tokens) > 1]).sum().backward()

    for (name, parameter), other in zip(lm.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_no_more_logits_than_a_chunk_are_alive_where_all_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs_module, "KEPT_LOGITS_BYTES", 0)
    lm = tiny_llama()
    rows: list[int] = []
    lm.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.numel() // VOCABULARY))
    saved: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logprobs, _ = packed(PackedPolicy(lm, chunk_size=4), SEQUENCES, [1.0] * 4)
    forward_rows = list(rows)
    logprobs.sum().backward()

    assert max(rows) <= 4
    assert len(rows) == 2 * len(forward_rows)  # each chunk is computed again in the backward pass
    assert not [shape for shape in saved if shape[-1:] == (VOCABULARY,) and shape[0] in forward_rows]


def test_half_precision_scores_in_float32() -> None:
    policy = PackedPolicy(tiny_llama().to(torch.bfloat16), chunk_size=4)

    logprobs, entropies = packed(policy, SEQUENCES, [1.0] * 4)

    assert logprobs.dtype == entropies.dtype == torch.float32


def test_a_model_that_caps_its_logits_is_refused() -> None:
    class Capped(LlamaForCausalLM):  # type: ignore[misc]
        """A model that post-processes its logits as Gemma does."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 0.1 * torch.tanh(10 * output.logits)
            return output

    with pytest.raises(ConfigError, match="changes its logits"):
        build_policy(Capped(tiny_llama().config), logprob_chunk_size=4)


def test_dropout_is_off() -> None:
    lm = tiny_llama()
    lm.extra = nn.Dropout(0.5)

    build_policy(lm, logprob_chunk_size=4)

    assert lm.extra.p == 0.0


def test_weights_have_hugging_face_names_and_can_be_read_again() -> None:
    weights = weight_source(build_policy(tiny_llama(), logprob_chunk_size=4), is_rank_0=True).gather()

    assert weights is not None
    names = [name for name, _ in weights]

    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names  # tied
    assert [name for name, _ in weights] == names


def test_candidates_are_scored_at_the_same_places_with_their_gradient() -> None:
    lm, alone = tiny_llama(), tiny_llama()
    tokens = [3, 1, 4, 1, 5]
    candidates = torch.tensor([[0, 7], [1, 2], [4, 4], [31, 5]])
    ids_1T, positions_1T, segments_1T = (
        torch.tensor([tokens]),
        torch.arange(5)[None],
        torch.zeros(1, 5, dtype=torch.int64),
    )

    scores = PackedPolicy(lm, chunk_size=3)(
        ids_1T,
        positions_1T,
        segments_1T,
        segments_1T,
        torch.arange(4),
        ids_1T[0, 1:],
        torch.full((4,), 0.5),
        candidates,
    )
    expected = (alone(input_ids=ids_1T).logits[0, :-1] / 0.5).log_softmax(-1).gather(-1, candidates)
    weights = torch.arange(8.0).view(4, 2)
    (scores.candidate_logprobs_MK * weights).sum().backward()
    (expected * weights).sum().backward()

    torch.testing.assert_close(scores.candidate_logprobs_MK, expected, rtol=1e-4, atol=1e-5)
    for (name, parameter), other in zip(lm.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_entropies_carry_a_gradient_when_asked(entropy_grad: bool) -> None:
    lm, alone = tiny_llama(), tiny_llama()
    tokens = SEQUENCES[3]
    ids_1T, positions_1T, segments_1T = (
        torch.tensor([tokens]),
        torch.arange(7)[None],
        torch.zeros(1, 7, dtype=torch.int64),
    )

    scores = PackedPolicy(lm, chunk_size=4)(
        ids_1T, positions_1T, segments_1T, segments_1T, torch.arange(6), ids_1T[0, 1:], torch.ones(6),
        entropy_grad=entropy_grad,
    )  # fmt: skip

    assert scores.candidate_logprobs_MK is None
    assert scores.entropies_M.requires_grad == entropy_grad
    if entropy_grad:
        scores.entropies_M.sum().backward()
        reference(alone, tokens, 1.0)[1].sum().backward()
        torch.testing.assert_close(lm.lm_head.weight.grad, alone.lm_head.weight.grad, rtol=1e-4, atol=1e-5)
