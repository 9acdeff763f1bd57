"""Pays for Sanskrit verse in a metre of so many syllables a quarter."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from atroposlib.envs.reward_fns.registry import registry
from atroposlib.envs.reward_fns.reward_function import RewardFunction
from atroposlib.errors import ConfigError

METERS = {
    "gayatri": (3, 8),
    "anustubh": (4, 8),
    "pankti": (5, 8),
    "tristubh": (4, 11),
    "jagati": (4, 12),
}
"""Quarters of a stanza, and syllables of a quarter."""

_QUARTERS = re.compile(r"[\n|/\u0964\u0965]+")
# A dotted l before a vowel is the consonant of the Veda, else the vowel.
_LATIN_VOWELS = re.compile(r"ai|au|[aeiou\u1e5b\u1e5d]|[\u1e37\u1e39](?![aeiou])")
_VIRAMA = "\u094d"


@registry.register
class ChandasMeterReward(RewardFunction):
    """Share of a stanza's quarters (padas) that have the metre's number of syllables, 0.0 to 1.0.

    Quarters stand on lines of their own or between dandas, in Devanagari or in Latin letters (IAST). Syllables are
    counted; their weights (laghu, guru) are not judged.

    Args:
        meter: gayatri, anustubh, pankti, tristubh or jagati.
    Raises:
        ConfigError: the metre is unknown.
    """

    def __init__(self, meter: str = "tristubh", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if meter not in METERS:
            raise ConfigError(f"meter={meter!r} is unknown; known: {', '.join(METERS)}")
        self.meter = meter

    def compute(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """Count the syllables of each completion's quarters."""
        return [self._score(self.get_content(completion)) for completion in completions]

    def _score(self, text: str) -> float:
        n_quarters, n_syllables = METERS[self.meter]
        counts = [count for quarter in _QUARTERS.split(text) if (count := syllables(quarter))]
        return sum(count == n_syllables for count in counts) / max(n_quarters, len(counts))


def syllables(text: str) -> int:
    """Vowels of a text in Devanagari or IAST."""
    return sum(map(_devanagari_vowel, text)) - text.count(_VIRAMA) + len(_LATIN_VOWELS.findall(_plain_lengths(text)))


def _devanagari_vowel(letter: str) -> bool:
    """An independent vowel, or a consonant with its own a. A vowel sign replaces that a, so it adds none."""
    return "\u0904" <= letter <= "\u0939" or "\u0958" <= letter <= "\u0961"


def _plain_lengths(text: str) -> str:
    """Lower case without the macrons of long vowels; the dots of vocalic r and l stay."""
    decomposed = unicodedata.normalize("NFD", text.lower()).replace("\u0304", "")
    return unicodedata.normalize("NFC", decomposed)
