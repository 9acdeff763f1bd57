"""Proves that an engine and the trainer have the same policy: once when a server is first met, then after every few pushes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from trainer.weight_sync.config import WeightSyncConfig
from trainer.weight_sync.engines.control import EngineControl
from trainer.weight_sync.engines.detect import LateControl
from trainer.weight_sync.engines.sampling import SamplingControl
from trainer.weight_sync.errors import NumericsError, ServerSyncError, WeightSyncError
from trainer.weight_sync.fingerprint import Fingerprint
from trainer.weight_sync.numerics import check_prompt, probe
from trainer.weight_sync.pooled_publisher import PooledPublisher
from trainer.weight_sync.results import PublishResult
from trainer.weight_sync.states import Edge
from trainer.weight_sync.transports.base import NamedWeights

log = logging.getLogger(__name__)

GREETING = "Hello"
"""The message whose prompt trainer and server are compared by."""

Score = Callable[[Sequence[int], float], list[float]]
"""The trainer's logprobs (nats) of token_ids[1:] at a temperature, under its weights of this moment."""


class NumericsGuard:
    """The probe and the fingerprint of one trainer.

    Args:
        score: the trainer's side of every comparison; called by one thread at a time.
        prompts: token ids, at least 2 in each.
        model: the name that adapters are served under; None: the base model.
        can_fingerprint: False where the engine cannot score prompts.
        chat_ids: token ids of one user message with the trainer's chat template and the opening of the answer; None without one.
    """

    def __init__(
        self,
        config: WeightSyncConfig,
        score: Score,
        prompts: Sequence[Sequence[int]],
        *,
        model: str | None = None,
        can_fingerprint: bool = True,
        chat_ids: Callable[[str], list[int]] | None = None,
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._model = model
        self._chat_ids = chat_ids
        self._probed: set[str] = set()
        self._lock = threading.Lock()
        self._open: object | None = None
        """Identifies the publication during which the policy may be scored; None between two."""
        self.refused: dict[str, NumericsError] = {}
        """Servers that failed the probe, by URL, until they pass it."""

        self._score = score
        self._fingerprint = Fingerprint(
            prompts,
            lambda token_ids: self._scored(token_ids, 1.0, self._open),
            config.fingerprint_every if can_fingerprint else 0,
            config.max_logprob_difference,
            model=model,
        )

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Let the policy be scored while this lasts. Its end waits for a forward pass that is under way.

        Afterwards the policy trains: a proof that was given up and still runs must not touch it.
        """
        with self._lock:
            self._open = object()
        try:
            yield
        finally:
            with self._lock:
                self._open = None

    def expect(self, version: int) -> None:
        """Compute what the weights of this moment give, where that is needed. Call it before each publication.

        Raises:
            WeightSyncError: not within scoring().
        """
        self._fingerprint.expect(str(version))

    def prove(self, control: EngineControl, weight_version: str) -> None:
        """Return if the server computes as the trainer does, as far as one can tell. It must generate, and run these weights.

        Raises:
            ServerSyncError: it does not, or does not answer.
        """
        engine = control.resolved if isinstance(control, LateControl) else control
        if self._config.probe and control.url not in self._probed:
            self._probe(engine)
        self._fingerprint.prove(engine, weight_version)

    def raise_refused(self) -> None:
        """Raise the refusal of a server, if there is one and no server has passed the probe.

        Raises:
            NumericsError: training would learn from noise.
        """
        if self.refused and not self._probed:
            raise next(iter(self.refused.values()))

    def _probe(self, engine: EngineControl) -> None:
        limit, publication = self._config.max_logprob_difference, self._open
        try:
            verdicts = probe(
                cast(SamplingControl, engine),
                self._prompts,
                lambda token_ids, temperature: self._scored(token_ids, temperature, publication),
                limit=limit,
                model=self._model,
                timeout_s=self._config.timeout_s,
            )
        except ServerSyncError:
            raise
        except NumericsError as error:
            self.refused[engine.url] = error
            raise ServerSyncError(engine.url, Edge.VERIFY, str(error)) from error
        except WeightSyncError as error:
            raise ServerSyncError(engine.url, Edge.VERIFY, str(error)) from error
        self.refused.pop(engine.url, None)
        self._probed.add(engine.url)
        found = ", ".join(f"{verdict.mean_abs:.3f}" for verdict in verdicts)
        log.info(
            "%s computes as the trainer does: mean difference of logprobs %s nats, limit %g", engine.url, found, limit
        )
        self._compare_prompts(engine)

    def _scored(self, token_ids: Sequence[int], temperature: float, publication: object | None) -> list[float]:
        # The model is one, and servers are proven side by side.
        with self._lock:
            if publication is None or self._open is not publication:
                raise WeightSyncError(
                    "the proof took longer than its publication: the trainer's weights are no longer those to compare "
                    "with; raise weight_sync.timeout_s"
                )
            return self._score(token_ids, temperature)

    def _compare_prompts(self, engine: EngineControl) -> None:
        """Only said: environments that send token ids need no template of the server's."""
        if self._chat_ids is None or engine.engine != "vllm":
            return
        try:
            expected = self._chat_ids(GREETING)
        except Exception as error:  # a template is a program of the model's authors
            log.warning("the trainer's chat template fails on a plain message, so prompts are not compared: %r", error)
            return
        try:
            check_prompt(cast(SamplingControl, engine), GREETING, expected)
        except (NumericsError, ServerSyncError) as error:
            log.warning("environments that use the chat route sample from other prompts than are trained: %s", error)


class GuardedPublisher:
    """Publishes, and knows before each publication what its servers must answer afterwards.

    Args:
        publisher: calls `guard.prove` for each server.
    """

    def __init__(self, publisher: PooledPublisher, guard: NumericsGuard) -> None:
        self._publisher = publisher
        self._guard = guard

    def attach(self) -> None:
        """See WeightPublisher.attach."""
        self._publisher.attach()

    def publish(self, version: int, weights: NamedWeights) -> PublishResult:
        """See WeightPublisher.publish.

        Raises:
            NumericsError: no server computes as the trainer does.
        """
        with self._guarded():
            self._guard.expect(version)
            return self._publisher.publish(version, weights)

    def ensure_current(self, version: int, weights: NamedWeights) -> PublishResult:
        """See WeightPublisher.ensure_current.

        Raises:
            NumericsError: no server computes as the trainer does.
        """
        with self._guarded():
            return self._publisher.ensure_current(version, weights)

    def close(self) -> None:
        """See WeightPublisher.close."""
        self._publisher.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with self._guard.scoring():
                yield
        except WeightSyncError:
            self._guard.raise_refused()
            raise
