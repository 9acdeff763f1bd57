"""What a run on a data set writes down: metrics.jsonl, the resolved configuration, a line of log now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.agreement import together
from trainer.config import resolved as resolved_config
from trainer.reporting.ledger import JsonLines
from trainer.step.clock import StepClock
from trainer.supervised.config import DatasetTrainingConfig

log = logging.getLogger(__name__)


class RunLog:
    """Rank 0 writes; the other ranks keep the same figures.

    Args:
        facts: figures of the data, written once.
    """

    def __init__(self, config: DatasetTrainingConfig, facts: Mapping[str, float]) -> None:
        self.clock = StepClock()
        self.figures: dict[str, Any] = {}
        """Of the last step, under their names in metrics.jsonl."""
        self._config = config
        self._facts = facts
        self._lines: JsonLines | None = None
        self._total_steps = 0

    @contextmanager
    def opened(self, *, start_step: int, total_steps: int) -> Iterator[None]:
        """The files are open meanwhile. Every rank calls this, and what follows, at the same points.

        Raises:
            AtroposError: rank 0 cannot write them.
        """
        self._total_steps = total_steps
        try:
            together(self._open, ranks=self._config.world_size)
            self._write({"step": start_step, **self._facts, "total_steps": total_steps})
            yield
        finally:
            if self._lines is not None:
                self._lines.close()
                self._lines = None

    def _open(self) -> None:
        if self._config.process_index == 0:
            resolved_config.keep(self._config)
            self._lines = JsonLines(Path(self._config.run_dir) / "metrics.jsonl")

    def after_step(self, step: int, sums: Mapping[str, float], more: Mapping[str, Any]) -> None:
        """The figures of an optimizer step.

        Args:
            sums: over all ranks' passes.
            more: figures beside them.
        """
        tokens = max(1.0, sums["tokens"])
        means = {name: sums[name] / tokens for name in ("nll", "entropy", "teacher_cross_entropy") if name in sums}
        shares = {f"{name}_frac": sums[name] / tokens for name in ("sampled", "in_spans") if name in sums}
        seconds = self.clock.finish()
        speed = sums["tokens"] / max(seconds["time/step_s"], 1e-9)
        self.figures = {
            "loss": sums["loss"],
            **means,
            **shares,
            "tokens/trained": sums["tokens"],
            "tokens/trained_per_s": speed,
            **more,
            **seconds,
        }
        self._write({"step": step, **self.figures})
        if step % max(1, int(self._config.logging_steps)) == 0 or step == self._total_steps:
            log.info(
                "step %d of %d: loss %.4f, grad_norm %.3f, %d tokens, %.1f s",
                step,
                self._total_steps,
                sums["loss"],
                more["grad_norm"],
                sums["tokens"],
                seconds["time/step_s"],
            )

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of an evaluation."""
        self._write({"step": step, **figures})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float | int))
        log.info("after step %d: %s", step, shown)

    def _write(self, line: Mapping[str, Any]) -> None:
        together(lambda: self._append(line), ranks=self._config.world_size)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._lines is not None:
            self._lines.append({"time": time.time(), **line})
