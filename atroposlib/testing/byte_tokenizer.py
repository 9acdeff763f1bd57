"""A tokenizer of bytes with a chat template, for tests: real tokenizer code, no download, one id a byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{{ tools | tojson }}</tools><|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] if message['content'] is not none else '' }}"
    "{% for call in message['tool_calls'] or [] %}"
    "<tool_call>{\"name\": {{ call['function']['name'] | tojson }}, "
    "\"arguments\": {{ call['function']['arguments'] if call['function']['arguments'] is string "
    "else call['function']['arguments'] | tojson }}}</tool_call>"
    "{% endfor %}<|im_end|>{% endgeneration %}"
    "{% elif message['content'] is string %}{{ message['content'] }}<|im_end|>"
    "{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<' + part['type'] + '>' }}{% endfor %}<|im_end|>"
    # An expression: the template engine drops a newline that follows a block.
    "{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with tools, tool calls, content parts, and the spans that return_assistant_tokens_mask asks for."""


def byte_tokenizer() -> Any:
    """Ids 0, 1, 2 are <|endoftext|>, <|im_start|> (BOS), <|im_end|> (EOS), then the 256 bytes; padding is <|endoftext|>.

    A transformers tokenizer in every respect: encode, decode, apply_chat_template with tools, save_pretrained.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *symbols])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_byte_tokenizer(folder: Path) -> str:
    """Save it as a model folder's tokenizer; returns the path for tokenizer_name."""
    byte_tokenizer().save_pretrained(folder)
    return str(folder)
