"""Generalised knowledge distillation: the student learns to say what a teacher would, also where its own words lead."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from atroposlib.errors import ConfigError
from trainer.policy.logprobs import PackedPolicy
from trainer.supervised import preparation
from trainer.supervised.config import GKDConfig
from trainer.supervised.dataset_trainer import DatasetTrainer, Optimizers
from trainer.supervised.distillation import Distillation, Ranks
from trainer.supervised.distilled_policy import DistilledPolicy, Divergence
from trainer.supervised.evaluation import Outcome, generation_metrics, is_right, questions_of
from trainer.supervised.preparation import Rows
from trainer.supervised.sampling import Sampler, Sampling
from trainer.supervised.span_scores import SpanScorer
from trainer.supervised.teacher import Teacher, load_teacher, teacher_tokenizer
from trainer.supervised.tokenizers import has_same_vocabulary, is_same_tokenizer

log = logging.getLogger(__name__)


class GKDTrainer(DatasetTrainer):
    """Trains a student on what a teacher thinks of completions, those of the data and the student's own.

    Args:
        config: every option.
        model: the student in memory, instead of config.model_name_or_path.
        teacher_model: the teacher in memory, instead of config.teacher_model_name_or_path.
        tokenizer: the student's, instead of the model's own.
        teacher_processing_class: the teacher's tokenizer, instead of its own.
        train_dataset, eval_dataset: rows, instead of those of config.data.
        callbacks: of transformers.
        optimizers: an optimizer and a schedule, each instead of what config names; None for that.
    Raises:
        ConfigError: student or teacher cannot be used here, or their tokenizers do not allow what is asked.
        DataError: the rows cannot be read, or not one can be trained on.
    Source: Agarwal et al. 2024, arXiv:2306.13649.
    """

    args: GKDConfig

    def __init__(
        self,
        config: GKDConfig,
        *,
        model: Any = None,
        teacher_model: Any = None,
        tokenizer: Any = None,
        teacher_processing_class: Any = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: Optimizers = (None, None),
    ) -> None:
        preparation.start(config)
        tokenizer = preparation.tokenizer_of(config, tokenizer)
        teachers = teacher_processing_class if teacher_processing_class is not None else teacher_tokenizer(config)
        # Before any weights: this is quick.
        is_aligned = aligns(config, tokenizer, teachers)
        policy = preparation.policy_of(config, model, tokenizer)
        teacher = load_teacher(config, teachers, lm=teacher_model)
        preparation.fit(config, teacher.policy, teachers, whose="teacher")
        data = preparation.data_of(
            config,
            tokenizer,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            takes_prompts=config.lmbda == 1 or config.seq_kd,
        )
        student = student_of(config, policy, teacher)
        self._sampler = Sampler(student.lm, tokenizer)
        self._ranks = Ranks(config.process_index, config.world_size)
        self._asked = questions_of(
            data.held_out_rows,
            tokenizer,
            most=config.eval_samples if config.evaluates else 0,
            max_seq_length=config.max_seq_length,
        )
        preparation.check_best(config, data, self._asked.questions)
        scorer = None
        if is_aligned:
            scorer = SpanScorer(teacher, tokenizer, ends=self._sampler.ends, max_tokens=config.pass_tokens)
        objective = Distillation(
            config,
            teacher,
            self._sampler,
            tokenizer=tokenizer,
            scorer=scorer,
            ranks=self._ranks,
            autocast=lambda: self.accelerator.autocast(),
        )
        super().__init__(
            student,
            config,
            tokenizer=tokenizer,
            examples=data.examples,
            held_out=data.held_out,
            objective=objective,
            facts={**data.facts, **(self._asked.as_metrics() if config.evaluates else {})},
            callbacks=callbacks,
            optimizers=optimizers,
        )
        teacher.autocast = self.accelerator.autocast

    def further_evaluation(self) -> dict[str, float]:
        """Right answers and their length on held-out prompts. Every rank calls this."""
        count = len(self._asked.questions)
        if not count:
            return {}
        own = self._ranks.own(count)
        outcomes = self._ranks.together(self._answer(own) if own else [], count)
        return generation_metrics(
            outcomes, baseline_success=self.args.baseline_success, baseline_tokens=self.args.baseline_tokens
        )

    def _answer(self, places: Sequence[int]) -> list[Outcome]:
        """What the student makes of the questions in these places."""
        tokenizer, config = self.processing_class, self.args
        questions, prompts = [self._asked.questions[i] for i in places], [self._asked.prompts[i] for i in places]
        likeliest = Sampling(0.0, config.max_new_tokens, config.generation_batch_size, config.max_seq_length)
        with self.accelerator.autocast():
            replies = self._sampler.sample(prompts, likeliest, seed=config.seed)
        texts = [tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]
        return [
            Outcome(len(reply), None if each.ground_truth is None else is_right(text, each.ground_truth))
            for each, reply, text in zip(questions, replies, texts, strict=True)
        ]


def student_of(config: GKDConfig, policy: PackedPolicy, teacher: Teacher) -> DistilledPolicy:
    """The policy with the teacher's output layer to be compared with."""
    divergence = Divergence(config.beta, config.kd_temperature, is_rescaled=config.jsd_rescale)
    student = DistilledPolicy(policy.lm, chunk_size=config.logprob_chunk_size, divergence=divergence)
    student.learn_from(teacher.lm.get_output_embeddings())
    return student


def aligns(config: GKDConfig, tokenizer: Any, teachers: Any) -> bool:
    """Whether student and teacher are compared by spans of text, not token by token.

    Raises:
        ConfigError: token by token was asked for, and their tokens are not the same.
    """
    wanted = config.align_teacher_template
    if wanted is False and not has_same_vocabulary(tokenizer, teachers):
        raise ConfigError(
            f"align_teacher_template=false compares distributions over one vocabulary, and the tokenizers of student "
            f"({len(tokenizer)} tokens) and teacher ({len(teachers)} tokens) have two: give align_teacher_template=auto, "
            "which compares spans of text"
        )
    is_aligned = bool(wanted) if wanted != "auto" else not is_same_tokenizer(tokenizer, teachers)
    if is_aligned:
        _warn_of_spans(config)
    return is_aligned


def _warn_of_spans(config: GKDConfig) -> None:
    log.warning(
        "tokenizers or chat templates of student and teacher differ, or align_teacher_template=true: on what the student "
        "samples, KL(student || teacher) over spans of text is lowered"
    )
    if config.lmbda == 0 and not config.seq_kd:
        log.warning(
            "lmbda=0 then learns the data's completions alone and never asks the teacher: give lmbda over 0, seq_kd=true, "
            "or method=sft"
        )
    unused = [name for name in ("beta", "kd_temperature", "jsd_rescale") if config.is_given(name)]
    if unused:
        log.warning("%s has no effect", ", ".join(unused))
