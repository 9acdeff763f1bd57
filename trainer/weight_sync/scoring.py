"""Let the policy in training score whole sequences, as an engine scores them; and the prompts that both score."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from trainer.policy.logprobs import PackedPolicy

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Water boils at 100 degrees Celsius, which is 212 degrees Fahrenheit at sea level.",
    "def add(first, second):\n    return first + second\n\nprint(add(17, 25))",
    "Question: A train travels 60 miles in 2 hours. What is its speed?\nAnswer:",
)
"""Different kinds of text. Plain, so that the logprobs are not of the rarest tokens, where rounding is loudest."""

_TOKENS = 32


def fixed_prompts(encode: Callable[[str], list[int]] | None, *, vocabulary: int) -> list[list[int]]:
    """Prompts of at most 32 tokens for the start-up probe and the fingerprint, the same in every process.

    Args:
        encode: text to token ids; None without a tokenizer: the prompts are then arbitrary tokens.
        vocabulary: size of the vocabulary.
    """
    if encode is not None:
        return [encode(text)[:_TOKENS] for text in TEXTS]
    return [[(1 + start + 7 * i) % vocabulary for i in range(_TOKENS)] for start in range(len(TEXTS))]


@torch.no_grad()
def score_tokens(policy: PackedPolicy, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Logprobs (nats) of token_ids[1:], each given those before it, under the policy's weights of this moment.

    Args:
        policy: whole on this process. Sharded by ZeRO-3 it must be called on all ranks, with the same tokens.
        temperature: logits are divided by it.
    """
    ids_1T = torch.tensor([list(token_ids)], device=policy.lm.device)
    positions_1T = torch.arange(ids_1T.shape[1], device=ids_1T.device)[None]
    segments_1T = torch.zeros_like(ids_1T)
    was_training = policy.training
    policy.eval()
    try:
        logprobs_M, _ = policy(
            ids_1T,
            positions_1T,
            segments_1T,
            segments_1T,
            positions_1T[0, :-1],
            ids_1T[0, 1:],
            torch.full((ids_1T.shape[1] - 1,), temperature, device=ids_1T.device),
        )
    finally:
        policy.train(was_training)
    return [float(logprob) for logprob in logprobs_M]
