"""A Trainer of transformers whose model is a PackedPolicy: a wrapper, and what is saved and loaded is the model inside."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from transformers import Trainer

from trainer.batches.micro_batch import RankShare
from trainer.checkpoints import folders as checkpoints
from trainer.checkpoints.deepspeed_saving import meeting_in_spite_of_failures
from trainer.checkpoints.keeper import CheckpointKeeper
from trainer.policy.loading import PolicySaver
from trainer.policy.logprobs import PackedPolicy
from trainer.policy.lora import load_adapter
from trainer.weight_sync.sources import full_numel, has_adapter, weight_source
from trainer.weight_sync.transports.base import NamedWeights


class PackedTrainer(Trainer):  # type: ignore[misc]
    """Saves Hugging Face folders and goes on from them. Uploads nothing of itself."""

    model: PackedPolicy
    _saver: PolicySaver
    _keeper: CheckpointKeeper

    def floating_point_ops(self, inputs: RankShare) -> int:
        """Of this rank's passes, without attention and recomputation: 6 for each parameter and token."""
        tokens = sum(micro_batch.input_ids_1T.numel() for micro_batch in inputs.micro_batches)
        return 6 * tokens * sum(map(full_numel, self.model.parameters()))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a Hugging Face folder with whole weights, or a peft folder. Called on every rank.

        Not what transformers does: DeepSpeed's state dict has tied weights twice, and the wrapper's names.
        """
        folder = Path(output_dir) if output_dir else self.args.checkpoints_dir
        source = weight_source(self.model, is_rank_0=self.args.should_save, adapter_only=has_adapter(self.model.lm))
        weights = source.gather()
        if weights is None:
            return
        if _internal_call:
            self._keeper.part(lambda: self._write_model(folder, weights))
        else:
            self._write_model(folder, weights)

    def _write_model(self, folder: Path, weights: NamedWeights) -> None:
        self._saver.save(self.model, folder, weights)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        checkpoints.follow_umask(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Of one mind: in DeepSpeed's part of the writing the ranks wait for each other.
        if not self._keeper.is_well():
            return
        with self._deepspeed_that_meets():
            self._keeper.part(lambda: super(PackedTrainer, self)._save_optimizer_and_scheduler(output_dir))

    def _deepspeed_that_meets(self) -> AbstractContextManager[None]:
        if not self.is_deepspeed_enabled:
            return nullcontext()
        return meeting_in_spite_of_failures(self.model_wrapped, self._keeper.part)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # transformers would remove older checkpoints before this one is known to be whole: the keeper rotates.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit

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
