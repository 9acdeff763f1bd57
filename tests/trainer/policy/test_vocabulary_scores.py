from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.policy.vocabulary_scores import vocabulary_scores

Case = tuple[Tensor, Tensor, Tensor]


def plain_scores(logits_CV: Tensor, ids_CJ: Tensor, temperatures_C: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, by torch's own operations."""
    logprobs_CV = torch.log_softmax(logits_CV / temperatures_C[:, None], dim=-1)
    return logprobs_CV.gather(-1, ids_CJ), -(logprobs_CV.exp() * logprobs_CV).sum(-1)


def case_of(*, temperature: float | None, candidates: int, scale: float = 3.0) -> Case:
    generator = torch.Generator().manual_seed(0)
    logits_CV = (scale * torch.randn(7, 50, generator=generator, dtype=torch.float64)).requires_grad_()
    # The same token may be asked for twice in one place.
    ids_CJ = torch.randint(0, 50, (7, candidates), generator=generator)
    temperatures_C = torch.rand(7, generator=generator, dtype=torch.float64) + 0.5
    return logits_CV, ids_CJ, temperatures_C if temperature is None else torch.full_like(temperatures_C, temperature)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7, None])
def test_values_and_gradients_are_those_of_the_definition(
    temperature: float | None, candidates: int, entropy_grad: bool
) -> None:
    logits_CV, ids_CJ, temperatures_C = case_of(temperature=temperature, candidates=candidates)
    weights_CJ, weights_C = torch.randn(7, candidates, dtype=torch.float64), torch.randn(7, dtype=torch.float64)

    def gradient_of(scores: tuple[Tensor, Tensor]) -> Tensor:
        total = (weights_CJ * scores[0]).sum() + ((weights_C * scores[1]).sum() if entropy_grad else 0)
        (gradient_CV,) = torch.autograd.grad(total, logits_CV)
        return gradient_CV

    ours = vocabulary_scores(logits_CV, ids_CJ, temperatures_C, entropy_grad=entropy_grad)
    expected = plain_scores(logits_CV, ids_CJ, temperatures_C)

    torch.testing.assert_close(ours[0], expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient_of(ours), gradient_of(expected), rtol=1e-10, atol=1e-10)
    assert ours[1].requires_grad == entropy_grad


def test_a_certain_token_and_an_impossible_one_have_finite_scores() -> None:
    logits_CV, ids_CJ, temperatures_C = case_of(temperature=1.0, candidates=2, scale=2000.0)

    logprobs_CJ, entropies_C = vocabulary_scores(logits_CV.float(), ids_CJ, temperatures_C.float(), entropy_grad=True)
    (gradient_CV,) = torch.autograd.grad(logprobs_CJ.sum() + entropies_C.sum(), logits_CV)

    assert all(tensor.isfinite().all() for tensor in (logprobs_CJ, entropies_C, gradient_CV))


def test_bfloat16_logits_are_scored_in_float32_and_left_as_they_are() -> None:
    logits_CV, ids_CJ, temperatures_C = case_of(temperature=None, candidates=1)
    half_CV = logits_CV.detach().bfloat16()
    before_CV = half_CV.clone()

    logprobs_CJ, _ = vocabulary_scores(half_CV, ids_CJ, temperatures_C.float(), entropy_grad=False)

    torch.testing.assert_close(
        logprobs_CJ, plain_scores(half_CV.double(), ids_CJ, temperatures_C)[0].float(), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(half_CV, before_CV)
