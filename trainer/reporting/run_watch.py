"""Looks at each finished step: alarms, and a sample of completions. On rank 0 only."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.batches.step_batch import StepBatch
from trainer.reporting.alarms import Alarms, Metrics, alarm_rules
from trainer.reporting.completions_table import CompletionRow, CompletionsFile, Decode, chosen, rows_of, send_to_wandb
from trainer.reporting.ledger import JsonLines

if TYPE_CHECKING:
    from trainer.config.grpo import GRPOConfig

log = logging.getLogger(__name__)

ALARMS_FILE = "alarms.jsonl"


class RunWatch:
    """What a person would look at after each step.

    Args:
        config: of the run.
        decode: token ids to text; None writes no completions.
        start_step: of a resumed run: its earlier lines in metrics.jsonl are looked at first, in silence.
        send_table: gets the rows of a step; the sink of report_to if absent.
    """

    def __init__(
        self,
        config: GRPOConfig,
        *,
        decode: Decode | None,
        start_step: int = 0,
        send_table: Callable[[Sequence[CompletionRow]], None] | None = None,
    ) -> None:
        folder = Path(config.run_dir)
        self._seed = config.seed
        self._probability = config.save_completions_probability
        is_wanted = config.log_completions or self._probability is not None
        self._decode = decode if is_wanted else None
        if is_wanted and decode is None:
            log.warning("no tokenizer: completions are not logged; give tokenizer_name_or_path")
        self._completions = CompletionsFile(folder)
        reports_to_wandb = config.log_completions and config.reports_to("wandb")
        self._send_table = send_table or (send_to_wandb if reports_to_wandb else _nowhere)
        self._alarms = Alarms(alarm_rules(max_staleness=config.max_staleness))
        for metrics in earlier_steps(folder / "metrics.jsonl", before=start_step):
            self._alarms.after_step(metrics)
        self._lines = JsonLines(folder / ALARMS_FILE)

    def after_step(self, step: int, metrics: Metrics, batch: StepBatch) -> dict[str, float]:
        """Look at a step.

        Returns:
            What its line in metrics.jsonl gets besides: completion/masked_frac, and alarm/NAME where one starts (1) or ends (0).
        """
        masked = sum(sequence.trained_tokens == 0 for sequence in batch.sequences) / max(1, len(batch.sequences))
        figures = {"completion/masked_frac": masked}
        for finding in self._alarms.after_step({**metrics, **figures}):
            figures[f"alarm/{finding.name}"] = float(finding.is_on)
            self._lines.append(
                {"step": step, "time": time.time(), "alarm": finding.name, "is_on": finding.is_on, "text": finding.text}
            )
            log.log(logging.WARNING if finding.is_on else logging.INFO, "alarm %s: %s", finding.name, finding.text)
        self._show_completions(batch)
        return figures

    def close(self) -> None:
        """Close its files."""
        self._lines.close()

    def _show_completions(self, batch: StepBatch) -> None:
        if self._decode is None:
            return
        try:
            rows = rows_of(batch, chosen(batch, probability=self._probability, seed=self._seed), self._decode)
            self._completions.append(rows)
            self._send_table(rows)
        except Exception as error:
            # Anything, from a tokenizer, a disk or a network: a picture for people must not cost the run its step.
            log.warning("completions of step %d are not shown: %s: %s", batch.step, type(error).__name__, error)


def earlier_steps(path: Path, *, before: int) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl of the steps before one, in order. Of a repeated step the last one."""
    lines: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:  # cut short when the trainer was killed
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and line["step"] < before:
            lines[line["step"]] = line
    return (lines[step] for step in sorted(lines))


def _nowhere(rows: Sequence[CompletionRow]) -> None:
    """No sink takes tables."""
