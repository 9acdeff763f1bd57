"""Token-exact sessions: a conversation is one growing sequence of the very ids that the engine sampled."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel

from atroposlib.envs.server_handling.provenance import Origin, remember
from atroposlib.envs.server_handling.samples import TokenCompletion, merge_runs
from atroposlib.type_definitions import MASKED, VersionRuns
from atroposlib.wire.layout import NOT_SAMPLED

if TYPE_CHECKING:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    from atroposlib.envs.server_handling.samples import TokenSamples
    from atroposlib.envs.server_handling.server_baseline import ServerBaseline

UNSAMPLED_LOGPROB = 1.0
"""Upstream's mark for positions without a logprob: no real logprob is above 0."""


class SequenceNode(BaseModel):
    """One sequence of a session: prompt, completions, replies; its lists are equally long."""

    full_text: str
    tokens: list[int]
    masked_tokens: list[int]
    """MASKED over what the policy did not sample, else the token id."""
    logprobs: list[float]
    """Nats; 1.0 over what the policy did not sample."""
    metadata: dict[str, Any] | None = None
    policy_versions: VersionRuns = []
    """Runs of (policy version, length) over tokens; NOT_SAMPLED over what the policy did not sample."""

    @property
    def completion_ids(self) -> list[int]:
        """Every sampled token, in order."""
        return [token for token in self.masked_tokens if token != MASKED]


class TokenServer(Protocol):
    """What a session needs of a server."""

    @property
    def config(self) -> ServerBaseline:
        """The model's and the tokenizer's name."""
        ...

    async def sample_tokens(self, **kwargs: Any) -> TokenSamples:
        """Sample from `input_ids`."""
        ...


