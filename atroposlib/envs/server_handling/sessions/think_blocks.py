"""Keeps old assistant turns as they were sampled: chat templates strip think blocks and white space from them.

What must survive is hidden from the template behind marks and put back into the text that it makes.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_TAGS = re.compile("</?think>")
_OPENED = re.compile(r"<think>\s*(?:</think>\s*)?\Z")


def opened_think_block(prompt: str) -> str:
    """What a generation prompt begins of the reply itself: `<think>` with what follows it, or nothing."""
    opened = _OPENED.search(prompt)
    return opened.group() if opened else ""


@dataclass
class HiddenText:
    """What one call of a chat template must not see.

    Args:
        sampled: replies of this session, each with the think block that its prompt had opened. They are hidden whole, so
            that the template cannot trim them; of other assistant turns only the think tags are.
    """

    sampled: Mapping[str, str]
    _nonce: str = field(default_factory=lambda: secrets.token_hex(4))
    _hidden: list[str] = field(default_factory=list)

    def hide(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with marks in the place of what templates rewrite."""
        return [self._hide_in(message) if message.get("role") == "assistant" else message for message in messages]

    def restore(self, text: str) -> str:
        """The template's text with the hidden parts in it, and the think block that a reply's prompt had opened."""
        pieces: list[str] = []
        end = 0
        for mark in re.finditer(f"\x02{self._nonce}:(\\d+)\x03", text):
            hidden = self._hidden[int(mark.group(1))]
            before, opened = text[end : mark.start()], self.sampled.get(hidden, "")
            pieces += [before, "" if before.endswith(opened) else opened, hidden]
            end = mark.end()
        return "".join([*pieces, text[end:]])

    def _hide_in(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, str):
            # White space alone would be a turn that templates take for empty.
            is_whole = content in self.sampled and content.strip()
            return {**message, "content": self._mark(content) if is_whole else self._hide_tags(content)}
        if isinstance(content, list):
            return {**message, "content": [self._hide_in_part(part) for part in content]}
        return message

    def _hide_in_part(self, part: Any) -> Any:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            return {**part, "text": self._hide_tags(part["text"])}
        return part

    def _hide_tags(self, text: str) -> str:
        return _TAGS.sub(lambda tag: self._mark(tag.group()), text)

    def _mark(self, text: str) -> str:
        self._hidden.append(text)
        return f"\x02{self._nonce}:{len(self._hidden) - 1}\x03"
