"""Fingerprint: logprobs of fixed prompts prove that a server runs the weights it was sent.

Logprobs are in nats. Shapes: M scored tokens of the fixed prompts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainer.weight_sync.engines.control import EngineControl
from trainer.weight_sync.errors import ServerSyncError
from trainer.weight_sync.states import Edge

log = logging.getLogger(__name__)

Floats: TypeAlias = NDArray[np.float64]

SIGMAS = 4.0
"""Old and new weights are told apart only where half of the step between them is that far above the noise."""

SAME = 1e-6
"""Mean absolute difference of two answers, nats, up to which an engine has not changed at all."""

LEAST_STEP = 1e-4
"""Mean absolute difference that a step makes, nats, below which an engine's coarser weights may stay as they are."""

_TIMEOUT_S = 20.0


class Outcome(StrEnum):
    """What a comparison shows."""

    PROVEN = "proven"
    """It runs the weights that were sent."""
    CANNOT_TELL = "cannot_tell"
    """Within the limit, but the step changed the logprobs less than the noise between engine and trainer."""
    STALE = "stale"
    """It runs the weights of the version before."""
    WRONG = "wrong"
    """It runs neither."""


@dataclass(frozen=True)
class Comparison:
    """An outcome and its figures."""

    outcome: Outcome
    difference: float
    """Mean absolute difference from what the version should give."""
    difference_before: float | None
    """From what the version before should give; None when there was none."""


@dataclass(frozen=True)
class Evidence:
    """Logprobs of the fixed prompts, [M] each."""

    engine_M: Floats
    """As the engine reports."""
    expected_M: Floats
    """The trainer's under the weights that were sent."""
    before_M: Floats | None = None
    """The trainer's under the weights of the version before; None when there was none."""
    engine_before_M: Floats | None = None
    """The engine's under that version; None when it was not asked."""


def compare(evidence: Evidence, limit: float) -> Comparison:
    """Which weights does the engine run?

    Engine and trainer never agree exactly, and one step may move the logprobs by less than that. An engine that gives the
    very same answer as before took nothing. Otherwise its answer is projected on the step: 1 is the new weights, 0 the old
    ones, and the noise is what the nearer ones leave unexplained. Over M tokens this sees steps that are smaller than the
    noise of one token.

    Args:
        limit: mean absolute difference that is noise.
    """
    engine_M, before_M = evidence.engine_M, evidence.before_M
    return Comparison(
        _outcome(evidence, limit),
        difference=_mean_abs(engine_M - evidence.expected_M),
        difference_before=None if before_M is None else _mean_abs(engine_M - before_M),
    )


