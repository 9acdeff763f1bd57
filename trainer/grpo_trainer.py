"""GRPO on leased batches: transformers' Trainer with our stream, passes, loss, publication and confirmations.

From transformers come optimizer, schedule, checkpoints, resuming, DeepSpeed and logging sinks. Its training loop sees one
item an optimizer step (this rank's share of the batch); how that is cut into passes is decided here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, set_seed

from atroposlib.errors import ConfigError, ServerUnreachableError
from trainer.agreement import agreed, together
from trainer.batches.micro_batch import RankShare
from trainer.batches.step_batch import StepBatch
from trainer.batches.stream import Client
from trainer.checkpoints.keeper import CheckpointKeeper
from trainer.config import deepspeed_presets
from trainer.config.grpo import GRPOConfig
from trainer.errors import RankError
from trainer.local.config import LocalConfig
from trainer.local.mode import LocalMode
from trainer.local.rewards import RewardFunc, with_reward_model
from trainer.local.rows import Rows
from trainer.loop_hooks import Hooks, Steps
from trainer.packed_trainer import PackedTrainer
from trainer.policy import kernels
from trainer.policy.hub import hub_target, push_folder
from trainer.policy.loading import prepare_partitioned
from trainer.policy.reference import AdapterOff, OwnCopy, own_policy, reference_of
from trainer.reporting import non_finite
from trainer.reporting.completions_table import Decode
from trainer.reporting.metrics import TokenFigures, TokenSums, batch_metrics
from trainer.reporting.tracking import prepare_tracking
from trainer.run import engine_link
from trainer.run import setup as run_setup
from trainer.run.publication import Publisher
from trainer.run.shares import Shares
from trainer.run.training_run import TrainingRun
from trainer.step.guard import StepGuard
from trainer.step.loss import rule_of
from trainer.step.memory_estimate import log_estimate
from trainer.step.passes import StepPasses
from trainer.weight_sync.sources import is_partitioned, weight_source

log = logging.getLogger(__name__)

Optimizers = tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None]


class GRPOTrainer(PackedTrainer):
    """Trains a policy with GRPO on the batches of a rollout server.

    Batches come from environments, and they evaluate: this class has no data loader and no evaluation loop of its own. With
    reward_funcs and train_dataset it starts the servers and an environment of them itself, for as long as train() runs.
    Override on_epoch_begin, on_step_end and on_evaluate as those of a transformers.TrainerCallback; what they raise ends
    the run. on_evaluate is for local mode: environments that run by themselves evaluate by themselves.

    Args:
        config, args: every option, under either name. The first argument may also be the model.
        model: a causal language model in memory, or its name; None for config.model_name_or_path.
        ref_model: the same for the reference policy, instead of config.ref_model_name_or_path.
        tokenizer, processing_class: saved with the model, under either name; the model folder's own if absent.
        compute_metrics: further figures of each step's batch, for the metrics; called on rank 0.
        callbacks: of transformers.
        optimizers: an optimizer and a schedule, each instead of what config names; None for that.
        connect: makes the client of the rollout server, instead of a RolloutClient from the config.
        publisher: brings weights to the engines, instead of a WeightPublisher for config.inference_servers.
        reward_funcs, train_dataset, eval_dataset, reward_weights, local: local mode; see LocalMode, where local is options.
        reward_model: one more of reward_funcs, the last.
    Raises:
        ConfigError: two names of one thing were given different values, or the model cannot be trained here.
    """

    args: GRPOConfig

    def __init__(
        self,
        config: GRPOConfig | Any = None,
        *,
        args: GRPOConfig | None = None,
        model: Any = None,
        ref_model: Any = None,
        tokenizer: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[StepBatch], Mapping[str, float]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: Optimizers = (None, None),
        connect: Callable[[], Client] | None = None,
        publisher: Publisher | None = None,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        reward_weights: Sequence[float] | None = None,
        reward_model: RewardFunc | None = None,
        local: LocalConfig | Mapping[str, Any] | None = None,
    ) -> None:
        if config is not None and not isinstance(config, GRPOConfig):
            if model is not None:
                raise ConfigError("the first argument is the model, and model= too: give one of them")
            config, model = None, config
        config = run_setup.resolve_config(config, args, model)
        if tokenizer is not None and processing_class is not None and tokenizer is not processing_class:
            raise ConfigError("tokenizer and processing_class are two names of one thing: give one of them")
        self.local = LocalMode.wanted(
            reward_funcs=with_reward_model(reward_funcs, reward_model),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            reward_weights=reward_weights,
            local=local,
        )
        if self.local is not None:
            own = tokenizer if tokenizer is not None else processing_class
            config = self.local.configured(config, model=model, tokenizer=own)
        prepare_tracking(config)
        self._hub = hub_target(config)
        if config.deepspeed:
            deepspeed_presets.meet_ranks(on_cpu=config.use_cpu, timeout_s=config.ddp_timeout)
        # A fresh adapter is random.
        set_seed(config.seed)
        policy = run_setup.policy_of(config, model)
        # Now: a resumed run's policy is not what it was at first.
        self._own_reference = own_policy(config, policy, ref_model)
        super().__init__(
            model=policy,
            args=config,
            processing_class=tokenizer if tokenizer is not None else processing_class,
            callbacks=[Hooks(self), *callbacks],
            optimizers=optimizers,
        )
        self.remove_callback(PrinterCallback)
        self._connect = connect or run_setup.rollout_client(config)
        self._publisher = publisher
        # A model that came in memory has no folder whose tokenizer belongs to it.
        is_named = model is None or isinstance(model, str)
        self._saver = run_setup.policy_saver(config, takes_tokenizer=is_named and self.processing_class is None)
        self._rule = rule_of(config)
        self._figures_of_batch = compute_metrics
        self._stop_reason: str | None = None
        self._keeper = CheckpointKeeper(config, wait=self.accelerator.wait_for_everyone)
        self._guard = StepGuard(is_deepspeed=self.is_deepspeed_enabled)
        self._share: RankShare | None = None
        self._figures: TokenFigures | None = None
        self._metrics: dict[str, Any] = {}

    # Override points

    def on_epoch_begin(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called when training begins: batches that come from a server know one epoch."""

    def on_step_end(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after each optimizer step of the run, before its batch is acknowledged."""

    def on_evaluate(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after local mode's evaluations before and after training; kwargs["metrics"] has the figures of one."""

    # The run, from start to end

    def train(self, *_: Any, **__: Any) -> Any:
        """Train to max_steps, from the newest whole checkpoint if there is one, and save the result.

        Raises:
            AtroposError: the run cannot go on; the text says why.
        """
        if self.local is None:
            return self._train()
        # A second train() is not stopped by what stopped the first.
        self._stop_reason = None
        with self.local.around(self):
            return self._train()

    def _train(self) -> Any:
        self._resumed_from = self._keeper.find()
        self._run = TrainingRun(
            self.args,
            self._connect,
            publisher=self._publisher,
            should_stop=lambda: self._stop_reason is not None,
            start_step=self._keeper.saved_step,
            decode=self._decode(),
        )
        try:
            with ExitStack() as self._hidden:
                self._hidden.enter_context(kernels.hidden_from_transformers(self.args))
                output = super().train(resume_from_checkpoint=str(self._resumed_from) if self._resumed_from else None)
            self._finish()
            return output
        except (ServerUnreachableError, RankError) as error:
            if self._stop_reason is None:
                raise
            log.warning("stopped by %s: %s", self._stop_reason, error)
            self._save_uncommitted()
            return None
        finally:
            self._run.close()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Sinks are told what is trained with.
        self._hidden.close()
        return super()._inner_training_loop(*args, **kwargs)

    def _decode(self) -> Decode | None:
        tokenizer = self.processing_class if self.processing_class is not None else self._saver.tokenizer
        return getattr(tokenizer, "decode", None)

    def request_stop(self, reason: str) -> None:
        """End after the step under way, with a checkpoint. Safe to call from a signal handler.

        Where several ranks train and the rollout server does not answer, the last checkpoint is the one before.
        """
        self._stop_reason = reason

    def begin(self) -> None:
        """Open the run and bring the engines to our version. Called on every rank when weights and step are loaded."""
        if is_partitioned(self.model):
            prepare_partitioned(self.model, self.args.device)
        source = weight_source(
            self.model,
            is_rank_0=self.is_world_process_zero(),
            dtype=run_setup.ENGINE_DTYPE,
            adapter_only=self.args.sends_adapter,
        )
        self._shares = Shares(self.args, self.model, self._run, self._rule)
        self._reference = self._make_reference()
        self._passes = StepPasses(
            self.accelerator,
            self.args,
            self._rule,
            is_deepspeed=self.is_deepspeed_enabled,
            reference=self._reference,
        )
        log_estimate(self.model, self.args, pass_tokens=self.args.max_tokens_per_micro_batch)
        step = self.state.global_step
        together(lambda: self._run.begin(step, source, self._engine_publisher), ranks=self.args.world_size)

    def _make_reference(self) -> AdapterOff | OwnCopy | None:
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        reference = reference_of(
            self.args, self.model, self._own_reference, deepspeed_config=plugin and plugin.deepspeed_config
        )
        if self._resumed_from is not None and self.args.sync_ref_model and isinstance(reference, OwnCopy):
            reference.load(self._resumed_from)
        return reference

    def _engine_publisher(self) -> Publisher | None:
        tokenizer = self._saver.tokenizer or self.processing_class
        return engine_link.publisher_for(self.args, self.model, dtype=run_setup.ENGINE_DTYPE, tokenizer=tokenizer)

    def _finish(self) -> None:
        step = self.state.global_step
        if step < self.args.max_steps:
            if step > self._keeper.saved_step and self.args.save_strategy != "no":
                self._save_checkpoint(self.model_wrapped, trial=None)
            stopper = self._stop_reason or "a callback"
            log.info("stopped by %s after %d steps; the same command goes on", stopper, step)
            return
        folder = together(
            lambda: self._keeper.save_final(lambda draft: self.save_model(str(draft))), ranks=self.args.world_size
        )
        self._commit(step)
        if self.is_world_process_zero():
            log.info("finished after %d steps: %s", step, folder)
            if self._hub is not None:
                push_folder(folder, self._hub)

    # Batches

    def get_train_dataloader(self) -> Any:
        """One item an optimizer step: this rank's share of the batch."""
        return Steps(self._next_share)

    def get_batch_samples(self, epoch_iterator: Iterator[RankShare], num_batches: int, device: Any) -> Any:
        """The next item; nothing when the run is over or told to stop."""
        shares = list(islice(epoch_iterator, num_batches))
        if not shares:
            self.control.should_training_stop = True
        return shares, None

    def _next_share(self) -> RankShare | None:
        step = self.state.global_step
        if step >= self.args.max_steps:
            return None
        # Before the step: no rank waits inside it for one that has no batch.
        return agreed(lambda: self._shares.of(step), ranks=self.args.world_size)

    # One step

    def training_step(self, model: Any, inputs: RankShare, num_items_in_batch: Any = None) -> Tensor:
        """Every pass over the batch, and all its optimizer steps but the last, which is transformers' own.

        Returns:
            The loss of the whole batch, the same on every rank.
        """
        sums = TokenSums(self.args.device)
        steps = len(inputs.minibatches) * self.args.ppo_epochs
        minibatches = self._passes.prepared(model, inputs, optimizer_steps=steps)
        self._guard.start()
        for i in range(steps):
            self._passes.accumulate(model, minibatches[i % len(minibatches)], sums)
            if i < steps - 1:
                self._inner_optimizer_step(model)
        if self._stop_reason is not None:
            sums.ask_to_stop()
        self._share, self._figures = inputs, sums.gathered(optimizer_steps=max(1, steps))
        return torch.tensor(self._figures.loss, device=self.args.device)

    def _inner_optimizer_step(self, model: Any) -> None:
        grad_norm = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        self._guard.check(super()._get_grad_norm(model, grad_norm), model, self.accelerator)
        self.optimizer.step()
        model.zero_grad()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The norm before clipping. transformers asks for it right before the optimizer step."""
        if self._share is not None and not self._share.minibatches:
            # No pass, no gradient: the optimizer leaves every parameter alone, and DeepSpeed was not asked for a step.
            return 0.0
        norm = float(super()._get_grad_norm(model, grad_norm))
        loss = self._figures.loss if self._figures is not None else 0.0
        self._guard.check(norm, model, self.accelerator, loss=loss)
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """After each optimizer step: ledger, publication, acknowledgement, metrics; then logs and checkpoints."""
        if self._share is not None and self._figures is not None:
            share, self._share = self._share, None
            self._sync_reference(share.batch.step + 1)
            figures = self._figures_of(share, self._figures)
            figures |= {"grad_norm": float(grad_norm), "learning_rate": kwargs.get("learning_rate")}
            self._metrics = together(lambda: self._run.after_step(share.batch, figures), ranks=self.args.world_size)
            self._guard.finish(share.batch.step, report=lambda: self._non_finite_report(share.batch, figures))
            if self._figures.should_stop or (self.args.world_size == 1 and self._stop_reason is not None):
                self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _non_finite_report(self, batch: StepBatch, figures: Mapping[str, Any]) -> Path | None:
        if not self.is_world_process_zero():
            return None
        return non_finite.write_report(Path(self.args.run_dir), batch, figures)

    def _sync_reference(self, step: int) -> None:
        config = self.args
        if config.sync_ref_model and step % config.ref_model_sync_steps == 0 and isinstance(self._reference, OwnCopy):
            self._reference.mix_in(self.model, alpha=config.ref_model_mixup_alpha)

    def _figures_of(self, share: RankShare, figures: TokenFigures) -> dict[str, Any]:
        """What is known of a step, under its names in the metrics. Troubles are counted where there are any."""
        return {
            **batch_metrics(share.batch),
            "tokens/forward": float(share.forward_tokens),
            **figures.as_metrics(),
            **(self._figures_of_batch(share.batch) if self._figures_of_batch and self.is_world_process_zero() else {}),
            **self._shares.counters,
            "step/skipped": float(self._guard.skipped),
            **({} if share.minibatches else {"step/without_gradient": 1.0}),
            **({"checkpoint/failed": float(self._keeper.failed)} if self._keeper.failed else {}),
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Send a step's figures to the sinks of report_to, with our own among them."""
        super().log({**self._metrics, **logs} if "grad_norm" in logs else logs, start_time)

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A whole checkpoint, which the server is told of; or none, and the run goes on."""
        if self._write_checkpoint(model, trial):
            self._commit(self.state.global_step)

    def _write_checkpoint(self, model: Any, trial: Any) -> bool:
        step = self.state.global_step

        def write(folder: Path) -> None:
            super(GRPOTrainer, self)._save_checkpoint(model, trial)
            if self.args.sync_ref_model and isinstance(self._reference, OwnCopy):
                self._reference.save(folder, is_writer=self.args.should_save)

        if not self._keeper.save(step, write):
            return False
        self._keeper.rotate()
        return True

    def _save_uncommitted(self) -> None:
        """What a server that does not answer cannot be told of: a run that goes on tells it."""
        is_new = self.state.global_step > self._keeper.saved_step
        # Other ranks may be at another point.
        if is_new and self.args.world_size == 1 and self.args.save_strategy != "no":
            self._write_checkpoint(self.model_wrapped, trial=None)

    def _commit(self, step: int) -> None:
        together(lambda: self._run.commit(step), ranks=self.args.world_size)
