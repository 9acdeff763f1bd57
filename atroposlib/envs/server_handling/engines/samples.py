"""What an engine sampled: token ids, logprobs, policy versions. Nothing here is ever tokenised again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from atroposlib.errors import ModelServerError
from atroposlib.type_definitions import VersionRuns
from atroposlib.wire.layout import NOT_SAMPLED


@dataclass(frozen=True)
class TokenCompletion:
    """One completion, the terminator included where the engine sampled it."""

    token_ids: list[int]
    logprobs: list[float]
    """Nats, one a token, under the distribution that the token was sampled from."""
    finish_reason: str
    """stop, length, abort."""
    versions: VersionRuns
    """Runs of (policy version, length) over token_ids; NOT_SAMPLED where the server did not say."""


@dataclass(frozen=True)
class TokenSamples:
    """The completions of one prompt."""

    prompt_ids: list[int]
    completions: list[TokenCompletion]

    def as_lists(self) -> tuple[list[int], list[list[int]], list[list[float]], list[str]]:
        """Prompt tokens, outputs, logprobs, finish reasons: the upstream form."""
        return (
            self.prompt_ids,
            [completion.token_ids for completion in self.completions],
            [completion.logprobs for completion in self.completions],
            [completion.finish_reason for completion in self.completions],
        )


def samples_from_lists(
    prompt_ids: list[int], outputs: list[list[int]], logprobs: list[list[float]], finish_reasons: list[Any]
) -> TokenSamples:
    """From the upstream form, which says nothing about policy versions; as_lists reversed.

    Raises:
        ModelServerError: the lists do not fit together, or the engine aborted a completion.
    """
    if not len(outputs) == len(logprobs) == len(finish_reasons):
        raise ModelServerError(
            f"{len(outputs)} completions came with {len(logprobs)} lists of logprobs and {len(finish_reasons)} finish reasons"
        )
    if any(finish_reason_name(reason) == "abort" for reason in finish_reasons):
        raise ModelServerError(f"the inference server aborted the request: finish reasons {finish_reasons}")
    for ids, nats in zip(outputs, logprobs, strict=True):
        if len(ids) != len(nats):
            raise ModelServerError(f"a completion of {len(ids)} tokens came with {len(nats)} logprobs")
    return TokenSamples(
        prompt_ids=list(prompt_ids),
        completions=[
            TokenCompletion(
                token_ids=list(ids),
                logprobs=list(nats),
                finish_reason=finish_reason_name(reason),
                versions=version_runs(None, len(ids), server=""),
            )
            for ids, nats, reason in zip(outputs, logprobs, finish_reasons, strict=True)
        ],
    )


def finish_reason_name(reason: Any) -> str:
    """stop, length, abort: from a name, or from an engine's description `{"type": name, ...}`; unknown is stop."""
    name = reason.get("type") if isinstance(reason, dict) else reason
    return name if isinstance(name, str) else "stop"


def version_runs(spans: list[dict[str, Any]] | None, n_tokens: int, *, server: str) -> VersionRuns:
    """Turn an engine's spans `{version, start, end}` over output tokens into runs.

    A version that is not an integer (vLLM says "default" before anything was published) becomes NOT_SAMPLED.

    Raises:
        ModelServerError: the spans do not cover the output exactly.
    """
    if n_tokens == 0:
        return []
    if not spans:
        return [(NOT_SAMPLED, n_tokens)]
    runs: VersionRuns = []
    position = 0
    for span in spans:
        if span["start"] != position or span["end"] < span["start"]:
            raise ModelServerError(
                f"{server} reports weight versions {spans} that do not cover its {n_tokens} tokens in order"
            )
        position = span["end"]
        if span["end"] > span["start"]:
            runs.append((version_number(span["version"]), span["end"] - span["start"]))
    if position != n_tokens:
        raise ModelServerError(f"{server} reports weight versions {spans} for {n_tokens} tokens")
    return merge_runs(runs)


def version_number(version: str) -> int:
    """A published version is a decimal number; anything else is unknown."""
    return int(version) if version.isascii() and version.isdecimal() else NOT_SAMPLED


def merge_runs(runs: VersionRuns) -> VersionRuns:
    """Join neighbours of one version; drop empty runs."""
    kept = [run for run in runs if run[1] > 0]
    return [(version, sum(length for _, length in same)) for version, same in groupby(kept, key=lambda run: run[0])]