class ManagedServer:
    """One session; use it through ``ServerManager.managed_server()``.

    A prompt whose text begins with an earlier sequence's text extends that sequence: its ids stay as sampled, only the
    new text is tokenised. Any other prompt starts a new sequence, counted in `segments_restarted` when the session
    already had one.
    """

    def __init__(
        self,
        server: TokenServer,
        tokenizer: Any = None,
        track_tree: bool = False,
        *,
        preserve_think_blocks: bool = False,
    ) -> None:
        if track_tree:
            raise NotImplementedError("track_tree is not supported yet: use the list of nodes")
        self.server = server
        self.tokenizer = tokenizer if tokenizer is not None else _server_tokenizer(server)
        self.preserve_think_blocks = preserve_think_blocks
        self.current_nodes: list[SequenceNode] = []
        self.segments_restarted = 0

    async def chat_completion(self, **kwargs: Any) -> ChatCompletion:
        """Chat; the answer is the openai package's object, its choices in the order of the new nodes."""
        from openai.types.chat import ChatCompletion, ChatCompletionMessage
        from openai.types.chat.chat_completion import Choice

        sampled = await self._sample(self._convert_messages_to_prompt(kwargs.pop("messages")), is_chat=True, **kwargs)
        choices = [
            Choice(
                index=i,
                finish_reason=_openai_finish_reason(completion),
                message=ChatCompletionMessage(role="assistant", content=self._text(completion.token_ids)),
            )
            for i, (_, completion) in enumerate(sampled)
        ]
        return ChatCompletion(
            id=_answer_id(),
            created=int(time.time()),
            model=self.server.config.model_name,
            object="chat.completion",
            choices=choices,
        )

    async def completion(self, **kwargs: Any) -> Completion:
        """Continue a text; the answer is the openai package's object, its choices in the order of the new nodes."""
        from openai.types import Completion, CompletionChoice

        sampled = await self._sample(kwargs.pop("prompt"), is_chat=False, **kwargs)
        choices = [
            CompletionChoice(
                index=i, finish_reason=_openai_finish_reason(completion), text=self._text(completion.token_ids)
            )
            for i, (_, completion) in enumerate(sampled)
        ]
        return Completion(
            id=_answer_id(),
            created=int(time.time()),
            model=self.server.config.model_name,
            object="text_completion",
            choices=choices,
        )

    async def sample_nodes(self, *, messages: Sequence[Any], prefill: str = "", **sampling: Any) -> list[SequenceNode]:
        """Sample replies to a chat and return the new nodes: for callers who want tokens, not the openai package's objects.

        Args:
            prefill: text that every reply is made to begin with; it belongs to the prompt, so it is not trained.
        """
        prompt = self._convert_messages_to_prompt(messages) + prefill
        return [node for node, _ in await self._sample(prompt, is_chat=True, **sampling)]

    def get_state(self) -> dict[str, Any]:
        """The session's sequences, in the order of the choices."""
        return {"nodes": list(self.current_nodes)}

    def reset(self) -> None:
        """Forget the session; lists handed out before stay valid."""
        self.current_nodes = []

    async def _sample(
        self, prompt: str, *, is_chat: bool, **sampling: Any
    ) -> list[tuple[SequenceNode, TokenCompletion]]:
        sampling.pop("tools", None)
        sampling.pop("tool_choice", None)
        base = self._node_to_extend(prompt)
        if base is None:
            self.segments_restarted += bool(self.current_nodes)
            base = SequenceNode(full_text="", tokens=[], masked_tokens=[], logprobs=[])
            prompt_ids = self._encode_prompt(prompt, is_chat=is_chat)
        else:
            prompt_ids = base.tokens + self._encode_suffix(base, prompt)
        samples = await self.server.sample_tokens(input_ids=prompt_ids, **sampling)
        sampled = [(self._grow(base, prompt, prompt_ids, completion), completion) for completion in samples.completions]
        nodes = [node for node, _ in sampled]
        # By identity, and after the wait: another call of this session may have moved or replaced it meanwhile.
        where = next((i for i, node in enumerate(self.current_nodes) if node is base), None)
        if where is not None:
            self.current_nodes[where] = nodes.pop(0)
        self.current_nodes.extend(nodes)
        return sampled

    def _node_to_extend(self, prompt: str) -> SequenceNode | None:
        """The longest sequence that the prompt continues exactly; the first of equals."""
        candidates = [node for node in self.current_nodes if self._is_continued_by(node, prompt)]
        return max(candidates, key=lambda node: len(node.full_text), default=None)

    def _is_continued_by(self, node: SequenceNode, prompt: str) -> bool:
        if not prompt.startswith(node.full_text):
            return False
        # After a terminator only the terminator's text can come: other text belongs to another reply.
        return prompt.startswith(self._terminator(node), len(node.full_text))

    def _encode_prompt(self, prompt: str, *, is_chat: bool) -> list[int]:
        bos = getattr(self.tokenizer, "bos_token", None)
        # Templates that write the BOS themselves must not get a second one.
        add_special = not (is_chat and bos and prompt.startswith(bos))
        ids: list[int] = self.tokenizer.encode(prompt, add_special_tokens=add_special)
        bos_id = getattr(self.tokenizer, "bos_token_id", None)
        return ids[1:] if len(ids) > 1 and bos_id is not None and ids[0] == ids[1] == bos_id else ids

    def _encode_suffix(self, node: SequenceNode, prompt: str) -> list[int]:
        """Ids of what the new prompt adds. A terminator that the policy sampled itself is not added again."""
        suffix = prompt[len(node.full_text) + len(self._terminator(node)) :]
        ids: list[int] = self.tokenizer.encode(suffix, add_special_tokens=False)
        return ids

    def _terminator(self, node: SequenceNode) -> str:
        """Text of the sampled token that ended the last completion, where full_text leaves it out; else empty."""
        if node.masked_tokens[-1] == MASKED or self._text(node.tokens[-1:]):
            return ""
        text: str = self.tokenizer.decode(node.tokens[-1:], skip_special_tokens=False)
        return text

    def _grow(
        self, base: SequenceNode, prompt: str, prompt_ids: list[int], completion: TokenCompletion
    ) -> SequenceNode:
        added = len(prompt_ids) - len(base.tokens)
        node = SequenceNode(
            full_text=prompt + self._text(completion.token_ids),
            tokens=prompt_ids + completion.token_ids,
            masked_tokens=base.masked_tokens + [MASKED] * added + completion.token_ids,
            logprobs=base.logprobs + [UNSAMPLED_LOGPROB] * added + completion.logprobs,
            metadata={"finish_reason": completion.finish_reason},
            policy_versions=merge_runs([*base.policy_versions, (NOT_SAMPLED, added), *completion.versions]),
        )
        remember(
            node.tokens,
            Origin(logprobs=node.logprobs, versions=node.policy_versions, finish_reason=completion.finish_reason),
        )
        return node

    def _convert_messages_to_prompt(self, messages: Sequence[Any]) -> str:
        is_reply_wanted = not messages or messages[-1]["role"] != "assistant"
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=is_reply_wanted
        )
        return text

    def _text(self, token_ids: list[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def _server_tokenizer(server: TokenServer) -> Any:
    from atroposlib.envs.tokenizers import load_tokenizer

    name = server.config.tokenizer_name
    return load_tokenizer(server.config.model_name if name == "none" else name)


def _openai_finish_reason(completion: TokenCompletion) -> Any:
    return completion.finish_reason if completion.finish_reason in ("stop", "length", "content_filter") else "stop"


def _answer_id() -> str:
    return f"managed-{uuid.uuid4().hex}"
