"""Policy versions of completions whose engine does not report them: bounds from before and after the request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from atroposlib.envs.server_handling.engines.samples import TokenCompletion, TokenSamples
from atroposlib.errors import ModelServerError
from atroposlib.wire.layout import NOT_SAMPLED

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.pool.seat import Seat

CurrentVersion = Callable[[], Awaitable[int | None]]


async def sample_with_versions(seat: Seat, kwargs: dict[str, Any]) -> TokenSamples:
    """Sample; where the tokens will be trained on, every one of them has its version.

    Raises:
        ModelServerError: the server does not say which published version it runs.
    """
    server = seat.server
    if not server.require_version:
        return await server.sample_tokens(**kwargs)
    if not seat.reports_versions:
        samples = await sample_within_bounds(
            lambda: server.sample_tokens(**kwargs), server.current_version, server=seat.url
        )
        # Bounds cost two more requests each: not where the engine itself says more.
        seat.reports_versions = reports_versions(samples)
        return samples
    samples = await server.sample_tokens(**kwargs)
    if lacks_versions(samples):
        seat.reports_versions = False
        raise ModelServerError(f"inference server {seat.url} has stopped reporting the policy versions of its tokens")
    return samples


async def sample_within_bounds(
    sample: Callable[[], Awaitable[TokenSamples]], current_version: CurrentVersion, *, server: str
) -> TokenSamples:
    """Sample, and fill the versions that the engine leaves out.

    Args:
        sample: makes the request.
        current_version: the policy version that the engine runs now; None while it runs no published one.
        server: its name, for messages.
    Raises:
        ModelServerError: the engine says neither with the tokens nor before and after what it runs.
    """
    before = await current_version()
    samples = await sample()
    if not lacks_versions(samples):
        return samples
    version = oldest(before, await current_version())
    if version == NOT_SAMPLED:
        raise ModelServerError(
            f"inference server {server} does not say which published policy version it runs, "
            "so its tokens cannot be trained on; it can work once the trainer has published weights to it"
        )
    return replace(samples, completions=[_filled(completion, version) for completion in samples.completions])


def reports_versions(samples: TokenSamples) -> bool:
    """Whether the sampled tokens carry their versions. Without any token nothing was reported."""
    return any(completion.token_ids for completion in samples.completions) and not lacks_versions(samples)


def lacks_versions(samples: TokenSamples) -> bool:
    """Whether some sampled token carries no version."""
    return any(version == NOT_SAMPLED for completion in samples.completions for version, _ in completion.versions)


def oldest(before: int | None, after: int | None) -> int:
    """The version to put down for tokens sampled between two looks: exact if nothing changed, else never too new.

    NOT_SAMPLED where either look found no published version: the tokens may come from weights without a number.
    """
    known = [version for version in (before, after) if version is not None and version != NOT_SAMPLED]
    return min(known) if len(known) == 2 else NOT_SAMPLED


def _filled(completion: TokenCompletion, version: int) -> TokenCompletion:
    n_tokens = len(completion.token_ids)
    return replace(completion, versions=[(version, n_tokens)] if n_tokens else [])
