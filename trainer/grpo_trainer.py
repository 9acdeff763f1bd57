"""GRPO on leased batches: transformers' Trainer with our stream, passes, loss, publication and confirmations.

From transformers come optimizer, schedule, checkpoints, resuming, DeepSpeed and logging sinks. Its training loop sees one
item an optimizer step (this rank's share of the batch); how that is cut into passes is decided here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from atroposlib.client import RolloutClient
from atroposlib.errors import AtroposError, ServerUnreachableError
from atroposlib.wire.models import RunInfo, RunRequest
from trainer import checkpoints, deepspeed_presets
from trainer.batch_stream import BatchStream, Client
from trainer.config import GRPOConfig
from trainer.errors import TrainerError
from trainer.ledger import JsonLines, TrainerLedger
from trainer.logprobs import PackedPolicy
from trainer.lora import adapter_config, load_adapter, options_of
from trainer.losses.corrections import CorrectionRule, correction_weights
from trainer.losses.objectives import Objective, token_losses
from trainer.metrics import TokenFigures, TokenSums, batch_metrics
from trainer.micro_batch import MicroBatch, RankShare, share_of_rank
from trainer.policy_model import PolicySaver, build_policy, load_policy, prepare_partitioned
from trainer.publication import Publication, Publisher, is_published
from trainer.step_batch import build_step_batch
from trainer.step_clock import StepClock
from trainer.tracking import prepare_tracking
from trainer.weight_sync.sources import WeightSource, full_numel, has_adapter, is_partitioned, weight_source
from trainer.weight_sync.transports.base import NamedWeights

log = logging.getLogger(__name__)

ENGINE_DTYPE = torch.bfloat16
"""What weights are converted to on their way into the engines."""


class GRPOTrainer(Trainer):  # type: ignore[misc]
    """Trains a policy with GRPO on the batches of a rollout server.

    Args:
        config: every option.
        lm: a causal language model that is already in memory, instead of config.model_name_or_path.
        connect: makes the client of the rollout server, instead of a RolloutClient from the config.
        publisher: brings weights to the engines, instead of a WeightPublisher for config.inference_servers.
        optimizer: instead of the one that config names.
    """

    args: GRPOConfig
    model: PackedPolicy

    def __init__(
        self,
        config: GRPOConfig,
        *,
        lm: Any = None,
        connect: Callable[[], Client] | None = None,
        publisher: Publisher | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        prepare_tracking(config)
        if config.deepspeed:
            deepspeed_presets.meet_ranks(on_cpu=config.use_cpu, timeout_s=config.ddp_timeout)
        # A fresh adapter is random.
        set_seed(config.seed)
        policy = (
            load_policy(
                config.model_name_or_path,
                torch_dtype=config.torch_dtype,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
                logprob_chunk_size=config.logprob_chunk_size,
                lora=options_of(config),
            )
            if lm is None
            else build_policy(lm, logprob_chunk_size=config.logprob_chunk_size, lora=options_of(config))
        )
        super().__init__(model=policy, args=config, callbacks=[_Hooks(self)], optimizers=(optimizer, None))
        self.remove_callback(PrinterCallback)
        self._connect = connect or self._rollout_client
        self._publisher = publisher
        # A model that came in memory has no folder whose tokenizer belongs to it.
        tokenizer_name = config.model_name_or_path if lm is None else None
        self._saver = PolicySaver(tokenizer_name, trust_remote_code=config.trust_remote_code)
        self._run_dir = Path(config.run_dir)
        self._stop_reason: str | None = None
        self._saved_step = 0
        self._clock = StepClock()
        self._share: RankShare | None = None
        self._figures: TokenFigures | None = None
        self._metrics: dict[str, Any] = {}

    # The run, from start to end

    def train(self, *_: Any, **__: Any) -> Any:
        """Train to max_steps, from the newest whole checkpoint if there is one, and save the result.

        Raises:
            AtroposError: the run cannot go on; the text says why.
        """
        config = self.args
        found = checkpoints.last_complete(config.checkpoints_dir)
        self._saved_step = found[1] if found else 0
        self._stream = BatchStream(
            self._connect,
            last_step=config.max_steps,
            prefetch=config.prefetch,
            deadline_s=config.batch_deadline_s,
            should_stop=lambda: self._stop_reason is not None,
        )
        self._publication: Publication | None = None
        self._writers: tuple[JsonLines, TrainerLedger] | None = None
        try:
            if self.is_world_process_zero():
                self._writers = (JsonLines(self._run_dir / "metrics.jsonl"), TrainerLedger(self._run_dir))
                self._save_config()
            output = super().train(resume_from_checkpoint=str(found[0]) if found else None)
            self._finish()
            return output
        except ServerUnreachableError as error:
            if self._stop_reason is None:
                raise
            log.warning("stopped by %s: %s", self._stop_reason, error)
            return None
        finally:
            self._close()

    def request_stop(self, reason: str) -> None:
        """End after the step under way, with a checkpoint. Safe to call from a signal handler."""
        self._stop_reason = reason

    def begin(self) -> None:
        """Open the run and bring the engines to our version. Called on every rank when weights and step are loaded."""
        if is_partitioned(self.model):
            prepare_partitioned(self.model, self.args.device)
        self._engine_weights: WeightSource = weight_source(
            self.model, is_rank_0=self.is_world_process_zero(), dtype=ENGINE_DTYPE, adapter_only=self.args.sends_adapter
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

    def _start_publication(self, step: int, weights: NamedWeights) -> None:
        self._publication = Publication(
            self._publisher or self._weight_publisher(),
            announce=self._stream.publish_policy,
            engine_version=self._engine_version,
        )
        self._publication.start(step, weights)

    def _gather(self, version: int) -> NamedWeights:
        """The weights for a publication, on rank 0. Every rank calls this, before rank 0 sends anything."""
        has_engines = self._publisher is not None or bool(self.args.inference_servers)
        if not has_engines or not is_published(version, engine_version=self._engine_version):
            return ()
        return self._engine_weights.gather() or ()

    def committed(self) -> None:
        """Mark the checkpoint that was just saved as whole and tell the server. Called on every rank."""
        self.accelerator.wait_for_everyone()
        step = self.state.global_step
        self._saved_step = step
        if self.is_world_process_zero():
            folder = self.args.checkpoints_dir / f"checkpoint-{step}"
            checkpoints.mark_complete(folder, step=step, run_name=str(self.args.run_name))
            self._stream.commit(step)

    def _finish(self) -> None:
        step = self.state.global_step
        if step < self.args.max_steps:
            if step > self._saved_step and self.args.save_strategy != "no":
                self._save_checkpoint(self.model_wrapped, trial=None)
                self.committed()
            log.info("stopped by %s after %d steps; the same command goes on", self._stop_reason, step)
            return
        self.save_model(str(self._run_dir / "final"))
        if self.is_world_process_zero():
            self._stream.commit(step)
            log.info("finished after %d steps: %s", step, self._run_dir / "final")

    def _open_run(self) -> RunInfo:
        """Open the run on rank 0; every rank learns the answer, or the reason why there is none."""
        answer: list[RunInfo | AtroposError | None] = [None]
        if self.is_world_process_zero():
            try:
                answer = [self._stream.open_run(self._run_request())]
            except AtroposError as error:
                answer = [error]
        if self.args.world_size > 1:
            torch.distributed.broadcast_object_list(answer, src=0)
        info = answer[0]
        if not isinstance(info, RunInfo):
            raise info if info is not None else TrainerError("rank 0 sent no run")
        return info

    def _run_request(self) -> RunRequest:
        config = self.args
        return RunRequest(
            run_name=str(config.run_name),
            batch_size=config.batch_size,
            max_staleness=config.max_staleness,
            late_policy=config.late_policy,
            max_token_len=config.max_token_len,
            num_steps=config.max_steps,
            start_step=self.state.global_step,
            group_size=config.group_size,
            model_name=config.model_name_or_path,
            checkpoint_dir=str(config.output_dir),
            save_checkpoint_interval=int(config.save_steps),
            wandb_project=config.project if config.reports_to("wandb") else None,
        )

    def _rollout_client(self) -> Client:
        config = self.args
        # A rollout server that restarts is waited for as long as a batch is.
        return RolloutClient(
            config.rollout_server_url, deadline_s=config.batch_deadline_s, token=config.rollout_server_token
        )

    def _weight_publisher(self) -> Publisher | None:
        if not self.args.inference_servers:
            return None
        from trainer.weight_sync.connect import connect

        config = self.args
        return connect(
            config.inference_servers,
            config.weight_sync,
            dtype=ENGINE_DTYPE,
            folder=self._run_dir / "weights",
            model_folder=config.model_name_or_path,
            has_cuda=config.device.type == "cuda",
            adapter=adapter_config(self.model.lm) if config.sends_adapter else None,
        )

    def _save_config(self) -> None:
        from trainer.cli import describe

        self._run_dir.mkdir(parents=True, exist_ok=True)
        (self._run_dir / "trainer.yaml").write_text(describe(self.args, {}) + "\n", encoding="utf-8")

    def _close(self) -> None:
        if self._publication is not None:
            self._publication.close()
        self._stream.close()
        for writer in self._writers or ():
            writer.close()

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
        config = self.args
        batch = build_step_batch(
            step,
            groups,
            advantage_scale=config.advantage_scale,
            overlong=config.overlong,
            temperature=config.temperature,
        )
        batch.check_staleness(config.max_staleness)
        return share_of_rank(
            batch,
            rank=config.process_index,
            ranks=config.world_size,
            max_tokens=config.max_tokens_per_micro_batch,
            hidden_size=self.model.config.get_text_config().hidden_size,
            aggregation=config.loss_aggregation,
            max_completion_length=config.max_completion_length,
            shares_prompts=self.model.shares_prompts,
        )

    def floating_point_ops(self, inputs: RankShare) -> int:
        """Of this rank's passes, without attention and recomputation: 6 for each parameter and token."""
        tokens = sum(micro_batch.input_ids_1T.numel() for micro_batch in inputs.micro_batches)
        return 6 * tokens * sum(map(full_numel, self.model.parameters()))

    # One step

    def training_step(self, model: Any, inputs: RankShare, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over the share's micro batches; gradients are synchronised once, with the last.

        Returns:
            The loss of the whole batch, the same on every rank.
        """
        model.train()
        sums = TokenSums(self.args.device)
        last = len(inputs.micro_batches) - 1
        for i, micro_batch in enumerate(inputs.micro_batches):
            self.accelerator.gradient_state._set_sync_gradients(i == last)
            with self._gradient_sync(model, is_last=i == last):
                loss = self._micro_loss(model, micro_batch.to(self.args.device), sums)
                # Ranks average their gradients; our loss is already a share of the whole batch's.
                self._backward(loss * self.args.world_size)
        if self._stop_reason is not None:
            sums.ask_to_stop()
        self._share, self._figures = inputs, sums.gathered()
        return torch.tensor(self._figures.loss, device=self.args.device)

    def _gradient_sync(self, model: Any, *, is_last: bool) -> AbstractContextManager[Any]:
        # DeepSpeed is told by the accumulation boundary, which accelerate sets from gradient_state.
        if is_last or self.is_deepspeed_enabled:
            return nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def _backward(self, loss: Tensor) -> None:
        # scale_wrt_gas=False: DeepSpeed would divide by its own idea of accumulation.
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))

    def _micro_loss(self, model: Any, micro: MicroBatch, sums: TokenSums) -> Tensor:
        config = self.args
        logprobs_M, entropies_M = model(
            micro.input_ids_1T,
            micro.position_ids_1T,
            micro.segments_1T,
            micro.prefixes_1T,
            micro.target_positions_M,
            micro.target_ids_M,
            micro.temperatures_M,
        )
        # One pass over the batch a step: the policy at its start is the policy now.
        proximal_M = logprobs_M.detach()
        rule = CorrectionRule(config.correction, is_cap=config.is_cap)
        weights_M = correction_weights(proximal_M, micro.inference_logprobs_M, micro.sequence_M, rule)
        weights_M = torch.where(micro.has_inference_logprobs_M, weights_M, 1.0)
        objective = Objective(config.loss_type, config.epsilon_low, config.epsilon_high, config.dual_clip_c)
        losses_M = token_losses(
            logprobs_M, proximal_M, micro.advantages_M, weights_M, micro.sequence_M, objective
        ).losses_M
        loss = (losses_M * micro.loss_weights_M).sum()
        sums.add(
            loss=loss,
            logprobs_M=proximal_M,
            inference_logprobs_M=micro.inference_logprobs_M,
            has_inference_logprobs_M=micro.has_inference_logprobs_M,
            entropies_M=entropies_M,
            weights_M=weights_M,
            loss_weights_M=micro.loss_weights_M,
            is_cap=config.is_cap,
        )
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """After each optimizer step: ledger, publication, acknowledgement, metrics; then logs and checkpoints."""
        if self._share is not None and self._figures is not None:
            share, self._share = self._share, None
            self._after_step(share, self._figures, float(grad_norm), kwargs.get("learning_rate"))
            if self._figures.should_stop or (self.args.world_size == 1 and self._stop_reason is not None):
                self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _after_step(
        self, share: RankShare, figures: TokenFigures, grad_norm: float, learning_rate: float | None
    ) -> None:
        batch = share.batch
        self._clock.start("sync")
        weights = self._gather(batch.step + 1)
        if self._publication is None or self._writers is None:
            return
        metrics_file, ledger = self._writers
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
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            **self._clock.finish(),
        }
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
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

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
