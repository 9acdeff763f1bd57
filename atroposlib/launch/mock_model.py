"""A tiny random Llama over bytes, written without torch: what `model: mock` trains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VOCABULARY = 259
"""Ids of the tokenizer of bytes that `atropos mock-inference` saves."""
HIDDEN, MLP, LAYERS, HEADS, KV_HEADS = 64, 128, 2, 4, 2
SEED, SPREAD = 0, 0.02

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_mock_model(folder: Path) -> None:
    """Write config and weights of a checkpoint, always the same; its tokenizer is the mock inference server's to save."""
    kv = HIDDEN // HEADS * KV_HEADS
    matrices = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
    }
    layers = [f"model.layers.{number}" for number in range(LAYERS)]
    shapes = {f"{layer}.{name}.weight": shape for layer in layers for name, shape in matrices.items()}
    norms = [f"{layer}.{name}" for layer in layers for name in ("input_layernorm", "post_attention_layernorm")]
    generator = np.random.default_rng(SEED)
    tensors = {
        name: generator.normal(0.0, SPREAD, shape).astype(np.float32)
        for name, shape in {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), **shapes}.items()
    }
    tensors |= {f"{name}.weight": np.ones(HIDDEN, np.float32) for name in [*norms, "model.norm"]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2), encoding="utf-8")
