"""A run at its rollout server and its engines, from opening to closing. Every rank has one; rank 0's speaks for all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atroposlib.errors import AtroposError
from atroposlib.wire.columns import Group
from atroposlib.wire.models import RunInfo
from trainer.batches.step_batch import StepBatch
from trainer.batches.stream import BatchStream, Client
from trainer.config import resolved as resolved_config
from trainer.config.grpo import GRPOConfig
from trainer.errors import TrainerError
from trainer.reporting.completions_table import Decode
from trainer.reporting.ledger import JsonLines, TrainerLedger
from trainer.reporting.run_watch import RunWatch
from trainer.run import engine_link
from trainer.run import setup as run_setup
from trainer.run.publication import Publication, Publisher, is_published
from trainer.step.clock import StepClock
from trainer.weight_sync.sources import WeightSource
from trainer.weight_sync.transports.base import NamedWeights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Writers:
    """What rank 0 writes down."""

    metrics: JsonLines
    ledger: TrainerLedger
    watch: RunWatch


class TrainingRun:
    """Batches in, confirmations and weights out.

    Args:
        connect: makes the client of the rollout server.
        publisher: brings weights to the engines; None for the one that the configuration asks for.
        should_stop: looked at while waiting.
        start_step: steps behind the checkpoint that the run goes on from.
        decode: token ids to text; None writes no completions.
    """

    def __init__(
        self,
        config: GRPOConfig,
        connect: Callable[[], Client],
        *,
        publisher: Publisher | None,
        should_stop: Callable[[], bool],
        start_step: int,
        decode: Decode | None,
    ) -> None:
        self.clock = StepClock()
        self._config = config
        self._publisher = publisher
        self._publication: Publication | None = None
        self._writers: _Writers | None = None
        self._leased: list[Group] = []
        self._told: set[str] = set()
        # One that fails to close keeps no other open.
        with ExitStack() as opened:
            if config.process_index == 0:
                self._writers = _open_writers(config, opened, start_step=start_step, decode=decode)
            self._stream = BatchStream(
                connect,
                last_step=config.max_steps,
                prefetch=config.prefetch,
                deadline_s=config.batch_deadline_s,
                should_stop=should_stop,
            )
            opened.callback(self._stream.close)
            self._opened = opened.pop_all()

    def begin(self, step: int, source: WeightSource, make_publisher: Callable[[], Publisher | None]) -> None:
        """Open the run and bring the engines to our version. Every rank calls this.

        Args:
            source: of the weights, for this and every later publication.
            make_publisher: called on rank 0, where none was given.
        Raises:
            TrainerError: the server no longer has the batches that come after this step.
        """
        self._source = source
        info = self._open(step)
        if info.committed_step > step:
            raise TrainerError(
                f"run {info.run_name!r} has a checkpoint after {info.committed_step} steps, and its older batches are "
                f"gone, but the newest whole checkpoint in {self._config.output_dir} is after {step}; give the output_dir "
                "that holds it, or another run_name to start anew"
            )
        self._stream.join(info.session)
        self._engine_version = info.policy_version
        weights = self._gather(step)
        if self._config.process_index == 0:
            self._publication = Publication(
                self._publisher or make_publisher(),
                announce=self._stream.publish_policy,
                engine_version=self._engine_version,
            )
            self._opened.callback(self._publication.close)
            self._publication.start(step, weights)
        log.info("run %s: step %d of %d", info.run_name, step, self._config.max_steps)

    def groups_of(self, step: int) -> list[Group] | None:
        """The batch of a step; None when the trainer should stop.

        Raises:
            AtroposError: see BatchStream.get.
        """
        self.clock.start("wait")
        groups = self._stream.get(step, on_idle=self._publication.while_idle if self._publication else _nothing)
        if groups is None:
            return None
        self.clock.start("train")
        self._leased = groups
        return groups

    def after_step(self, batch: StepBatch, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Ledger, publication, acknowledgement, then metrics. Every rank calls this.

        Args:
            figures: of the step, under their names in the metrics.
        Returns:
            What was written in metrics.jsonl; empty on other ranks than 0.
        """
        self.clock.start("sync")
        weights = self._gather(batch.step + 1)
        if self._publication is None or self._writers is None:
            return {}
        # Also the groups that were left out: they are used up.
        self._writers.ledger.record(
            batch.step,
            groups=[group.group_id for group in self._leased],
            sequences=sum(group.n_sequences for group in self._leased),
            max_staleness=max(batch.staleness(), default=None),
        )
        published = self._publication.after_step(batch.step + 1, weights)
        self._stream.ack(batch.step, policy_version=published)
        metrics = {**figures, **self.clock.finish()}
        metrics |= self._writers.watch.after_step(batch.step, metrics, batch)
        self._writers.metrics.append({"step": batch.step, "time": time.time(), "policy_version": published, **metrics})
        _say(batch.step, metrics)
        return metrics

    def commit(self, step: int) -> None:
        """Tell the server that weights after `step` steps are safe. Every rank calls this."""
        if self._config.process_index == 0:
            self._stream.commit(step)

    def warn_once(self, kind: str, text: str) -> None:
        """Log the first trouble of a kind; how often it comes is in the metrics."""
        if kind not in self._told:
            self._told.add(kind)
            log.warning("%s (told once; from now on counted as %s)", text, kind)

    def close(self) -> None:
        """Let go of the engines, the server and the files."""
        self._opened.close()

    def _gather(self, version: int) -> NamedWeights:
        """The weights for a publication, on rank 0. Every rank calls this, before rank 0 sends anything."""
        publishes = self._publisher is not None or engine_link.has_engines(self._config)
        if not publishes or not is_published(version, engine_version=self._engine_version):
            return ()
        return self._source.gather() or ()

    def _open(self, step: int) -> RunInfo:
        """Open the run on rank 0; every rank learns the answer, or the reason why there is none."""
        answer: list[RunInfo | AtroposError | None] = [None]
        if self._config.process_index == 0:
            try:
                answer = [self._stream.open_run(run_setup.run_request(self._config, start_step=step))]
            except AtroposError as error:
                answer = [error]
        if self._config.world_size > 1:
            torch.distributed.broadcast_object_list(answer, src=0)
        info = answer[0]
        if not isinstance(info, RunInfo):
            raise info if info is not None else TrainerError("rank 0 sent no run")
        return info


def _open_writers(config: GRPOConfig, opened: ExitStack, *, start_step: int, decode: Decode | None) -> _Writers:
    folder = Path(config.run_dir)
    # First: it reads the lines of the steps that are not taken again.
    watch = RunWatch(config, decode=decode, start_step=start_step)
    opened.callback(watch.close)
    metrics = JsonLines(folder / "metrics.jsonl")
    opened.callback(metrics.close)
    ledger = TrainerLedger(folder)
    opened.callback(ledger.close)
    resolved_config.keep(config)
    return _Writers(metrics, ledger, watch)


def _say(step: int, metrics: Mapping[str, Any]) -> None:
    log.info(
        "step %d: reward %.3f, loss %.4f, grad_norm %.3f, staleness %d, kl %.4f, %d tokens, %.1f s (waited %.1f s)",
        step,
        metrics["reward/mean"],
        metrics["loss/total"],
        metrics["grad_norm"],
        metrics["staleness/max"],
        metrics["mismatch/kl_k3"],
        metrics["tokens/step"],
        metrics["time/step_s"],
        metrics["time/wait_s"],
    )


def _nothing() -> None:
    """No engines to look after on this rank."""
