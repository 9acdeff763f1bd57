"""What a student learns from a teacher: whose completions each step takes, and what the teacher says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from trainer.supervised.config import GKDConfig
from trainer.supervised.examples import Example, cut, with_completion
from trainer.supervised.objectives import PassLoss, SpanDivergence, TokenDivergence
from trainer.supervised.passes import Pass
from trainer.supervised.sampling import Ids, Sampler, Sampling
from trainer.supervised.span_scores import SpanScorer
from trainer.supervised.teacher import Teacher

Source = Literal["student", "teacher", "data"]


def source_of_step(step: int, *, lmbda: float, seq_kd: bool, seed: int) -> Source:
    """Whose completions a step learns from: one coin a step, the same on every rank and in every run with this seed."""
    if np.random.default_rng((seed, step)).random() < lmbda:
        return "student"
    return "teacher" if seq_kd else "data"


@dataclass(frozen=True)
class Ranks:
    """Which part of the work is ours, and how the parts come together."""

    rank: int
    ranks: int

    def own(self, count: int) -> list[int]:
        """The places of this rank's part."""
        return list(range(self.rank, count, self.ranks))

    def together(self, own: Sequence[Any], count: int) -> list[Any]:
        """The parts of all ranks, in order. Every rank calls this."""
        parts: list[Any] = [list(own)]
        if self.ranks > 1:
            parts = [None] * self.ranks
            torch.distributed.all_gather_object(parts, list(own))
        return [parts[place % self.ranks][place // self.ranks] for place in range(count)]


class Distillation:
    """The objective of GKD.

    Args:
        student: samples from the model in training.
        tokenizer: the student's.
        scorer: what the teacher says of texts, where its tokenizer is another; None where both have one.
        autocast: precision of the model in training.
    """

    def __init__(
        self,
        config: GKDConfig,
        teacher: Teacher,
        student: Sampler,
        *,
        tokenizer: Any,
        scorer: SpanScorer | None,
        ranks: Ranks,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._config = config
        self._student = student
        self._teacher_lm = Sampler(teacher.lm, teacher.tokenizer)
        self._teacher = teacher
        self._tokenizer = tokenizer
        self._scorer = scorer
        self._ranks = ranks
        self._autocast = autocast
        self._rule = TokenDivergence(teacher) if scorer is None else SpanDivergence()

    def loss(self, model: Any, each: Pass) -> PassLoss:
        """See Objective."""
        return self._rule.loss(model, each)

    def completed(self, step: int, examples: Sequence[Example]) -> list[Example]:
        """See Objective."""
        config = self._config
        source = source_of_step(step, lmbda=config.lmbda, seq_kd=config.seq_kd, seed=config.seed)
        if source == "data":
            return list(examples)
        own = [examples[i] for i in self._ranks.own(len(examples))]
        sample = self._by_student if source == "student" else self._by_teacher
        # All samples go to every rank: how they are packed follows from all of them.
        return self._ranks.together(sample(own, self._seed(step)) if own else [], len(examples))

    def _by_student(self, examples: Sequence[Example], seed: int) -> list[Example]:
        with self._autocast():
            completions = self._student.sample([each.prompt for each in examples], self._sampling(), seed=seed)
        sampled = [self._with(each, ids, True) for each, ids in zip(examples, completions, strict=True)]
        if self._scorer is None:
            return sampled
        return [replace(each, spans=spans) for each, spans in zip(sampled, self._scorer.scores(sampled), strict=True)]

    def _by_teacher(self, examples: Sequence[Example], seed: int) -> list[Example]:
        scorer = self._scorer
        prompts: list[Ids] = [each.prompt if scorer is None else scorer.teacher_prompt(each) for each in examples]
        with self._teacher.autocast():
            completions = self._teacher_lm.sample(prompts, self._sampling(), seed=seed)
        if self._scorer is not None:
            completions = [self._in_own_tokens(ids) for ids in completions]
        return [self._with(each, ids, False) for each, ids in zip(examples, completions, strict=True)]

    def _in_own_tokens(self, ids: Sequence[int]) -> list[int]:
        """What the teacher has said, as the student's tokens, with its end."""
        is_ended = bool(ids) and ids[-1] in self._teacher_lm.ends
        text = self._teacher.tokenizer.decode(list(ids), skip_special_tokens=True)
        end = self._tokenizer.eos_token_id
        found = list(self._tokenizer.encode(text, add_special_tokens=False))
        return [*found, end] if end is not None and (is_ended or not found) else found

    def _with(self, example: Example, completion: Sequence[int], is_sampled: bool) -> Example:
        return cut(with_completion(example, completion, is_sampled=is_sampled), self._config.max_seq_length)

    def _sampling(self) -> Sampling:
        config = self._config
        return Sampling(config.temperature, config.max_new_tokens, config.generation_batch_size, config.max_seq_length)

    def _seed(self, step: int) -> int:
        return int(np.random.SeedSequence((self._config.seed, step, self._ranks.rank)).generate_state(1)[0])
