"""What a publication needs of an inference server, whichever engine is behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

EngineName: TypeAlias = Literal["vllm", "sglang"]

PauseMode: TypeAlias = Literal["keep", "wait", "abort"]
"""What becomes of requests in flight. keep: frozen, they go on with the new weights. wait: they end first. abort: they
end at once with the tokens that they have, and finish_reason "abort"."""

PAUSE_MODES: tuple[PauseMode, ...] = ("keep", "wait", "abort")

UNKNOWN_VERSION = "default"
"""What an engine reports that nobody has told a version since it started."""


class EngineControl(Protocol):
    """One inference server. Safe to use from several threads.

    Every call raises ServerSyncError when the server does not answer within timeout_s (seconds) or answers with an error.
    """

    @property
    def url(self) -> str:
        """Base URL, without /v1."""

    @property
    def engine(self) -> EngineName:
        """Whose routes it has."""

    def health(self, *, timeout_s: float) -> None:
        """Return if the engine behind the server is alive and answers."""

    def world_size(self, *, timeout_s: float) -> int:
        """The number of workers behind this server, data parallel ones included."""

    def is_paused(self, *, timeout_s: float) -> bool:
        """Whether generation is paused."""

    def pause(self, mode: PauseMode, *, recompute: bool, timeout_s: float) -> None:
        """Stop generating.

        Args:
            recompute: also drop the prefix cache and the frozen requests' keys and values, which are then computed again
                under the weights of that time. Otherwise frozen requests keep theirs.
        """

    def resume(self, *, timeout_s: float) -> None:
        """Let generation go on."""

    def weight_version(self, *, timeout_s: float) -> str:
        """The version that the server says it runs; UNKNOWN_VERSION for the weights it was started with."""

    def reset_prefix_cache(self, *, recompute: bool, timeout_s: float) -> bool:
        """Forget keys and values computed under other weights; whether the cache is empty now.

        Args:
            recompute: those of frozen requests too. Otherwise they stay, and with them the cache, while any are.
        """

    def load_folder(self, folder: str, weight_version: str, *, timeout_s: float) -> None:
        """Load a Hugging Face folder that the server can read, and call the weights `weight_version`."""

    def load_adapter(self, name: str, folder: str, *, timeout_s: float) -> None:
        """Load a LoRA adapter (peft folder) under `name`, in place of an earlier one of that name."""

    def prompt_logprobs(self, token_ids: Sequence[int], *, model: str | None = None, timeout_s: float) -> list[float]:
        """Logprobs (nats, at temperature 1) of token_ids[1:], each given those before it: one number less than there are tokens.

        Args:
            model: the served name, e.g. of an adapter; None: the first one that it serves.
        """

    def close(self) -> None:
        """Drop the connections."""
