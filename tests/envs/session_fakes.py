"""Servers for sessions, in memory: they answer from a script and note what they were asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from atroposlib.envs.server_handling.engines.samples import TokenCompletion, TokenSamples

EOS = 2
VERSION = 7

Script = Callable[[str, int], str]
"""The text of a reply, for the prompt's text and the index of the choice."""


@dataclass
class ScriptedServer:
    """A token server: the script's text, a token a byte, then the end of the turn; cut at max_tokens."""

    tokenizer: Any
    script: Script
    requests: list[dict[str, Any]] = field(default_factory=list)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    """A request whose prompt holds the key waits for the event."""
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once a request waits at a gate."""
    config: Any = field(default_factory=lambda: SimpleNamespace(model_name="scripted", tokenizer_name="none"))

    async def sample_tokens(
        self, *, input_ids: list[int], prompt: str, n: int = 1, max_tokens: int | None = None, **sampling: Any
    ) -> TokenSamples:
        self.requests.append({"input_ids": input_ids, "prompt": prompt, "n": n, **sampling})
        for key, gate in self.gates.items():
            if key in prompt:
                self.waiting.set()
                await gate.wait()
        return TokenSamples(input_ids, [self._completion(prompt, index, max_tokens) for index in range(n)])

    def _completion(self, prompt: str, index: int, max_tokens: int | None) -> TokenCompletion:
        whole = [*self.tokenizer.encode(self.script(prompt, index), add_special_tokens=False), EOS]
        ids = whole[:max_tokens]
        return TokenCompletion(
            token_ids=ids,
            logprobs=[-0.25 * (i + 1) for i in range(len(ids))],
            finish_reason="stop" if len(ids) == len(whole) else "length",
            versions=[(VERSION, len(ids))] if ids else [],
        )


@dataclass
class UpstreamStyleServer:
    """Knows upstream's token method only."""

    answer: Any
    tokenizer: Any
    requests: list[dict[str, Any]] = field(default_factory=list)

    async def tokens_and_logprobs_completion(self, **kwargs: Any) -> Any:
        self.requests.append(kwargs)
        return self.answer
