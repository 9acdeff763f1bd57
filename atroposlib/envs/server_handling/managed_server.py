"""Token-exact sessions: a conversation is one growing sequence of the very ids that the engine sampled."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atroposlib.envs.server_handling.engines.samples import TokenCompletion, TokenSamples
from atroposlib.envs.server_handling.sessions.chat_messages import has_reply, plain_messages, with_parsed_arguments
from atroposlib.envs.server_handling.sessions.dummy_managed_server import DummyManagedServer
from atroposlib.envs.server_handling.sessions.managed_server_adapter import ManagedServerAdapter
from atroposlib.envs.server_handling.sessions.prompt_tokens import Prompt, prompt_ids, server_tokenizer
from atroposlib.envs.server_handling.sessions.provenance import Origin, remember
from atroposlib.envs.server_handling.sessions.reply_text import reply_text
from atroposlib.envs.server_handling.sessions.sequence_node import EMPTY, UNSAMPLED_LOGPROB, SequenceNode, grow
from atroposlib.envs.server_handling.sessions.session_tree import node_to_extend, place
from atroposlib.envs.server_handling.sessions.think_blocks import HiddenText, opened_think_block
from atroposlib.envs.server_handling.sessions.token_source import TokenServer, sample_tokens
from atroposlib.envs.server_handling.tool_call_translator import ToolCallTranslator, call_as_dict
from atroposlib.errors import ConfigError

if TYPE_CHECKING:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

__all__ = [
    "UNSAMPLED_LOGPROB",
    "DummyManagedServer",
    "ManagedServer",
    "ManagedServerAdapter",
    "SequenceNode",
    "TokenServer",
]

log = logging.getLogger(__name__)

DEBUG_REQUESTS = "ATROPOS_DEBUG_REQUESTS"


@dataclass(frozen=True)
class Reply:
    """One completion of a session."""

    node: SequenceNode
    """The sequence that it made or extended."""
    text: str
    """Without prompt, prefill and the special token that ended it."""
    finish_reason: str


class ManagedServer:
    """One session; use it through ``ServerManager.managed_server()``.

    A prompt whose text begins with an earlier sequence's text extends that sequence: its ids stay as sampled, only the
    new text is tokenised. Any other prompt starts a new sequence; one that holds earlier replies, and one of a text
    completion, is counted in `segments_restarted` when the session already had a sequence.

    Args:
        server: has `sample_tokens`, or upstream's `tokens_and_logprobs_completion`.
        tokenizer: default: the server's, else that of its model.
        track_tree: keep every sequence, by its text, in `sequences`; else an extended one is replaced in `current_nodes`.
        tool_parser: format of the model's tool calls; without it `tools` is ignored.
        preserve_think_blocks: show think blocks of earlier replies to the chat template, which may strip them. By
            default they are hidden from it and always survive.
    """

    def __init__(
        self,
        server: Any,
        tokenizer: Any = None,
        track_tree: bool = False,
        tool_parser: str | None = None,
        preserve_think_blocks: bool = False,
    ) -> None:
        self.server = server
        self.tokenizer = tokenizer if tokenizer is not None else server_tokenizer(server)
        self.track_tree = track_tree
        self.preserve_think_blocks = preserve_think_blocks
        self.current_nodes: list[SequenceNode] = []
        self.sequences: dict[str, SequenceNode] = {}
        self.segments_restarted = 0
        self._tool_parser_name = tool_parser
        self._translator: ToolCallTranslator | None = None
        self._starts: set[str] = set()
        self._claimed: list[int] = []
        self._sampled_replies: dict[str, str] = {}

    @property
    def broken_tool_calls(self) -> int:
        """Replies of this session that began a tool call and broke its format; they stayed text."""
        return 0 if self._translator is None else self._translator.broken_replies

    async def chat_completion(self, **kwargs: Any) -> ChatCompletion:
        """Chat; the answer is the openai package's object, its choices in the order of the new nodes.

        Tool calls are plain dicts in `message.tool_calls`.

        Raises:
            NotImplementedError: the server does not return token ids.
            RolloutError: the server failed.
        """
        from atroposlib.envs.server_handling.sessions.openai_answers import chat_answer, chat_choice

        tool_choice, tools = kwargs.pop("tool_choice", None), kwargs.pop("tools", None)
        prompt = self._chat_prompt(kwargs.pop("messages"), tools=tools, tool_choice=tool_choice)
        replies = await self._sample(prompt, **kwargs)
        choices = []
        for index, reply in enumerate(replies):
            content, calls, finish_reason = self._parsed(reply, prompt, tools, tool_choice)
            choices.append(chat_choice(index, content, calls, finish_reason))
        return chat_answer(choices, self._model_name)

    async def completion(self, **kwargs: Any) -> Completion:
        """Continue a text; the answer is the openai package's object, its choices in the order of the new nodes."""
        from atroposlib.envs.server_handling.sessions.openai_answers import completion_answer

        kwargs.pop("tools", None), kwargs.pop("tool_choice", None)
        replies = await self._sample(Prompt(kwargs.pop("prompt")), **kwargs)
        return completion_answer(
            [reply.text for reply in replies], [reply.finish_reason for reply in replies], self._model_name
        )

    async def sample_replies(self, *, messages: Sequence[Any], prefill: str = "", **sampling: Any) -> list[Reply]:
        """Sample replies to a chat: for callers who want texts and tokens, not the openai package's objects.

        Args:
            prefill: text that every reply is made to begin with; it belongs to the prompt, so it is not trained.
        """
        tool_choice, tools = sampling.pop("tool_choice", None), sampling.pop("tools", None)
        prompt = self._chat_prompt(messages, tools=tools, tool_choice=tool_choice, prefill=prefill)
        return await self._sample(prompt, **sampling)

    async def get_logprobs(self, **kwargs: Any) -> dict[str, Any]:
        """The server's logprobs of given `messages`, `prompt` or `input_ids`; it keeps no node.

        Raises:
            NotImplementedError: the server cannot do it.
        """
        if not hasattr(self.server, "get_logprobs"):
            raise NotImplementedError(f"{type(self.server).__name__} does not implement get_logprobs")
        if (messages := kwargs.pop("messages", None)) is not None:
            kwargs["prompt"], kwargs["input_ids"] = self.render(messages)
        answer: dict[str, Any] = await self.server.get_logprobs(**kwargs)
        return answer

    def render(self, messages: Sequence[Any], tools: Any = None) -> tuple[str, list[int]]:
        """Text and ids of the prompt that these messages would be sampled from now; it keeps no node."""
        prompt = self._chat_prompt(messages, tools=tools, tool_choice=None)
        return prompt.text, prompt_ids(self._tokens_and_text, self._node_to_extend(prompt.text) or EMPTY, prompt)

    def get_state(self) -> dict[str, Any]:
        """`nodes` in the order of the choices; with track_tree `sequences` by their text, also as `tree`."""
        if self.track_tree:
            return {"sequences": dict(self.sequences), "tree": dict(self.sequences)}
        return {"nodes": list(self.current_nodes)}

    def reset(self) -> None:
        """Forget the session; lists handed out before stay valid."""
        self.current_nodes = []
        self.sequences = {}
        self._starts = set()
        self._sampled_replies = {}

    # Prompts

    def _chat_prompt(self, messages: Sequence[Any], *, tools: Any, tool_choice: Any, prefill: str = "") -> Prompt:
        messages = plain_messages(messages)
        is_calling = bool(tools) and self._get_translator() is not None
        if tools and not is_calling:
            log.warning("tools are ignored: this session has no tool_parser")
        offered = {"tools": tools} if is_calling else {}
        return Prompt(
            text=self._convert_messages_to_prompt(messages, **offered) + prefill,
            is_chat=True,
            keep_special=is_calling and tool_choice != "none",
            has_reply=has_reply(messages),
            prefill=prefill,
        )

    def _convert_messages_to_prompt(self, messages: Sequence[Any], tools: Any = None) -> str:
        from jinja2 import TemplateError

        messages = plain_messages(messages)
        translator = self._get_translator()
        if translator is None:
            return self._render(messages, tools)
        try:
            return self._render(translator.convert_messages_for_template(messages), tools)
        except TemplateError:
            # Mistral's, for one, insists on tool calls before tool answers. What it writes of them is not what was
            # sampled, so a new segment starts, but the rollout goes on.
            return self._render([with_parsed_arguments(message) for message in messages], tools)

    def _render(self, messages: list[dict[str, Any]], tools: Any) -> str:
        if self.preserve_think_blocks:
            return self._apply_template(messages, tools)
        hidden = HiddenText(self._sampled_replies)
        return hidden.restore(self._apply_template(hidden.hide(messages), tools))

    def _apply_template(self, messages: list[dict[str, Any]], tools: Any) -> str:
        is_reply_wanted = not messages or messages[-1]["role"] != "assistant"
        with_tools = {"tools": tools} if tools else {}
        text: str = self._tokens_and_text.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_reply_wanted, **with_tools
        )
        return text

    @property
    def _tokens_and_text(self) -> Any:
        if self.tokenizer is None:
            raise ConfigError("a managed server needs a tokenizer: pass tokenizer=, or set openai.tokenizer_name")
        return self.tokenizer

    # Sampling

    async def _sample(self, prompt: Prompt, **sampling: Any) -> list[Reply]:
        base = self._node_to_extend(prompt.text)
        input_ids = prompt_ids(self._tokens_and_text, base or EMPTY, prompt)
        with self._claim(base):
            samples = await sample_tokens(self.server, prompt=prompt.text, input_ids=input_ids, **sampling)
        if base is not None and samples.prompt_ids[: len(base.tokens)] != base.tokens:
            # The server did not sample from the ids that it was given.
            base = None
        if base is None:
            self._count_start(prompt)
        replies = [self._reply(base or EMPTY, prompt, samples, completion) for completion in samples.completions]
        self._keep(base, [reply.node for reply in replies])
        self._log_request(prompt, base, replies)
        return replies

    def _node_to_extend(self, prompt: str) -> SequenceNode | None:
        nodes = self.sequences.values() if self.track_tree else self.current_nodes
        return node_to_extend(nodes, prompt, claimed=self._claimed)

    @contextmanager
    def _claim(self, node: SequenceNode | None) -> Iterator[None]:
        if node is None:
            yield
            return
        self._claimed.append(id(node))
        try:
            yield
        finally:
            self._claimed.remove(id(node))

    def _count_start(self, prompt: Prompt) -> None:
        is_fresh = not prompt.has_reply or prompt.text in self._starts
        self.segments_restarted += bool(self.current_nodes or self.sequences) and not is_fresh
        self._starts.add(prompt.text)

    def _reply(self, base: SequenceNode, prompt: Prompt, samples: TokenSamples, completion: TokenCompletion) -> Reply:
        reply = reply_text(self._tokens_and_text, completion, keep_special=prompt.keep_special)
        node = grow(
            base,
            samples.prompt_ids,
            completion,
            full_text=prompt.text + reply.text,
            terminator=reply.terminator,
        )
        remember(node.tokens, Origin(node.logprobs, node.policy_versions, completion.finish_reason))
        if prompt.is_chat:
            rendered = prompt.text.removesuffix(prompt.prefill)
            self._sampled_replies[prompt.prefill + reply.text] = opened_think_block(rendered)
        return Reply(node, reply.text, completion.finish_reason)

    def _keep(self, base: SequenceNode | None, nodes: list[SequenceNode]) -> None:
        if self.track_tree:
            self.sequences.update((node.full_text, node) for node in nodes)
        else:
            place(self.current_nodes, base, nodes)

    def _log_request(self, prompt: Prompt, base: SequenceNode | None, replies: list[Reply]) -> None:
        if os.environ.get(DEBUG_REQUESTS) == "1":
            log.info(
                "managed request: extends=%s prompt=%r replies=%r",
                base is not None,
                prompt.text,
                [(reply.finish_reason, reply.text) for reply in replies],
            )

    # Tools

    def _get_translator(self) -> ToolCallTranslator | None:
        """The translator of this session's tool_parser, made at first use; None without one."""
        if self._translator is None and self._tool_parser_name is not None:
            self._translator = ToolCallTranslator(self.tokenizer, self._tool_parser_name)
        return self._translator

    def _parsed(
        self, reply: Reply, prompt: Prompt, tools: Any, tool_choice: Any
    ) -> tuple[str | None, list[dict[str, Any]] | None, str]:
        translator = self._get_translator()
        if translator is None or not prompt.keep_special:
            return reply.text, None, reply.finish_reason
        content, calls, _ = translator.parse_model_output(reply.text, tool_choice=tool_choice, tools=tools)
        if not calls:
            return content, None, reply.finish_reason
        # A reply that was cut says so, whatever calls it holds.
        finish_reason = reply.finish_reason if reply.finish_reason == "length" else "tool_calls"
        return content, [call_as_dict(call) for call in calls], finish_reason

    @property
    def _model_name(self) -> str:
        return str(getattr(getattr(self.server, "config", None), "model_name", "unknown"))
