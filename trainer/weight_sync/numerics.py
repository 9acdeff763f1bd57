"""Start-up probe: does an engine report the logprobs that the trainer computes for the very same tokens?

Logprobs are in nats. Shapes: M tokens that an engine sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainer.losses.ratios import LOG_RATIO_LIMIT
from trainer.weight_sync.engines.sampling import SamplingControl
from trainer.weight_sync.errors import NumericsError

Score: TypeAlias = Callable[[Sequence[int], float], Sequence[float]]
"""(token_ids, temperature) -> the trainer's logprobs of token_ids[1:]."""

Floats: TypeAlias = NDArray[np.float64]

_IMPOSSIBLE = -1000.0
"""No sampled token is that unlikely. vLLM writes -9999 for minus infinity."""


class Cause(Enum):
    """Why two sides disagree, and what helps."""

    NOT_FINITE = (
        "an overflow: infinite or undefined logprobs",
        "start the server with --dtype bfloat16 instead of float16, and look for NaN in the trainer's weights",
    )
    RAW_LOGPROBS = (
        "that it reports raw logprobs, before the temperature is applied: they match the trainer's at temperature 1",
        "start the server with --logprobs-mode processed_logprobs, as `atropos inference` does",
    )
    POSITIONS = (
        "another handling of positions: the first tokens agree and later ones do not",
        "compare rope_scaling, sliding_window and max_position_embeddings in both config.json, and --hf-overrides",
    )
    WEIGHTS = (
        "that it runs other weights",
        "compare the server's --model and adapter with the trainer's model_name_or_path, and look whether the first "
        "publication reached it",
    )
    PRECISION = (
        "another precision, or weights that are little different: the differences are small and go both ways",
        "start the server with --dtype bfloat16, --kv-cache-dtype auto and no quantization, and look whether it runs the "
        "newest version; if you accept the noise, raise weight_sync.max_logprob_difference",
    )
    PROMPT = (
        "another tokenizer or chat template",
        "give server and trainer the same tokenizer.json and chat template (--tokenizer, --chat-template)",
    )

    def __init__(self, text: str, fix: str) -> None:
        self.text = text
        self.fix = fix


@dataclass(frozen=True)
class Scores:
    """The logprobs of M sampled tokens."""

    engine_M: Floats
    trainer_M: Floats
    """At the temperature of sampling."""
    unscaled_M: Floats
    """The trainer's at temperature 1."""
    places_M: NDArray[np.int64]
    """Tokens before each one in its sequence."""


@dataclass(frozen=True)
class Verdict:
    """What the comparison says."""

    cause: Cause | None
    """None: accepted."""
    tokens: int
    mean_abs: float
    max_abs: float
    mean: float
    """Of engine minus trainer. For tokens that the engine sampled it estimates the KL divergence (k1)."""
    kl_k3: float
    """Mean of exp(d) - d - 1 with d = trainer minus engine."""

    def figures(self) -> str:
        """As a sentence has them."""
        return (
            f"{self.mean_abs:.3g} nats on average over {self.tokens} sampled tokens, {self.max_abs:.3g} at most, "
            f"mean {self.mean:+.3g}, KL (k3) {self.kl_k3:.3g}"
        )


