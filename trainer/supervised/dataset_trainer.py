"""Training on a data set: transformers' Trainer with our schedule, packed passes, losses, evaluation and figures.

From transformers come optimizer, schedule of the learning rate, checkpoints, resuming, DeepSpeed and logging sinks. Its loop
sees one item an optimizer step; which examples those are and how they are cut into passes is decided here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainerControl

from trainer.agreement import together
from trainer.checkpoints.keeper import CheckpointKeeper
from trainer.errors import CheckpointError
from trainer.packed_trainer import PackedTrainer
from trainer.policy.hub import hub_target, push_folder
from trainer.policy.loading import PolicySaver, prepare_partitioned
from trainer.step.gradient_accumulation import GradientAccumulation
from trainer.step.guard import StepGuard
from trainer.step.memory_estimate import log_estimate
from trainer.supervised.config import DatasetTrainingConfig
from trainer.supervised.examples import Example
from trainer.supervised.figures import FigureSums, evaluation_figures
from trainer.supervised.objectives import Objective
from trainer.supervised.passes import Pass, passes_of_rank
from trainer.supervised.run_log import RunLog
from trainer.supervised.schedule import Schedule
from trainer.weight_sync.sources import full_numel, has_adapter, is_partitioned

log = logging.getLogger(__name__)

Optimizers = tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None]


class DatasetTrainer(PackedTrainer):
    """Trains a PackedPolicy on examples.

    Args:
        policy: what is trained.
        config: every option.
        tokenizer: saved with the model.
        examples: to train on, the same on every rank.
        held_out: to evaluate on; empty for no evaluation.
        objective: what is learnt.
        facts: figures of the data, for the first line of metrics.jsonl.
    """

    args: DatasetTrainingConfig

    def __init__(
        self,
        policy: Any,
        config: DatasetTrainingConfig,
        *,
        tokenizer: Any,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        objective: Objective,
        facts: dict[str, float],
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: Optimizers = (None, None),
    ) -> None:
        self._hub = hub_target(config)
        super().__init__(
            model=policy,
            args=config,
            processing_class=tokenizer,
            # transformers only asks whether there is one.
            eval_dataset=[{}] if config.evaluates else None,
            callbacks=[_Hooks(self), *callbacks],
            optimizers=optimizers,
        )
        self.remove_callback(PrinterCallback)
        self._examples = examples
        self._held_out = held_out
        self._objective = objective
        self._schedule = Schedule(len(examples), batch_size=config.batch_size, seed=config.seed)
        self._total_steps = self._schedule.total_steps(epochs=config.num_train_epochs, max_steps=config.max_steps)
        # The tokenizer is saved as processing_class.
        self._saver = PolicySaver(None)
        self._keeper = CheckpointKeeper(config, wait=self.accelerator.wait_for_everyone)
        self._guard = StepGuard(is_deepspeed=self.is_deepspeed_enabled)
        self._accumulation = GradientAccumulation(self.accelerator, config, is_deepspeed=self.is_deepspeed_enabled)
        self._run_log = RunLog(config, facts)
        self._stop_reason: str | None = None
        self._figures: dict[str, float] | None = None

    # The run, from start to end

    def train(self, *_: Any, **__: Any) -> Any:
        """Train, from the newest whole checkpoint if there is one, and save the result in run_dir/final.

        Raises:
            AtroposError: the run cannot go on; the text says why.
        """
        found = self._keeper.find()
        with self._run_log.opened(start_step=self._keeper.saved_step, total_steps=self._total_steps):
            output = super().train(resume_from_checkpoint=str(found) if found else None)
            self._finish()
            return output

    def request_stop(self, reason: str) -> None:
        """End after the step under way, with a checkpoint. Safe to call from a signal handler."""
        self._stop_reason = reason

    def begin(self) -> None:
        """Called on every rank when weights, optimizer and step are loaded."""
        if is_partitioned(self.model):
            prepare_partitioned(self.model, self.args.device)
        # A longer example has a pass of its own.
        log_estimate(self.model, self.args, pass_tokens=max(self.args.pass_tokens, self.args.max_seq_length))
        self._compare_epochs()

    def _compare_epochs(self) -> None:
        """Warn where a checkpoint comes from other rows: the steps go on at another place of the epoch."""
        step, epoch = self.state.global_step, self.state.epoch
        before = round(step / epoch) if step and epoch else self.steps_per_epoch
        if before != self.steps_per_epoch:
            log.warning(
                "the checkpoint had %d steps an epoch, and these rows and batch_size make %d: rows that were learnt may come "
                "again, others not at all; give the same rows to go on exactly",
                before,
                self.steps_per_epoch,
            )

    def _finish(self) -> None:
        step = self.state.global_step
        if step < self._total_steps:
            if step > self._keeper.saved_step and self.args.save_strategy != "no":
                self._save_checkpoint(self.model_wrapped, trial=None)
            log.info("stopped by %s after %d steps; the same command goes on", self._stop_reason or "a callback", step)
            return
        folder = together(
            lambda: self._keeper.save_final(lambda draft: self.save_model(str(draft))), ranks=self.args.world_size
        )
        if self.is_world_process_zero():
            log.info("finished after %d steps: %s", step, folder)
            if self._hub is not None:
                push_folder(folder, self._hub)

    # Steps

    def get_train_dataloader(self) -> Any:
        """One item an optimizer step: its number."""
        return _EpochSteps(self)

    def get_batch_samples(self, epoch_iterator: Iterator[int], num_batches: int, device: Any) -> Any:
        """The next step; none when the epoch is over, as in one that a resumed run has begun before."""
        return list(islice(epoch_iterator, num_batches)), None

    def remaining_steps(self) -> Iterator[int]:
        """The steps of this epoch that are not taken yet."""
        per_epoch = self._schedule.steps_per_epoch
        first = self.state.global_step
        return iter(range(first, (first // per_epoch + 1) * per_epoch))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every example is gone through once."""
        return self._schedule.steps_per_epoch

    def training_step(self, model: Any, inputs: int, num_items_in_batch: Any = None) -> Tensor:
        """Every pass of the step.

        Returns:
            The loss of the whole batch, the same on every rank.
        """
        self._run_log.clock.start("wait")
        examples = self._objective.completed(inputs, [self._examples[i] for i in self._schedule.batch(inputs)])
        self._run_log.clock.start("train")
        passes, sums = self.passes_of(examples), FigureSums(self.args.device)
        self._guard.start()
        model.train()

        def loss_of(each: Pass) -> Tensor:
            loss = self._objective.loss(model, each.to(self.args.device))
            sums.add(**loss.sums)
            return loss.total

        self._accumulation.run(model, passes, loss_of)
        self._figures = sums.gathered(wants_to_stop=self._stop_reason is not None)
        return torch.tensor(self._figures["loss"], device=self.args.device)

    def passes_of(self, examples: Sequence[Example]) -> tuple[Pass, ...]:
        """This rank's passes over examples."""
        return passes_of_rank(
            examples,
            rank=self.args.process_index,
            ranks=self.args.world_size,
            max_tokens=self.args.pass_tokens,
            hidden_size=self.model.config.get_text_config().hidden_size,
        )

    def floating_point_ops(self, inputs: int) -> int:  # type: ignore[override]  # one item is a step here
        """Of the step, without attention and recomputation: 6 for each parameter and token."""
        tokens = sum(len(self._examples[i].tokens_L) for i in self._schedule.batch(inputs))
        operations: int = 6 * tokens * sum(map(full_numel, self.model.parameters())) // self.args.world_size
        return operations

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The norm before clipping. transformers asks for it right before the optimizer step."""
        norm = float(super()._get_grad_norm(model, grad_norm))
        loss = self._figures["loss"] if self._figures is not None else 0.0
        self._guard.check(norm, model, self.accelerator, loss=loss)
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """After each optimizer step: its figures; then logs, evaluation and checkpoints."""
        if self._figures is not None:
            figures, self._figures = self._figures, None
            step = self.state.global_step
            # In an epoch that a resumed run has begun before, transformers counts from its start.
            self.state.epoch = step / self._schedule.steps_per_epoch
            more = {"grad_norm": float(grad_norm), "learning_rate": kwargs.get("learning_rate")}
            self._run_log.after_step(
                step, figures, {**more, "epoch": self.state.epoch, "step/skipped": self._guard.skipped}
            )
            self._guard.finish(step)
            if figures["stop"] > 0:
                self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Send a step's figures to the sinks of report_to, with our own among them."""
        super().log({**self._run_log.figures, **logs} if "grad_norm" in logs else logs, start_time)

    # Evaluation

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Loss and perplexity on the examples held out, and what further_evaluation adds. Every rank calls this."""
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        found = self._held_out_figures(model) if self._held_out else {}
        figures = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        figures |= self.further_evaluation()
        model.train(was_training)
        self._run_log.evaluated(self.state.global_step, figures)
        self.log(dict(figures))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    @torch.no_grad()
    def _held_out_figures(self, model: Any) -> dict[str, float]:
        sums = FigureSums(self.args.device)
        for each in self.passes_of(self._held_out):
            sums.add(**self._objective.loss(model, each.to(self.args.device)).sums)
        if is_partitioned(self.model):
            # ZeRO-3 has begun to fetch weights for a backward pass that does not come.
            model.empty_partition_cache()
        return evaluation_figures(sums.gathered())

    def further_evaluation(self) -> dict[str, float]:
        """Figures beside loss and perplexity, under their whole names. Every rank calls this, the model is in eval mode."""
        return {}

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A whole checkpoint; or none, and the run goes on."""

        def write(_: Path) -> None:
            super(DatasetTrainer, self)._save_checkpoint(model, trial)

        if self._keeper.save(self.state.global_step, write):
            self._keeper.rotate(self.state.best_model_checkpoint)

    def _load_best_model(self) -> None:
        if self.state.global_step < self._total_steps:
            # transformers calls this after a stop, too: the weights must stay those of the optimizer and the step.
            return
        folder = together(self._best_folder, ranks=self.args.world_size)
        log.info("the best model is that of %s (%s)", folder.name, self.state.best_metric)
        if self.is_deepspeed_enabled and not has_adapter(self.model.lm):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(folder))

    def _best_folder(self) -> Path:
        folder = Path(self.state.best_model_checkpoint)
        if not folder.is_dir():
            raise CheckpointError(
                f"the best checkpoint, {folder}, is gone\n"
                "hint: put it back, or take the last model: give the same command again with load_best_model_at_end=false"
            )
        return folder


class _Hooks(TrainerCallback):  # type: ignore[misc]
    """The moment of transformers' loop that the trainer needs."""

    def __init__(self, trainer: DatasetTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Weights, optimizer and step are loaded."""
        self._trainer.begin()


class _EpochSteps:
    """A loader of one epoch's steps, as transformers takes one."""

    def __init__(self, trainer: DatasetTrainer) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return self._trainer.steps_per_epoch

    def __iter__(self) -> Iterator[int]:
        return self._trainer.remaining_steps()
