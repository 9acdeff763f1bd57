"""What a teacher with a tokenizer of its own thinks of the student's completions: logprobs of the shortest common spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atroposlib.errors import ConfigError
from atroposlib.utils.tokenize_for_trainer import UNMASKED_ROLES
from trainer.supervised.alignment import Span, character_ends, common_spans, span_of_each
from trainer.supervised.examples import Example
from trainer.supervised.teacher import Teacher


@dataclass(frozen=True)
class SpanScores:
    """Of one completion."""

    span_of_token: list[int]
    """For each of its tokens the place of its span; -1 for those in none."""
    teacher_logprobs: list[float]
    """Nats, of the text of each span under the teacher."""


@dataclass(frozen=True)
class _Aligned:
    """A completion in both tokenizations."""

    prompt: list[int]
    completion: list[int]
    spans: list[Span]
    tokens: int


class SpanScorer:
    """Scores completions with a teacher of another tokenizer.

    Args:
        teacher: whose tokenizer tells which characters a token stands for.
        tokenizer: the student's.
        ends: ids after which a completion of the student is over.
        max_tokens: of one of the teacher's passes.
    Raises:
        ConfigError: the teacher's tokenizer knows no offsets, or has no token for the end.
    """

    def __init__(self, teacher: Teacher, tokenizer: Any, *, ends: frozenset[int], max_tokens: int) -> None:
        if not getattr(teacher.tokenizer, "is_fast", False) or teacher.tokenizer.eos_token_id is None:
            raise ConfigError(
                "align_teacher_template compares texts, which needs a fast tokenizer with an end-of-text token for the "
                "teacher: give teacher_tokenizer_name_or_path, or a teacher with the student's tokenizer"
            )
        self._teacher = teacher
        self._tokenizer = tokenizer
        self._ends = ends
        self._max_tokens = max_tokens

    def scores(self, examples: Sequence[Example]) -> list[SpanScores]:
        """Of the last completion of each example."""
        aligned = [self._align(example) for example in examples]
        texts = [(each.prompt, each.completion) for each in aligned]
        logprobs = self._teacher.logprobs(texts, max_tokens=self._max_tokens)
        return [_summed(each, found) for each, found in zip(aligned, logprobs, strict=True)]

    def teacher_prompt(self, example: Example) -> list[int]:
        """The example's prompt as the teacher's own chat template, or its tokenizer, has it; at least one token."""
        tokenizer = self._teacher.tokenizer
        if example.messages is not None and tokenizer.chat_template is not None:
            messages = prompt_messages(example)
            return list(
                tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
            )
        text = self._tokenizer.decode(example.prompt.tolist(), skip_special_tokens=True)
        # A first token is predicted from something.
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return list(tokenizer.encode(text, add_special_tokens=True)) or [start]

    def _align(self, example: Example) -> _Aligned:
        sampled = example.tokens_L[example.last_completion_start :].tolist()
        is_ended = bool(sampled) and sampled[-1] in self._ends
        text, student_ends = character_ends(sampled[: len(sampled) - is_ended], self._decode)
        found = self._teacher.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, teacher_ends = list(found["input_ids"]), _rising([end for _, end in found["offset_mapping"]])
        spans = common_spans(student_ends, teacher_ends)
        if is_ended:
            # Both say the same by ending, if all before it is compared, too.
            spans.append(Span((len(sampled) - 1, len(sampled)), (len(ids), len(ids) + 1)))
            ids.append(self._teacher.tokenizer.eos_token_id)
        return _Aligned(self.teacher_prompt(example), ids, spans, len(sampled))

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def prompt_messages(example: Example) -> list[Any]:
    """The chat before the last completion."""
    messages = list(example.messages or ())
    return messages[:-1] if messages and messages[-1].get("role") in UNMASKED_ROLES else messages


def _summed(aligned: _Aligned, logprobs: Sequence[float]) -> SpanScores:
    sums = [sum(logprobs[start:stop]) for start, stop in (span.teacher for span in aligned.spans)]
    return SpanScores(span_of_each(aligned.spans, aligned.tokens), sums)


def _rising(ends: Sequence[int]) -> list[int]:
    """Offsets of some tokenizers step back for pieces of a character."""
    highest, rising = 0, []
    for end in ends:
        highest = max(highest, end)
        rising.append(highest)
    return rising
