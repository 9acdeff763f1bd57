"""Small models, tokenizers and rows that tests of the trainers on data sets share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from atroposlib.testing.byte_tokenizer import byte_tokenizer
from trainer.supervised.config import GKDConfig, SFTConfig

ROWS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word * times}]}
    for word, times in [("ab", 1), ("cd", 3), ("e", 2), ("fgh", 2), ("i", 5), ("jk", 1), ("l", 4), ("mn", 2)]
]
HELD_OUT = [
    {
        "messages": [{"role": "user", "content": "say z"}, {"role": "assistant", "content": "zz"}],
        "final_answer": "zz",
    },
    {
        "messages": [{"role": "user", "content": "say y"}, {"role": "assistant", "content": "y"}],
        "final_answer": "y",
    },
]


def tiny_model(seed: int = 0, *, vocabulary: int = 259, hidden: int = 16, layers: int = 2) -> Any:
    """A random Llama for the byte tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def tokenizer() -> Any:
    return byte_tokenizer()


_DEFAULTS: dict[str, Any] = {
    "model_name_or_path": "test/tiny",
    "batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "save_strategy": "no",
    "max_seq_length": 128,
    "logprob_chunk_size": 5,
    "optim": "adamw_torch",
    "disable_tqdm": True,
}


def sft_config(run_dir: Path, **options: Any) -> SFTConfig:
    return SFTConfig(run_dir=str(run_dir), **{**_DEFAULTS, **options})


def gkd_config(run_dir: Path, **options: Any) -> GKDConfig:
    defaults = {
        "teacher_model_name_or_path": "test/teacher",
        "max_new_tokens": 6,
        "lmbda": 0.0,
        "eval_strategy": "no",
        "weight_decay": 0.0,
    }
    return GKDConfig(run_dir=str(run_dir), **{**_DEFAULTS, **defaults, **options})