class Fingerprint:
    """Knows what fixed prompts must score under the weights just published, and asks servers for it.

    `expect` is for one thread; `prove` may run for several servers at once.

    Args:
        prompts: token ids, at least 2 in each. A few short ones do: a proof costs a server two prefills of them, one at
            the version before.
        score: the trainer's logprobs of token_ids[1:], at temperature 1, under its weights of that moment.
        every: publications between two proofs; 0: never. The first one is proven too.
        limit: mean absolute difference that is noise.
        model: the served name, e.g. of an adapter; None: the first one.
        timeout_s: for one proof of one server.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        score: Callable[[Sequence[int]], list[float]],
        every: int,
        limit: float,
        *,
        model: str | None = None,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        if not prompts or min(map(len, prompts)) < 2:
            raise ValueError("a fingerprint needs prompts of at least 2 tokens")
        self.counts: Counter[Outcome] = Counter()
        """Outcomes so far, over all servers."""
        self._prompts = [list(prompt) for prompt in prompts]
        self._score = score
        self._every = every
        self._limit = limit
        self._model = model
        self._timeout_s = timeout_s
        self._publications = 0
        self._is_due = False
        self._current: _Version | None = None
        self._before: _Version | None = None
        self._lock = threading.Lock()

    def expect(self, version: str) -> None:
        """Compute what the weights of this moment give. Call it before each publication, once a version.

        Cheap: only the publications that are proven, and the ones before them, cost a forward pass.
        """
        count, self._publications = self._publications, self._publications + 1
        self._is_due = bool(self._every) and count % self._every == 0
        is_next_due = bool(self._every) and (count + 1) % self._every == 0
        self._before, self._current = self._current, None
        if self._is_due or is_next_due:
            self._current = _Version(version, self._scored(self._score))

    def prove(self, control: EngineControl, version: str) -> None:
        """Return if the server runs these weights, as far as one can tell, or if no proof is due.

        A paused engine does not answer: call it after resume.

        Raises:
            ServerSyncError: it runs other weights, or does not answer.
        """
        current, before = self._current, self._before
        if current is None or current.name != version:
            return
        engine_M = self._asked(control)
        current.answers[control.url] = engine_M
        if not self._is_due:
            return
        evidence = Evidence(
            engine_M,
            current.expected_M,
            None if before is None else before.expected_M,
            None if before is None else before.answers.get(control.url),
        )
        found = compare(evidence, self._limit)
        with self._lock:
            self.counts[found.outcome] += 1
        log.info("%s at version %s: %s (%.3g nats)", control.url, version, found.outcome, found.difference)
        if found.outcome in (Outcome.STALE, Outcome.WRONG):
            raise ServerSyncError(control.url, Edge.VERIFY, _reason(found, version, self._limit))

    def _asked(self, control: EngineControl) -> Floats:
        deadline = time.monotonic() + self._timeout_s
        return self._scored(
            lambda prompt: control.prompt_logprobs(
                prompt, model=self._model, timeout_s=max(deadline - time.monotonic(), 0.05)
            )
        )

    def _scored(self, score: Callable[[Sequence[int]], list[float]]) -> Floats:
        return np.concatenate([np.asarray(score(prompt), dtype=np.float64) for prompt in self._prompts])


@dataclass(frozen=True)
class _Version:
    name: str
    expected_M: Floats
    answers: dict[str, Floats] = field(default_factory=dict)
    """By the server's URL."""


def _outcome(evidence: Evidence, limit: float) -> Outcome:
    engine_M, expected_M, before_M = evidence.engine_M, evidence.expected_M, evidence.before_M
    is_within = _mean_abs(engine_M - expected_M) <= limit  # NaN is not
    if before_M is None:
        return Outcome.PROVEN if is_within else Outcome.WRONG
    taken = _share_taken(engine_M, expected_M, before_M)
    is_old = _has_not_moved(evidence) or (taken is not None and taken < 0.25)
    if is_old and _mean_abs(engine_M - before_M) <= limit:
        return Outcome.STALE
    if not is_within:
        return Outcome.WRONG
    return Outcome.PROVEN if taken is not None and taken > 0.75 else Outcome.CANNOT_TELL


def _has_not_moved(evidence: Evidence) -> bool:
    if evidence.before_M is None or evidence.engine_before_M is None:
        return False
    is_same = _mean_abs(evidence.engine_M - evidence.engine_before_M) <= SAME
    return is_same and _mean_abs(evidence.expected_M - evidence.before_M) > LEAST_STEP


def _share_taken(engine_M: Floats, expected_M: Floats, before_M: Floats) -> float | None:
    """How far the engine went from the old weights, at 0, to the new ones, at 1; None where noise hides it."""
    step_M = expected_M - before_M
    size = float(np.linalg.norm(step_M))
    noise = min(_rms(engine_M - expected_M), _rms(engine_M - before_M))
    # Independent noise of every token moves the projection by noise / size.
    if size == 0.0 or size / 2 < SIGMAS * noise:
        return None
    return float((engine_M - before_M) @ step_M) / size**2


def _reason(found: Comparison, version: str, limit: float) -> str:
    text = (
        f"logprobs of the fixed prompts differ by {found.difference:.3g} nats on average from those of version "
        f"{version}, which it says it runs (limit {limit:g})"
    )
    if found.outcome is Outcome.STALE:
        return (
            f"{text}, and by {found.difference_before:.3g} from those of the version before: it did not take the update"
        )
    return f"{text}: it runs other weights, or computes them otherwise"


def _mean_abs(values_M: Floats) -> float:
    return float(np.abs(values_M).mean())


def _rms(values_M: Floats) -> float:
    return float(np.sqrt(np.square(values_M).mean()))
