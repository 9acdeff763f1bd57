"""One token-exact sequence of a session, and how a completion makes it grow."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, PrivateAttr

from atroposlib.envs.server_handling.engines.samples import TokenCompletion, merge_runs
from atroposlib.type_definitions import MASKED, VersionRuns
from atroposlib.wire.layout import NOT_SAMPLED

UNSAMPLED_LOGPROB = 1.0
"""Upstream's mark for positions without a logprob: no real logprob is above 0."""


class SequenceNode(BaseModel):
    """One sequence of a session: prompt, completions, replies; its lists are equally long."""

    full_text: str
    """Prompt and completion; the token that ended the completion is left out."""
    tokens: list[int]
    masked_tokens: list[int]
    """MASKED over what the policy did not sample, else the token id."""
    logprobs: list[float]
    """Nats; 1.0 over what the policy did not sample."""
    metadata: dict[str, Any] | None = None
    policy_versions: VersionRuns = []
    """Runs of (policy version, length) over tokens; NOT_SAMPLED over what the policy did not sample."""
    _terminator: str = PrivateAttr("")

    @property
    def completion_ids(self) -> list[int]:
        """Every sampled token, in order."""
        return [token for token in self.masked_tokens if token != MASKED]

    @property
    def exact_text(self) -> str:
        """full_text with the terminator that the policy sampled: what a prompt must begin with to continue it."""
        return self.full_text + self._terminator


EMPTY = SequenceNode(full_text="", tokens=[], masked_tokens=[], logprobs=[])


def grow(
    base: SequenceNode,
    prompt_ids: list[int],
    completion: TokenCompletion,
    *,
    full_text: str,
    terminator: str,
) -> SequenceNode:
    """The sequence that `base` becomes: what the prompt adds is masked, what the policy sampled is trained.

    Args:
        base: what the prompt continues; EMPTY for a new sequence.
        prompt_ids: begin with the tokens of `base`.
        terminator: text of the completion's last token where full_text leaves it out.
    """
    added = len(prompt_ids) - len(base.tokens)
    # Only a sequence that somebody else built says nothing about its versions.
    base_versions = base.policy_versions or [(NOT_SAMPLED, len(base.tokens))]
    # Not validated: item by item it costs more than all the rest, and these lists are ours.
    node = SequenceNode.model_construct(
        full_text=full_text,
        tokens=prompt_ids + completion.token_ids,
        masked_tokens=base.masked_tokens + [MASKED] * added + completion.token_ids,
        logprobs=base.logprobs + [UNSAMPLED_LOGPROB] * added + completion.logprobs,
        metadata={"finish_reason": completion.finish_reason},
        policy_versions=merge_runs([*base_versions, (NOT_SAMPLED, added), *completion.versions]),
    )
    node._terminator = terminator
    return node