def judge(scores: Scores, limit: float) -> Verdict:
    """Accept, or refuse with the most likely cause.

    Args:
        limit: mean absolute difference that is still accepted. Of a bfloat16 engine and a float32 trainer it is 0.01 to 0.03.
    """
    if not len(scores.engine_M):
        raise ValueError("there are no tokens to compare")
    with np.errstate(invalid="ignore"):  # infinity minus infinity: refused as what it is
        difference_M = scores.engine_M - scores.trainer_M
        back_M = np.clip(-difference_M, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return Verdict(
            cause=_cause(scores, limit),
            tokens=len(difference_M),
            mean_abs=_mean_abs(difference_M),
            max_abs=float(np.abs(difference_M).max()),
            mean=float(difference_M.mean()),
            kl_k3=float((np.expm1(back_M) - back_M).mean()),
        )


def probe(
    server: SamplingControl,
    prompts: Sequence[Sequence[int]],
    score: Score,
    *,
    limit: float,
    temperatures: Sequence[float] = (1.0, 0.7),
    max_tokens: int = 32,
    model: str | None = None,
    timeout_s: float = 60.0,
) -> list[Verdict]:
    """Let the server sample a little and score the same tokens in the trainer. The server must run its weights.

    Args:
        prompts: token ids, at least 2 in each.
        limit: see judge.
        temperatures: 1 first, which tells weights and precision; any other tells raw logprobs from processed ones.
        max_tokens: sampled after each prompt at each temperature.
        model: the served name, e.g. of an adapter; None: the first one.
        timeout_s: for the server, in all.
    Returns:
        A verdict for each temperature, all accepted.
    Raises:
        NumericsError: refused.
        ServerSyncError: the server does not answer.
    """
    deadline = time.monotonic() + timeout_s
    verdicts = []
    for temperature in temperatures:
        scores = _sampled_scores(server, prompts, score, temperature, max_tokens, model, deadline)
        verdicts.append(judge(scores, limit))
        _raise_refused(server.url, verdicts[-1], f"logprobs at temperature {temperature:g}", limit)
    return verdicts


def check_prompt(server: SamplingControl, text: str, expected: Sequence[int], *, timeout_s: float = 20.0) -> None:
    """Compare how server and trainer turn one user message into a prompt.

    Args:
        expected: token ids of that message with the trainer's tokenizer and chat template, with the opening of the answer.
    Raises:
        NumericsError: they differ.
        ServerSyncError: the server does not answer.
    """
    found = server.chat_token_ids([{"role": "user", "content": text}], timeout_s=timeout_s)
    if found == list(expected):
        return
    place = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    where = f"from token {place} on" if place is not None else "in length"
    figures = f"its prompt of {len(found)} tokens and the trainer's of {len(expected)} differ {where}"
    raise NumericsError(server.url, figures=figures, cause=Cause.PROMPT.text, fix=Cause.PROMPT.fix)


def _sampled_scores(
    server: SamplingControl,
    prompts: Sequence[Sequence[int]],
    score: Score,
    temperature: float,
    max_tokens: int,
    model: str | None,
    deadline: float,
) -> Scores:
    completions = server.sample(
        prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        model=model,
        timeout_s=max(deadline - time.monotonic(), 0.05),
    )
    columns: list[tuple[float, float, float, int]] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        token_ids, start = [*prompt, *completion.token_ids], len(prompt) - 1
        scaled = score(token_ids, temperature)[start:]
        unscaled = scaled if temperature == 1.0 else score(token_ids, 1.0)[start:]
        places = range(len(prompt), len(token_ids))
        columns += zip(completion.logprobs, scaled, unscaled, places, strict=True)
    engine_M, trainer_M, unscaled_M, places_M = (np.array(column) for column in zip(*columns, strict=True))
    return Scores(engine_M, trainer_M, unscaled_M, places_M)


def _raise_refused(server: str, verdict: Verdict, what: str, limit: float) -> None:
    if verdict.cause is not None:
        figures = f"{what} differ by {verdict.figures()} (limit {limit:g} on average)"
        raise NumericsError(server, figures=figures, cause=verdict.cause.text, fix=verdict.cause.fix)


def _cause(scores: Scores, limit: float) -> Cause | None:
    """Why to refuse; None to accept. Causes in the order of how surely the figures show them."""
    values = np.concatenate([scores.engine_M, scores.trainer_M])
    if not np.isfinite(values).all() or values.min() < _IMPOSSIBLE:
        return Cause.NOT_FINITE
    difference_M = scores.engine_M - scores.trainer_M
    mean_abs = _mean_abs(difference_M)
    if _mean_abs(scores.engine_M - scores.unscaled_M) < mean_abs / 2:
        # Also below the limit: at a temperature near 1 the two kinds differ little, and yet they are not the same.
        return Cause.RAW_LOGPROBS
    if mean_abs <= limit:
        return None
    early_M = scores.places_M < np.median(scores.places_M)
    if early_M.any() and _mean_abs(difference_M[early_M]) < min(limit, _mean_abs(difference_M[~early_M]) / 4):
        return Cause.POSITIONS
    # Tokens come from the engine's own distribution: another one finds them less likely on average, noise does not.
    is_biased = float(difference_M.mean()) > mean_abs / 4
    return Cause.WEIGHTS if is_biased or mean_abs > 1.0 else Cause.PRECISION


def _mean_abs(values_M: Floats) -> float:
    return float(np.abs(values_M).mean())
