"""GRPO on leased batches: transformers' Trainer with our stream, passes, loss, publication and confirmations.

From transformers come optimizer, schedule, checkpoints, resuming, DeepSpeed and logging sinks. Its training loop sees one
item an optimizer step (this rank's share of the batch); how that is cut into passes is decided here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, set_seed

from atroposlib.errors import AtroposError, ConfigError, ServerUnreachableError
from atroposlib.wire.columns import Group
from atroposlib.wire.models import RunInfo
from trainer import checkpoints, cli, deepspeed_presets, engine_link, run_setup
from trainer.batch_stream import BatchStream, Client
from trainer.completions_table import Decode
from trainer.config import GRPOConfig
from trainer.errors import TrainerError
from trainer.hub import hub_target, push_folder
from trainer.ledger import JsonLines, TrainerLedger
from trainer.logprobs import PackedPolicy
from trainer.lora import load_adapter
from trainer.metrics import TokenFigures, TokenSums, batch_metrics
from trainer.micro_batch import RankShare, share_of_rank
from trainer.policy_model import PolicySaver, prepare_partitioned
from trainer.publication import Publication, Publisher, is_published
from trainer.reference import AdapterOff, OwnCopy, own_policy, reference_of
from trainer.run_watch import RunWatch
from trainer.step_batch import StepBatch, build_step_batch
from trainer.step_clock import StepClock
from trainer.step_guard import StepGuard
from trainer.step_loss import rule_of
from trainer.step_passes import StepPasses
from trainer.tracking import prepare_tracking
from trainer.weight_sync.sources import WeightSource, full_numel, has_adapter, is_partitioned, weight_source
from trainer.weight_sync.transports.base import NamedWeights

log = logging.getLogger(__name__)

Optimizers = tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None]


class GRPOTrainer(Trainer):  # type: ignore[misc]
    """Trains a policy with GRPO on the batches of a rollout server.

    Batches come from environments, and they evaluate: this class has no data loader and no evaluation loop of its own.
    Override on_epoch_begin, on_step_end and on_evaluate as those of a transformers.TrainerCallback; what they raise ends
    the run.

    Args:
        config, args: every option, under either name.
        model: a causal language model in memory, or its name; None for config.model_name_or_path.
        ref_model: the same for the reference policy, instead of config.ref_model_name_or_path.
        tokenizer, processing_class: saved with the model, under either name; the model folder's own if absent.
        compute_metrics: further figures of each step's batch, for the metrics; called on rank 0.
        callbacks: of transformers.
        optimizers: an optimizer and a schedule, each instead of what config names; None for that.
        connect: makes the client of the rollout server, instead of a RolloutClient from the config.
        publisher: brings weights to the engines, instead of a WeightPublisher for config.inference_servers.
    Raises:
        ConfigError: two names of one thing were given different values, or the model cannot be trained here.
    """

    args: GRPOConfig
    model: PackedPolicy

    def __init__(
        self,
        config: GRPOConfig | None = None,
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
    ) -> None:
        config = run_setup.resolve_config(config, args, model)
        if tokenizer is not None and processing_class is not None and tokenizer is not processing_class:
            raise ConfigError("tokenizer and processing_class are two names of one thing: give one of them")
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
            callbacks=[_Hooks(self), *callbacks],
            optimizers=optimizers,
        )
        self.remove_callback(PrinterCallback)
        self._connect = connect or run_setup.rollout_client(config)
        self._publisher = publisher
        self._saver = self._policy_saver(is_named=model is None or isinstance(model, str))
        self._run_dir = Path(config.run_dir)
        self._rule = rule_of(config)
        self._figures_of_batch = compute_metrics
        self._stop_reason: str | None = None
        self._saved_step = 0
        self._clock = StepClock()
        self._guard = StepGuard(is_deepspeed=self.is_deepspeed_enabled)
        self._share: RankShare | None = None
        self._figures: TokenFigures | None = None
        self._metrics: dict[str, Any] = {}

    def _policy_saver(self, *, is_named: bool) -> PolicySaver:
        # A model that came in memory has no folder whose tokenizer belongs to it.
        is_wanted = is_named and self.processing_class is None
        name = (self.args.tokenizer_name_or_path or self.args.model_name_or_path) if is_wanted else None
        return PolicySaver(name, trust_remote_code=self.args.trust_remote_code)

    # Override points

    def on_epoch_begin(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called when training begins: batches that come from a server know one epoch."""

    def on_step_end(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after each optimizer step of the run, before its batch is acknowledged."""

    def on_evaluate(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after an evaluation; kwargs["metrics"] has its figures."""

    # The run, from start to end

    def train(self, *_: Any, **__: Any) -> Any:
        """Train to max_steps, from the newest whole checkpoint if there is one, and save the result.

        Raises:
            AtroposError: the run cannot go on; the text says why.
        """
        config = self.args
        found = checkpoints.last_complete(config.checkpoints_dir)
        self._resumed_from = found[0] if found else None
        self._saved_step = found[1] if found else 0
        self._stream = BatchStream(
            self._connect,
            last_step=config.max_steps,
            prefetch=config.prefetch,
            deadline_s=config.batch_deadline_s,
            should_stop=lambda: self._stop_reason is not None,
        )
        self._publication: Publication | None = None
        self._writers: tuple[JsonLines, TrainerLedger, RunWatch] | None = None
        try:
            if self.is_world_process_zero():
                # First: it reads the lines of the steps that are not taken again.
                watch = RunWatch(config, decode=self._decode(), start_step=self._saved_step)
                self._writers = (JsonLines(self._run_dir / "metrics.jsonl"), TrainerLedger(self._run_dir), watch)
                cli.keep(config)
            output = super().train(resume_from_checkpoint=str(self._resumed_from) if self._resumed_from else None)
            self._finish()
            return output
        except ServerUnreachableError as error:
            if self._stop_reason is None:
                raise
            log.warning("stopped by %s: %s", self._stop_reason, error)
            return None
        finally:
            self._close()

    def _decode(self) -> Decode | None:
        tokenizer = self.processing_class if self.processing_class is not None else self._saver.tokenizer
        return getattr(tokenizer, "decode", None)

    def request_stop(self, reason: str) -> None:
        """End after the step under way, with a checkpoint. Safe to call from a signal handler."""
        self._stop_reason = reason

    def begin(self) -> None:
        """Open the run and bring the engines to our version. Called on every rank when weights and step are loaded."""
        if is_partitioned(self.model):
            prepare_partitioned(self.model, self.args.device)
        self._engine_weights: WeightSource = weight_source(
            self.model,
            is_rank_0=self.is_world_process_zero(),
            dtype=run_setup.ENGINE_DTYPE,
            adapter_only=self.args.sends_adapter,
        )
        self._reference = self._make_reference()
        self._passes = StepPasses(
            self.accelerator,
            self._rule,
            device=self.args.device,
            ranks=self.args.world_size,
            is_deepspeed=self.is_deepspeed_enabled,
            reference=self._reference,
        )
        info = self._open_run()
        step = self.state.global_step
        if info.committed_step > step:
            raise TrainerError(
                f"run {info.run_name!r} has a checkpoint after {info.committed_step} steps, and its older batches are "
                f"gone, but the newest whole checkpoint in {self.args.output_dir} is after {step}; give the output_dir "
                "that holds it, or another run_name to start anew"
            )
        self._stream.join(info.session)
        self._engine_version = info.policy_version
        weights = self._gather(step)
        if self.is_world_process_zero():
            self._start_publication(step, weights)
        log.info("run %s: step %d of %d", info.run_name, step, self.args.max_steps)

    def _make_reference(self) -> AdapterOff | OwnCopy | None:
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        reference = reference_of(
            self.args, self.model, self._own_reference, deepspeed_config=plugin and plugin.deepspeed_config
        )
        if self._resumed_from is not None and self.args.sync_ref_model and isinstance(reference, OwnCopy):
            reference.load(self._resumed_from)
        return reference

    def _start_publication(self, step: int, weights: NamedWeights) -> None:
        self._publication = Publication(
            self._publisher or self._engine_publisher(),
            announce=self._stream.publish_policy,
            engine_version=self._engine_version,
        )
        self._publication.start(step, weights)

    def _engine_publisher(self) -> Publisher | None:
        tokenizer = self._saver.tokenizer or self.processing_class
        return engine_link.publisher_for(self.args, self.model, dtype=run_setup.ENGINE_DTYPE, tokenizer=tokenizer)

    def _gather(self, version: int) -> NamedWeights:
        """The weights for a publication, on rank 0. Every rank calls this, before rank 0 sends anything."""
        publishes = self._publisher is not None or engine_link.has_engines(self.args)
        if not publishes or not is_published(version, engine_version=self._engine_version):
            return ()
        return self._engine_weights.gather() or ()

    def committed(self) -> None:
        """Mark the checkpoint that was just saved as whole and tell the server. Called on every rank."""
        self.accelerator.wait_for_everyone()
        step = self.state.global_step
        self._saved_step = step
        folder = self.args.checkpoints_dir / f"checkpoint-{step}"
        if self.args.sync_ref_model and isinstance(self._reference, OwnCopy):
            self._reference.save(folder, is_writer=self.args.should_save)
        if self.is_world_process_zero():
            checkpoints.mark_complete(folder, step=step, run_name=str(self.args.run_name))
            self._stream.commit(step)

    def _finish(self) -> None:
        step = self.state.global_step
        if step < self.args.max_steps:
            if step > self._saved_step and self.args.save_strategy != "no":
                self._save_checkpoint(self.model_wrapped, trial=None)
                self.committed()
            stopper = self._stop_reason or "a callback"
            log.info("stopped by %s after %d steps; the same command goes on", stopper, step)
            return
        self.save_model(str(self._run_dir / "final"))
        if self.is_world_process_zero():
            self._stream.commit(step)
            log.info("finished after %d steps: %s", step, self._run_dir / "final")
            if self._hub is not None:
                push_folder(self._run_dir / "final", self._hub)

    def _open_run(self) -> RunInfo:
        """Open the run on rank 0; every rank learns the answer, or the reason why there is none."""
        answer: list[RunInfo | AtroposError | None] = [None]
        if self.is_world_process_zero():
            try:
                answer = [self._stream.open_run(run_setup.run_request(self.args, start_step=self.state.global_step))]
            except AtroposError as error:
                answer = [error]
        if self.args.world_size > 1:
            torch.distributed.broadcast_object_list(answer, src=0)
        info = answer[0]
        if not isinstance(info, RunInfo):
            raise info if info is not None else TrainerError("rank 0 sent no run")
        return info

    def _close(self) -> None:
        # One that fails to close keeps no other open.
        with ExitStack() as stack:
            for writer in self._writers or ():
                stack.callback(writer.close)
            stack.callback(self._stream.close)
            if self._publication is not None:
                stack.callback(self._publication.close)

    # Batches

    def get_train_dataloader(self) -> Any:
        """One item an optimizer step: this rank's share of the batch."""
        return _Steps(self._next_share)

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
        self._clock.start("wait")
        groups = self._stream.get(step, on_idle=self._publication.while_idle if self._publication else _nothing)
        if groups is None:
            return None
        self._clock.start("train")
        return self._share_of(step, groups)

    def _share_of(self, step: int, groups: Sequence[Group]) -> RankShare:
        config = self.args
        batch = build_step_batch(
            step,
            groups,
            advantage_scale=config.advantage_scale,
            overlong=config.overlong,
            temperature=config.temperature,
            unbias_log_probabilities=config.unbias_log_probabilities,
            max_completion_length=config.max_completion_length,
            overlong_cache=config.overlong_cache,
        )
        batch.check_staleness(config.max_staleness)
        return share_of_rank(
            batch,
            rank=config.process_index,
            ranks=config.world_size,
            # One sequence a pass: none fits beside another.
            max_tokens=config.max_tokens_per_micro_batch if config.pack else 1,
            hidden_size=self.model.config.get_text_config().hidden_size,
            aggregation=config.loss_aggregation,
            max_completion_length=config.max_completion_length,
            shares_prompts=config.pack and self.model.shares_prompts,
            num_minibatches=config.num_minibatches,
            seed=config.seed,
            skips_zero_advantages=self._rule.skips_zero_advantages(batch),
            has_teacher=self._rule.has_teacher(batch),
        )

    def floating_point_ops(self, inputs: RankShare) -> int:
        """Of this rank's passes, without attention and recomputation: 6 for each parameter and token."""
        tokens = sum(micro_batch.input_ids_1T.numel() for micro_batch in inputs.micro_batches)
        return 6 * tokens * sum(map(full_numel, self.model.parameters()))

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
        self._share, self._figures = inputs, sums.gathered(optimizer_steps=steps)
        return torch.tensor(self._figures.loss, device=self.args.device)

    def _inner_optimizer_step(self, model: Any) -> None:
        grad_norm = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        self._guard.check(super()._get_grad_norm(model, grad_norm), model, self.accelerator)
        self.optimizer.step()
        model.zero_grad()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The norm before clipping. transformers asks for it right before the optimizer step."""
        norm = float(super()._get_grad_norm(model, grad_norm))
        loss = self._figures.loss if self._figures is not None else 0.0
        self._guard.check(norm, model, self.accelerator, loss=loss)
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """After each optimizer step: ledger, publication, acknowledgement, metrics; then logs and checkpoints."""
        if self._share is not None and self._figures is not None:
            share, self._share = self._share, None
            self._sync_reference(share.batch.step + 1)
            self._after_step(share, self._figures, float(grad_norm), kwargs.get("learning_rate"))
            self._guard.finish(share.batch.step)
            if self._figures.should_stop or (self.args.world_size == 1 and self._stop_reason is not None):
                self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _sync_reference(self, step: int) -> None:
        config = self.args
        if config.sync_ref_model and step % config.ref_model_sync_steps == 0 and isinstance(self._reference, OwnCopy):
            self._reference.mix_in(self.model, alpha=config.ref_model_mixup_alpha)

    def _after_step(
        self, share: RankShare, figures: TokenFigures, grad_norm: float, learning_rate: float | None
    ) -> None:
        batch = share.batch
        self._clock.start("sync")
        weights = self._gather(batch.step + 1)
        if self._publication is None or self._writers is None:
            return
        metrics_file, ledger, watch = self._writers
        ledger.record(
            batch.step,
            groups=batch.group_ids,
            sequences=len(batch.sequences),
            max_staleness=max(batch.staleness(), default=None),
        )
        published = self._publication.after_step(batch.step + 1, weights)
        self._stream.ack(batch.step, policy_version=published)
        self._metrics = {
            **batch_metrics(batch),
            "tokens/forward": float(share.forward_tokens),
            **figures.as_metrics(),
            **(self._figures_of_batch(batch) if self._figures_of_batch else {}),
            "step/skipped": float(self._guard.skipped),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            **self._clock.finish(),
        }
        self._metrics |= watch.after_step(batch.step, self._metrics, batch)
        metrics_file.append({"step": batch.step, "time": time.time(), "policy_version": published, **self._metrics})
        log.info(
            "step %d: reward %.3f, loss %.4f, grad_norm %.3f, staleness %d, kl %.4f, %d tokens, %.1f s (waited %.1f s)",
            batch.step,
            self._metrics["reward/mean"],
            figures.loss,
            grad_norm,
            self._metrics["staleness/max"],
            figures.mismatch_kl_k3,
            batch.trained_tokens,
            self._metrics["time/step_s"],
            self._metrics["time/wait_s"],
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Send a step's figures to the sinks of report_to, with our own among them."""
        super().log({**self._metrics, **logs} if "grad_norm" in logs else logs, start_time)

    # Checkpoints: PackedPolicy is a wrapper, what is written is the model inside

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a Hugging Face folder with whole weights, or a peft folder. Called on every rank.

        Not what transformers does: DeepSpeed's state dict has tied weights twice, and the wrapper's names.
        """
        folder = Path(output_dir) if output_dir else self.args.checkpoints_dir
        source = weight_source(self.model, is_rank_0=self.args.should_save, adapter_only=has_adapter(self.model.lm))
        weights = source.gather()
        if weights is not None:
            self._saver.save(self.model, folder, weights)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def init_hf_repo(self, token: str | None = None) -> None:
        """Nothing at start: the final model is uploaded once it is on disk, see hub."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: checkpoints stay here."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if has_adapter(self.model.lm):
            load_adapter(self.model.lm, Path(resume_from_checkpoint))
            return
        wrapper, self.model = self.model, self.model.lm
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        finally:
            self.model = wrapper

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A tied output layer is not in the file because the embedding is.
        own = {name for name, _ in self.model.named_parameters()}
        missing = [name for name in load_result.missing_keys if name in own]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))


class _Hooks(TrainerCallback):  # type: ignore[misc]
    """The moments of transformers' loop that the trainer needs."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Weights, optimizer and step are loaded."""
        self._trainer.begin()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """An override point of the trainer's."""
        self._trainer.on_epoch_begin(*args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """An override point of the trainer's."""
        self._trainer.on_step_end(*args, **kwargs)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """An override point of the trainer's."""
        self._trainer.on_evaluate(*args, **kwargs)

    def on_save(self, *_: Any, **__: Any) -> None:
        """A checkpoint was written."""
        self._trainer.committed()


class _Steps:
    """An endless loader without a length, which ends when there is no next share."""

    def __init__(self, next_share: Callable[[], RankShare | None]) -> None:
        self._next_share = next_share

    def __iter__(self) -> Iterator[RankShare]:
        while (share := self._next_share()) is not None:
            yield share


def _nothing() -> None:
    """No engines to look after on this rank."""
