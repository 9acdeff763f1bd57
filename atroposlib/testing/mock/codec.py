"""Text to token ids and back for the mock: the byte tokenizer in plain Python, or any real tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BYTE_EOS_ID = 2
_SPECIAL = re.compile("(" + "|".join(re.escape(token) for token in SPECIAL_TOKENS) + ")")
BYTE_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


class Codec(Protocol):
    """What the mock needs of a tokenizer."""

    eos_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids, with no special tokens added; those that the text spells out are recognised."""
        ...

    def decode(self, token_ids: Sequence[int], *, keep_special: bool = False) -> str:
        """The text."""
        ...

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """Ids of a chat, ready for the assistant's reply."""
        ...


@lru_cache(maxsize=1)
def byte_symbols() -> tuple[str, ...]:
    """For each of the 256 bytes the character that stands for it in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return tuple(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


class ByteCodec:
    """The same ids as byte_tokenizer(), without loading transformers."""

    eos_id = BYTE_EOS_ID
    vocab_size = BYTE_VOCAB_SIZE

    def __init__(self) -> None:
        order = sorted(range(256), key=lambda byte: byte_symbols()[byte])
        self._byte_of_id = {len(SPECIAL_TOKENS) + rank: byte for rank, byte in enumerate(order)}
        self._ids_of_bytes = bytes.maketrans(bytes(order), bytes(range(256)))

    def encode(self, text: str) -> list[int]:
        """Ids; special tokens spelt out in the text become one id."""
        ids: list[int] = []
        for part in _SPECIAL.split(text):
            if part in SPECIAL_TOKENS:
                ids.append(SPECIAL_TOKENS.index(part))
                continue
            # Some ids do not fit in a byte, so the table holds ranks.
            ranks = part.encode("utf-8", "surrogatepass").translate(self._ids_of_bytes)
            ids.extend(len(SPECIAL_TOKENS) + rank for rank in ranks)
        return ids

    def decode(self, token_ids: Sequence[int], *, keep_special: bool = False) -> str:
        """The text; ids outside the vocabulary become nothing."""
        parts: list[bytes] = []
        for token in token_ids:
            if token < len(SPECIAL_TOKENS):
                if keep_special and token >= 0:
                    parts.append(SPECIAL_TOKENS[token].encode())
            elif token in self._byte_of_id:
                parts.append(bytes([self._byte_of_id[token]]))
        return b"".join(parts).decode("utf-8", "replace")

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """ChatML, as byte_tokenizer() renders texts and tools; tool calls of earlier turns are left out."""
        given = (
            f"<|im_start|>system\n<tools>{json.dumps(tools, ensure_ascii=False)}</tools><|im_end|>\n" if tools else ""
        )
        chat = given + "".join(f"<|im_start|>{m.get('role')}\n{message_text(m)}<|im_end|>\n" for m in messages)
        return self.encode(chat + "<|im_start|>assistant\n")


class TokenizerCodec:
    """A real tokenizer, so that ids and lengths are those of the model it belongs to."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.eos_id = int(tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Ids, no special tokens added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int], *, keep_special: bool = False) -> str:
        """The text."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=not keep_special))

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """The tokenizer's own chat template."""
        plain = [{**message, "content": message_text(message)} for message in messages]
        given = {"tools": list(tools)} if tools else {}
        text = self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True, **given)
        return self.encode(text)


def message_text(message: dict[str, Any]) -> str:
    """The text of a message; parts that are no text leave a mark."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", f"<{part.get('type')}>")) for part in content)
