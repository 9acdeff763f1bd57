"""Takes away for repetition."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from atroposlib.envs.reward_fns.registry import registry
from atroposlib.envs.reward_fns.reward_function import RewardFunction
from atroposlib.errors import ConfigError

COMPONENT_WEIGHTS = {"word": 0.3, "phrase": 0.4, "consecutive": 0.6, "beginning": 0.5}
_COMMON = """
a an and are as at be but by can do for from had has have he her his i if in is it its me my no not of on or our she so
that the their them then there they this to up was we were what when which who will with would you your
"""
STOPWORDS = frozenset(_COMMON.split())
SMALLEST_PENALTY = 0.1
"""Of a reply that repeats more than the threshold."""
WORST_REPEATED_SENTENCES = 0.4
"""Comes on top of the base penalty when every sentence is a repetition."""
PHRASE_WORDS = 3
BEGINNING_WORDS = 2
USES_OF_A_WORD = 3
"""Uses of one content word that are no repetition."""


@registry.register
class RepetitionPenaltyReward(RewardFunction):
    """From -1.0 for a reply that repeats itself to 0.0 for one that does not.

    A repeated sentence of more than three words costs the base penalty and up to 0.4 more by their share. Otherwise
    the rates of repeated words, phrases, adjacent words and sentence beginnings are weighted and added; what they
    exceed the threshold by is the penalty.

    Args:
        threshold: rate of repetition that costs nothing, 0 to 1.
        min_words, min_sentences: a reply with less of either gets short_text_penalty.
        paragraph_repetition_base_penalty: for one repeated sentence.
        component_weights: by component: word, phrase, consecutive, beginning; those not named keep their default.
        stopwords: words whose repetition does not count; None: common English ones.
    Raises:
        ConfigError: the threshold is not in 0...1, or a component is unknown.
    """

    def __init__(
        self,
        threshold: float = 0.05,
        min_words: int = 10,
        min_sentences: int = 2,
        short_text_penalty: float = -0.1,
        paragraph_repetition_base_penalty: float = -0.6,
        component_weights: Mapping[str, float] | None = None,
        stopwords: Collection[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= threshold < 1:
            raise ConfigError(f"threshold={threshold} is a share: give at least 0 and less than 1")
        self.threshold = threshold
        self.min_words = min_words
        self.min_sentences = min_sentences
        self.short_text_penalty = short_text_penalty
        self.paragraph_repetition_base_penalty = paragraph_repetition_base_penalty
        self.component_weights = {**COMPONENT_WEIGHTS, **(component_weights or {})}
        self.stopwords = STOPWORDS if stopwords is None else frozenset(stopwords)
        if unknown := sorted(set(self.component_weights) - set(COMPONENT_WEIGHTS)):
            raise ConfigError(f"unknown component_weights {unknown}; known: {', '.join(COMPONENT_WEIGHTS)}")

    def compute(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """Measure each completion."""
        return [self._score(self.get_content(completion)) for completion in completions]

    def _score(self, text: str) -> float:
        sentences = [words for part in re.split(r"[.!?\n]+", text.lower()) if (words := re.findall(r"\w+", part))]
        words = [word for sentence in sentences for word in sentence]
        if len(words) < self.min_words or len(sentences) < self.min_sentences:
            return self.short_text_penalty
        long_sentences = [tuple(sentence) for sentence in sentences if len(sentence) > 3]
        repeated = _repeated_share(long_sentences)
        if repeated > 0:
            return max(-1.0, self.paragraph_repetition_base_penalty - WORST_REPEATED_SENTENCES * repeated)
        rates = self._rates(words, sentences)
        rate = min(1.0, sum(self.component_weights[name] * value for name, value in rates.items()))
        if rate <= self.threshold:
            return 0.0
        return -max(SMALLEST_PENALTY, (rate - self.threshold) / (1 - self.threshold))

    def _rates(self, words: Sequence[str], sentences: Sequence[Sequence[str]]) -> dict[str, float]:
        content = [word for word in words if word not in self.stopwords]
        excess = sum(max(0, count - USES_OF_A_WORD) for count in Counter(content).values())
        phrases = [tuple(words[i : i + PHRASE_WORDS]) for i in range(len(words) - PHRASE_WORDS + 1)]
        beginnings = [tuple(sentence[:BEGINNING_WORDS]) for sentence in sentences]
        return {
            "word": excess / len(content) if content else 0.0,
            "phrase": _repeated_share(phrases),
            "consecutive": sum(one == other for one, other in pairwise(words)) / (len(words) - 1),
            "beginning": _repeated_share(beginnings),
        }


def repetition_penalty_reward(completions: list[Any], threshold: float = 0.05, **kwargs: Any) -> list[float]:
    """RepetitionPenaltyReward with its defaults."""
    return RepetitionPenaltyReward(threshold=threshold)(completions)


def _repeated_share(things: Sequence[Hashable]) -> float:
    """Share of things that were there before."""
    return 1 - len(set(things)) / len(things) if things else 0.0
