"""Asks a provider for reasoning: which fields a chat request carries, by provider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from atroposlib.errors import ConfigError

EFFORT_TO_MAX_TOKENS = {"none": 1024, "minimal": 3200, "low": 6400, "medium": 16000, "high": 25600, "xhigh": 30400}
VALID_REASONING_EFFORTS = tuple(EFFORT_TO_MAX_TOKENS)


class ReasoningEffortError(ConfigError, ValueError):
    """A reasoning effort that nobody knows."""


@dataclass
class ReasoningConfig:
    """Whether chat requests ask for reasoning, and how much of it. An effort or a token limit turns it on."""

    enabled: bool = False
    effort: str | None = None
    """One of VALID_REASONING_EFFORTS."""
    max_tokens: int | None = None
    """Reasoning tokens; used where no effort is given."""

    def __post_init__(self) -> None:
        if self.effort is not None and self.effort not in VALID_REASONING_EFFORTS:
            raise ReasoningEffortError(
                f"Invalid reasoning_effort {self.effort!r}; it is one of {', '.join(VALID_REASONING_EFFORTS)}"
            )
        self.enabled = self.enabled or self.effort is not None or self.max_tokens is not None

    @classmethod
    def from_env_config(cls, env_config: Any) -> Self:
        """From an environment's fields thinking_mode, reasoning_effort and max_reasoning_tokens; absent ones are off."""
        return cls(
            enabled=bool(getattr(env_config, "thinking_mode", False)),
            effort=getattr(env_config, "reasoning_effort", None),
            max_tokens=getattr(env_config, "max_reasoning_tokens", None),
        )

    def is_reasoning_kwargs_active(self) -> bool:
        """Whether requests carry anything about reasoning."""
        return self.enabled

    def build_extra_body(self, base_url: str | None = None, use_max_tokens: bool = False) -> dict[str, Any] | None:
        """Fields to add to the request's body; None when reasoning is off.

        Args:
            base_url: decides the spelling: OpenAI itself, or the one of OpenRouter and most others.
            use_max_tokens: say the effort as a number of tokens.
        """
        if not self.enabled:
            return None
        if is_openai(base_url):
            return {"reasoning_effort": self.effort or "medium"}
        return {"reasoning": {"enabled": True, **self._amount(use_max_tokens)}}

    def _amount(self, use_max_tokens: bool) -> dict[str, Any]:
        if self.effort is not None:
            return {"max_tokens": EFFORT_TO_MAX_TOKENS[self.effort]} if use_max_tokens else {"effort": self.effort}
        return {} if self.max_tokens is None else {"max_tokens": self.max_tokens}


def is_openai(base_url: str | None) -> bool:
    """Whether requests go to OpenAI's own service, whose reasoning models take other parameters."""
    return "api.openai.com" in (base_url or "")


def inject_reasoning(kwargs: dict[str, Any], reasoning: ReasoningConfig | None, base_url: str | None) -> dict[str, Any]:
    """A chat request's arguments with reasoning asked for; `skip_reasoning=True` leaves them alone."""
    kwargs = dict(kwargs)
    is_skipped = kwargs.pop("skip_reasoning", False)
    extra = reasoning.build_extra_body(base_url) if reasoning is not None and not is_skipped else None
    if extra is None:
        return kwargs
    kwargs["extra_body"] = {**(kwargs.get("extra_body") or {}), **extra}
    if is_openai(base_url):
        # Its reasoning models refuse any other temperature, and the old name of the limit.
        kwargs["temperature"] = 1.0
        if "max_tokens" in kwargs:
            kwargs["max_completion_tokens"] = kwargs.pop("max_tokens")
    return kwargs
