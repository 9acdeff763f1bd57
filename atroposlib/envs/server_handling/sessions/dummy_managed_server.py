"""A session over a server without token ids: real text, placeholder tokens. For evaluation, never for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from atroposlib.envs.server_handling.sessions.chat_messages import plain_messages
from atroposlib.envs.server_handling.sessions.sequence_node import SequenceNode
from atroposlib.envs.server_handling.sessions.session_tree import node_to_extend, place
from atroposlib.type_definitions import MASKED
from atroposlib.wire.layout import NOT_SAMPLED

if TYPE_CHECKING:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

N_DUMMY_TOKENS = 128
DUMMY_LOGPROB = -0.5


class DummyManagedServer:
    """As ManagedServer, but every node has the same 128 tokens; `metadata["dummy_tokens"]` says so.

    Args:
        server: answers `chat_completion` and `completion`.
        tokenizer: kept for callers that read it.
        track_tree: keep every sequence, by its text, in `sequences`.
    """

    def __init__(self, server: Any, tokenizer: Any = None, track_tree: bool = False) -> None:
        self.server = server
        self.tokenizer = tokenizer
        self.track_tree = track_tree
        self.current_nodes: list[SequenceNode] = []
        self.sequences: dict[str, SequenceNode] = {}

    async def chat_completion(self, **kwargs: Any) -> ChatCompletion:
        """The server's own chat answer."""
        answer: ChatCompletion = await self.server.chat_completion(**kwargs)
        prompt = _as_text(plain_messages(kwargs.get("messages", ())))
        replies = [f"\n\nassistant:{choice.message.content or ''}" for choice in answer.choices]
        self._keep(prompt, replies, [choice.finish_reason for choice in answer.choices])
        return answer

    async def completion(self, **kwargs: Any) -> Completion:
        """The server's own text completion."""
        answer: Completion = await self.server.completion(**kwargs)
        replies = [choice.text for choice in answer.choices]
        self._keep(str(kwargs.get("prompt", "")), replies, [choice.finish_reason for choice in answer.choices])
        return answer

    async def get_logprobs(self, **kwargs: Any) -> dict[str, Any]:
        """There are none.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("DummyManagedServer does not implement get_logprobs: its tokens are placeholders")

    def get_state(self) -> dict[str, Any]:
        """`nodes` in the order of the choices; with track_tree `sequences` by their text, also as `tree`."""
        if self.track_tree:
            return {"sequences": dict(self.sequences), "tree": dict(self.sequences)}
        return {"nodes": list(self.current_nodes)}

    def reset(self) -> None:
        """Forget the session; lists handed out before stay valid."""
        self.current_nodes = []
        self.sequences = {}

    def _keep(self, prompt: str, replies: Sequence[str], finish_reasons: Sequence[str | None]) -> None:
        nodes = [_dummy_node(prompt + reply, reason) for reply, reason in zip(replies, finish_reasons, strict=True)]
        if self.track_tree:
            self.sequences.update((node.full_text, node) for node in nodes)
        else:
            place(self.current_nodes, node_to_extend(self.current_nodes, prompt), nodes)


def _dummy_node(full_text: str, finish_reason: str | None) -> SequenceNode:
    tokens = list(range(N_DUMMY_TOKENS))
    return SequenceNode(
        full_text=full_text,
        tokens=tokens,
        masked_tokens=[MASKED, *tokens[1:]],
        logprobs=[DUMMY_LOGPROB] * N_DUMMY_TOKENS,
        metadata={"finish_reason": finish_reason or "stop", "dummy_tokens": True},
        policy_versions=[(NOT_SAMPLED, N_DUMMY_TOKENS)],
    )


def _as_text(messages: Sequence[dict[str, Any]]) -> str:
    return "\n\n".join(f"{message['role']}:{message.get('content') or ''}" for message in messages)
