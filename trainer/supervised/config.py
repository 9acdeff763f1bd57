"""Every option of the trainers that read a data set: SFTConfig and GKDConfig."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from atroposlib.data.config import DataConfig
from trainer.config.shared import SharedOptions, deepspeed_config
from trainer.supervised import config_checks

log = logging.getLogger(__name__)

_FULL_SFT_LEARNING_RATE = 1e-5
_LORA_SFT_LEARNING_RATE = 2e-4


@dataclass(kw_only=True)
class DatasetTrainingConfig(SharedOptions):
    """What every trainer on a data set needs: model, rows, batches, evaluation, checkpoints."""

    tokenizer_name_or_path: str | None = None
    """The tokenizer of the rows, saved beside the weights; the model's own if absent."""
    data: DataConfig = field(default_factory=DataConfig)
    """The rows, and which of them are held out."""
    max_seq_length: int = 4096
    """Tokens of an example, at most. Longer ones are cut at the end, and counted; where the prompt alone is as long, the example
    is left out, and counted."""
    completion_only_training: bool = True
    """Learn what the assistant says. False: every token, the prompts too."""
    train_on_last_turn_only: bool = False
    """Of several turns of the assistant, learn the last one alone."""
    custom_start_of_response: str | None = None
    """Text that begins the assistant's turn, for chat templates that do not say which tokens are the assistant's; found by
    comparing renderings if absent."""
    packing: bool = True
    """Lay examples end to end in one pass; none sees another, so that packing changes no gradient. False: one example a pass."""
    max_tokens_per_micro_batch: int | None = None
    """Tokens of one forward and backward pass; max_seq_length if absent."""

    num_train_epochs: float = 1.0
    """Times that every example is gone through."""
    max_steps: int = -1
    """Optimizer steps; wins over num_train_epochs where it is over 0."""

    do_eval: bool | None = None
    """false: no evaluation. true: also where eval_steps says nothing, then after each epoch."""
    eval_strategy: Literal["auto", "no", "steps", "epoch"] = "auto"
    """auto: steps where eval_steps is over 0, else none."""
    eval_steps: int = 0
    """Optimizer steps between evaluations on the rows held out; 0 for none."""
    load_best_model_at_end: bool | None = None
    """Keep the best checkpoint, not the last, as the final model; true where there is a checkpoint at each evaluation, if
    absent."""
    metric_for_best_model: str | None = "eval_loss"
    """Figure of the evaluation that decides which checkpoint is best."""
    greater_is_better: bool | None = None
    """Whether more of it is better; no for losses, perplexity and token counts, if absent."""

    learning_rate: float | None = None
    """Peak; 1e-5 for all weights and 2e-4 for LoRA, if absent."""
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    """Below 1: share of all steps. Also warmup_ratio."""
    save_strategy: str = "steps"
    """steps, epoch or no."""
    disable_tqdm: bool | None = None
    """No progress bar; there is one on a terminal if absent."""

    def __post_init__(self) -> None:
        self._resolve_names()
        self._resolve_batch(group_size=None)
        self._resolve_evaluation()
        if self.deepspeed:
            self.deepspeed = deepspeed_config(self.deepspeed, self.max_grad_norm)
        self.check()
        self._leave_data_to_us()
        self.logging_nan_inf_filter = False
        self._choose_device()
        super().__post_init__()
        for doubt in config_checks.doubts(self):
            log.warning("%s", doubt)

    def check(self) -> None:
        """Everything that the options say about each other.

        Raises:
            ConfigError: the first problem.
        """
        config_checks.check(self)

    @property
    def pass_tokens(self) -> int:
        """Tokens of one pass, at most, longer examples aside."""
        if not self.packing:
            return 1
        return self.max_tokens_per_micro_batch or self.max_seq_length

    @property
    def evaluates(self) -> bool:
        """Whether rows are held out and measured."""
        return str(getattr(self.eval_strategy, "value", self.eval_strategy)) != "no"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for the sinks of report_to."""
        return {**super().to_dict(), "data": self.data.model_dump(mode="json", exclude={"db_url"})}

    def is_given(self, name: str) -> bool:
        """Whether an option was set, perhaps to its default."""
        return name in self._given

    def usual_learning_rate(self) -> float:
        """What learning_rate is where it is not given."""
        return _LORA_SFT_LEARNING_RATE if self.use_peft else _FULL_SFT_LEARNING_RATE

    def _resolve_names(self) -> None:
        """Options that stand for others, or follow from them."""
        self._resolve_model_init()
        self._resolve_sinks()
        self._resolve_places()
        if self.learning_rate is None:
            self.learning_rate = self.usual_learning_rate()
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()

    def _resolve_evaluation(self) -> None:
        if self.eval_strategy == "auto":
            self.eval_strategy = "steps" if self.eval_steps else "epoch" if self.do_eval else "no"
        if self.do_eval is False:
            self.eval_strategy = "no"
        self.do_eval = self.evaluates
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = config_checks.saves_where_it_evaluates(self)
        if self.greater_is_better is None:
            self.greater_is_better = not config_checks.is_better_when_small(self.metric_for_best_model or "")


@dataclass(kw_only=True)
class SFTConfig(DatasetTrainingConfig):
    """Options of supervised fine-tuning; those it inherits are those of transformers.TrainingArguments, less REFUSED."""

    run_dir: str = "runs/sft"
    """Metrics, checkpoints and the final model go here."""


@dataclass(kw_only=True)
class GKDConfig(DatasetTrainingConfig):
    """Options of generalised knowledge distillation (Agarwal et al. 2024, arXiv:2306.13649), beside those of SFT.

    beta is the mixture of the divergence here; in GRPO it is the weight of another divergence.
    """

    run_dir: str = "runs/gkd"
    """Metrics, checkpoints and the final model go here."""
    teacher_model_name_or_path: str = ""
    """Folder or Hub id of the teacher, which is whole on every rank and never trained."""
    teacher_model_init_kwargs: dict[str, Any] | None = None
    """Keyword arguments of from_pretrained for the teacher, e.g. {torch_dtype: bfloat16}; torch_dtype as the student if absent."""
    teacher_tokenizer_name_or_path: str | None = None
    """The teacher's own if absent."""
    align_teacher_template: Literal["auto"] | bool = "auto"
    """false: the teacher scores the student's token ids, which needs one tokenizer. true: each has its own tokenizer and chat
    template, and they are compared over the shortest spans of characters that both have. auto: true where they differ."""

    beta: float = 0.5
    """Divergence over the vocabulary: 0 is KL(teacher || student), which covers all that the teacher would say; 1 is
    KL(student || teacher), which seeks the likeliest; between them M = beta teacher + (1 - beta) student and
    beta KL(teacher || M) + (1 - beta) KL(student || M)."""
    jsd_rescale: bool = False
    """Divide by 4 beta (1 - beta), so that the divergence does not vanish towards beta 0 and 1."""
    kd_temperature: float = 1.0
    """Logits of both are divided by this in the loss."""
    lmbda: float = 1.0
    """Chance of a step to learn from completions that the student samples, instead of those of the data."""
    temperature: float = 0.9
    """Sampling temperature of student and teacher."""
    max_new_tokens: int = 512
    """Tokens of a sampled completion, at most."""
    generation_batch_size: int = 16
    """Prompts that a rank samples for at once."""
    seq_kd: bool = False
    """Steps that do not sample from the student learn from completions that the teacher samples, instead of those of the data."""
    disable_dropout: bool = True
    """Only true: dropout is always off."""

    eval_samples: int = 64
    """Held-out prompts that an evaluation samples for, to measure success and length; 0 for none."""
    baseline_success: float | None = None
    """Share of right answers to compare with, 0 to 1."""
    baseline_tokens: float | None = None
    """Tokens of an answer to compare with."""

    num_train_epochs: float = 3.0
    """Times that every example is gone through."""
    warmup_steps: float = 0.1
    """Below 1: share of all steps. Also warmup_ratio."""
    weight_decay: float = 0.01
    eval_steps: int = 100
    """Optimizer steps between evaluations on the rows held out; 0 for none."""
    save_steps: float = 100
    eval_on_start: bool = True
    """Evaluate before the first step: what the student was like without the teacher."""
    logging_steps: float = 10

    def usual_learning_rate(self) -> float:
        """What learning_rate is where it is not given."""
        return 5e-6

    def check(self) -> None:
        """Everything that the options say about each other.

        Raises:
            ConfigError: the first problem.
        """
        super().check()
        config_checks.check_distillation(self)

    def _resolve_evaluation(self) -> None:
        super()._resolve_evaluation()
        self.eval_on_start = self.eval_on_start and self.evaluates
