"""The signal of a teacher with another tokenizer is the policy gradient of KL(student || teacher) over spans of text."""

from __future__ import annotations

import itertools

import torch

from trainer.losses.distillation import span_advantages


def test_tokens_of_a_span_share_what_the_teacher_makes_of_it() -> None:
    logprobs = torch.tensor([-1.0, -0.5, -2.0, -0.1])

    found = span_advantages(logprobs, torch.tensor([0, 0, 1, -1]), torch.tensor([-2.0, -1.0]))

    torch.testing.assert_close(found, torch.tensor([-0.5, -0.5, 1.0, 0.0]))


def test_with_the_same_tokens_it_is_the_log_ratio() -> None:
    logprobs, teacher = torch.tensor([-1.0, -0.5]), torch.tensor([-0.2, -3.0])

    torch.testing.assert_close(span_advantages(logprobs, torch.arange(2), teacher), teacher - logprobs)


def test_a_pass_without_a_span_has_no_advantages() -> None:
    found = span_advantages(torch.tensor([-1.0, -0.5]), torch.tensor([-1, -1]), torch.empty(0))

    assert found.tolist() == [0.0, 0.0]


def test_no_gradient_flows_through_it() -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)

    assert not span_advantages(logprobs, torch.zeros(1, dtype=torch.int64), torch.tensor([-2.0])).requires_grad


def test_in_expectation_it_is_the_gradient_of_the_reverse_divergence() -> None:
    """Two student tokens of 3 values each are one token of the teacher, which has 9: everything can be written out."""
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn(3, generator=generator), torch.randn(3, 3, generator=generator)
    parameters = [tensor.double().requires_grad_() for tensor in (first, second)]
    teacher = torch.randn(9, generator=generator).double().log_softmax(-1)

    def tokens(i: int, j: int) -> torch.Tensor:
        return torch.stack([parameters[0].log_softmax(-1)[i], parameters[1].log_softmax(-1)[i, j]])

    pairs = list(itertools.product(range(3), range(3)))
    exact = sum(tokens(i, j).sum().exp() * (tokens(i, j).sum() - teacher[3 * i + j]) for i, j in pairs)
    expected = torch.autograd.grad(exact, parameters)  # type: ignore[arg-type]

    surrogate = torch.zeros((), dtype=torch.float64)
    for i, j in pairs:
        logprobs = tokens(i, j)
        advantages = span_advantages(logprobs, torch.tensor([0, 0]), teacher[3 * i + j][None])
        surrogate = surrogate - logprobs.detach().sum().exp() * (advantages * logprobs).sum()
    found = torch.autograd.grad(surrogate, parameters)

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
