"""Who answers instead of a model: fixed texts, scripts by turn, rules, echo, chance, or a function of the author's."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from atroposlib.errors import ConfigError
from atroposlib.testing.mock.codec import Codec, message_text

Reply: TypeAlias = Callable[[list[int], int], Sequence[int]]
"""Completion ids, the terminator included, for prompt ids and the index of the choice."""

_ASSISTANT_STARTS = re.compile(
    r"<\|im_start\|>assistant|<\|start_header_id\|>assistant|<start_of_turn>model|\[/INST\]|<\|assistant\|>"
)
_USER_TURN = re.compile(
    r"(?:<\|im_start\|>|<start_of_turn>|<\|start_header_id\|>)user(?:<\|end_header_id\|>)?\s*(.*?)"
    r"(?:<\|im_end\|>|<end_of_turn>|<\|eot_id\|>)",
    re.S,
)
_WORDS = ("yes", "no", "maybe", "the", "answer", "is", "a", "number", "one", "two", "0", "1", "2", "3", "7", "42")


@dataclass
class Prompt:
    """What is to be continued, and which of the choices this is."""

    token_ids: list[int]
    index: int
    codec: Codec
    key: Callable[[], str]
    """Names the request for its random numbers; called at most once a choice."""
    known_messages: list[dict[str, Any]] | None = None
    """The chat, where the route carries one; the token routes do not."""

    @cached_property
    def text(self) -> str:
        """The prompt with its special tokens."""
        return self.codec.decode(self.token_ids, keep_special=True)

    @cached_property
    def turn(self) -> int:
        """Replies that the assistant has given before this one: 0 at first."""
        if self.known_messages is not None:
            return sum(message.get("role") == "assistant" for message in self.known_messages)
        return max(0, len(_ASSISTANT_STARTS.findall(self.text)) - 1)

    @cached_property
    def last_user_text(self) -> str:
        """What the user said last; the whole prompt where no chat can be seen in it."""
        if self.known_messages is not None:
            said = [message_text(message) for message in self.known_messages if message.get("role") != "assistant"]
            return said[-1] if said else ""
        turns = _USER_TURN.findall(self.text)
        return str(turns[-1]) if turns else self.text

    @cached_property
    def rng(self) -> random.Random:
        """Random numbers of this choice alone."""
        return random.Random(f"{self.key()}/{self.index}")


@runtime_checkable
class Policy(Protocol):
    """Something that answers."""

    def reply(self, prompt: Prompt) -> str | Sequence[int]:
        """A text, which gets the terminator added, or the token ids, which do not."""
        ...


@dataclass(frozen=True)
class TokenFunction:
    """`function(prompt_ids, index)` returns the ids."""

    function: Reply

    def reply(self, prompt: Prompt) -> Sequence[int]:
        """Its ids."""
        return self.function(prompt.token_ids, prompt.index)


@dataclass(frozen=True)
class PromptFunction:
    """`function(prompt)` returns a text or ids."""

    function: Callable[[Prompt], str | Sequence[int]]

    def reply(self, prompt: Prompt) -> str | Sequence[int]:
        """Its answer."""
        return self.function(prompt)


@dataclass(frozen=True)
class Script:
    """One text a turn; the last one again from then on."""

    texts: tuple[str, ...]

    def reply(self, prompt: Prompt) -> str:
        """The text of this turn."""
        return self.texts[min(prompt.turn, len(self.texts) - 1)]


@dataclass(frozen=True)
class OneOf:
    """One of the texts by chance, so that a group's rewards differ."""

    texts: tuple[str, ...]

    def reply(self, prompt: Prompt) -> str:
        """Any of them."""
        return prompt.rng.choice(self.texts)


@dataclass(frozen=True)
class RandomWords:
    """A few words by chance."""

    longest: int = 8

    def reply(self, prompt: Prompt) -> str:
        """1 to `longest` words."""
        return " ".join(prompt.rng.choices(_WORDS, k=prompt.rng.randint(1, self.longest)))


@dataclass(frozen=True)
class Echo:
    """What the user said last."""

    def reply(self, prompt: Prompt) -> str:
        """The same again."""
        return prompt.last_user_text


@dataclass(frozen=True)
class Rules:
    """The first regular expression that is found in what the user said last decides; its groups may be used as \\1."""

    rules: tuple[tuple[re.Pattern[str], str], ...]
    otherwise: str = "I do not know."

    def reply(self, prompt: Prompt) -> str:
        """The reply of the first rule that applies."""
        for pattern, reply in self.rules:
            if match := pattern.search(prompt.last_user_text):
                return match.expand(reply)
        return self.otherwise


def as_policy(reply: Policy | Reply | str | Sequence[str] | None) -> Policy:
    """A text, texts by turn, a function of ids, a policy; None: random words."""
    if reply is None:
        return RandomWords()
    if isinstance(reply, str):
        return Script((reply,))
    if isinstance(reply, Policy):
        return reply
    if callable(reply):
        return TokenFunction(reply)
    if not reply:
        raise ConfigError("a script needs at least one text")
    return Script(tuple(reply))


def parse_rule(text: str) -> tuple[re.Pattern[str], str]:
    """`REGEX=>REPLY`.

    Raises:
        ConfigError: no arrow, or no regular expression.
    """
    pattern, arrow, reply = text.partition("=>")
    if not arrow:
        raise ConfigError(f"a rule is REGEX=>REPLY, not {text!r}; e.g. '(\\d+) \\+ 0=>\\1'")
    try:
        return re.compile(pattern, re.S), reply
    except re.error as error:
        raise ConfigError(f"rule {text!r}: {pattern!r} is no regular expression: {error}") from error


def load_policy(place: str) -> Policy:
    """The function `reply`, or another, of a Python file: `FILE.py` or `FILE.py:NAME`.

    Raises:
        ConfigError: no such file, or no such function in it.
    """
    path_text, _, name = place.partition(":")
    path, name = Path(path_text), name or "reply"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"no Python file {str(path)!r}; a policy is FILE.py or FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if isinstance(function, Policy):
        return function
    if not callable(function):
        raise ConfigError(f"{path} defines no function {name}(prompt); write `def {name}(prompt): return 'text'`")
    return PromptFunction(function)
