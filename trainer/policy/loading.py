"""Load the policy, check that it can be trained here, and save it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from atroposlib.errors import ConfigError
from trainer.policy.attention import SHARES_PROMPTS
from trainer.policy.logprobs import PackedPolicy
from trainer.policy.lora import LoraOptions, add_adapter, save_adapter
from trainer.weight_sync.sources import has_adapter, is_partitioned
from trainer.weight_sync.transports.base import NamedWeights

log = logging.getLogger(__name__)


def load_policy(
    model_name_or_path: str,
    *,
    torch_dtype: str,
    attn_implementation: str,
    trust_remote_code: bool,
    logprob_chunk_size: int,
    lora: LoraOptions | None = None,
    quantization: Any = None,
    prepare: Callable[[Any], None] | None = None,
) -> PackedPolicy:
    """Load a causal language model for training.

    While a DeepSpeed configuration of stage 3 is alive, transformers splits the weights over the ranks as it loads them.

    Args:
        torch_dtype: of the weights that the optimizer updates: float32, bfloat16.
        logprob_chunk_size: see PackedPolicy.
        lora: train an adapter, not these weights.
        quantization: a quantization_config of transformers; None for whole weights.
        prepare: changes the model that was loaded in place.
    Raises:
        ConfigError: there is no such model, or its logprobs cannot be computed here.
    """
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            model_name_or_path,
            dtype=getattr(torch, torch_dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            quantization_config=quantization,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"cannot load model_name_or_path={model_name_or_path!r}: {str(error).splitlines()[0]}\n"
            "hint: give a folder with config.json and model.safetensors, or the id of a model on the Hub"
        ) from error
    if prepare is not None:
        prepare(lm)
    return build_policy(lm, logprob_chunk_size=logprob_chunk_size, lora=lora)


def build_policy(lm: Any, *, logprob_chunk_size: int, lora: LoraOptions | None = None) -> PackedPolicy:
    """Make a model that is already in memory trainable: no dropout, and logprobs that agree with its own logits.

    Raises:
        ConfigError: the model does something to its logits after the output layer, or has not the layers that lora names.
    """
    _disable_dropout(lm)
    policy = PackedPolicy(lm, chunk_size=logprob_chunk_size)
    # Split weights come together only in an engine: prepare_partitioned checks then.
    if not is_partitioned(lm):
        _check_logprobs(policy, lm.device)
    if lora is not None:
        add_adapter(lm, lora)
    return policy


def positions_of(text_config: Any) -> int | None:
    """Positions that a model can tell apart; None where its configuration does not say.

    Some kinds of scaled rotary embeddings (RoPE) reach beyond max_position_embeddings, others are counted in it already.
    """
    positions = int(getattr(text_config, "max_position_embeddings", None) or 0)
    scaling = getattr(text_config, "rope_parameters", None) or {}
    if scaling.get("rope_type") in ("llama3", "longrope"):
        return positions or None
    # What was scaled is the length of the first training, where the configuration names it.
    unscaled = scaling.get("original_max_position_embeddings") or positions
    return max(positions, int(unscaled * float(scaling.get("factor") or 1.0))) or None


def prepare_partitioned(policy: PackedPolicy, device: torch.device) -> None:
    """Make a policy that ZeRO-3 has split ready for passes that differ from rank to rank. Every rank calls this.

    ZeRO-3 gathers weights as modules are called, and every rank must call the same ones. How often the output layer is
    called is a matter of how many tokens a rank scores. So it is gathered with the policy itself, which is called once a
    pass, and its own calls go unseen.

    Raises:
        ConfigError: as build_policy.
    """
    import deepspeed

    _check_logprobs(policy, device)
    head = policy.lm.get_output_embeddings()
    unseen = _UnseenLinear(head.in_features, head.out_features, bias=False, device="meta")
    unseen.weight, unseen.bias = head.weight, head.bias
    policy.lm.set_output_embeddings(unseen)
    for parameter in unseen.parameters():
        deepspeed.zero.register_external_parameter(policy, parameter)


class _UnseenLinear(nn.Linear):
    """A linear layer without hooks."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward(*args, **kwargs)


class PolicySaver:
    """Writes plain Hugging Face folders: the weights under the model's own names, and its tokenizer.

    Args:
        tokenizer_name_or_path: where the tokenizer comes from; None for none.
    """

    def __init__(self, tokenizer_name_or_path: str | None, *, trust_remote_code: bool = False) -> None:
        self.tokenizer: Any = None
        """None where there is none to be found."""
        if tokenizer_name_or_path is None:
            return
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_name_or_path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError):
            log.warning("no tokenizer in %s: checkpoints will have none either", tokenizer_name_or_path)

    def save(self, policy: PackedPolicy, folder: Path, weights: NamedWeights) -> None:
        """Write the folder; AutoModelForCausalLM.from_pretrained loads it.

        Args:
            weights: whole: of the adapter if there is one, else of the model.
        """
        if has_adapter(policy.lm):
            save_adapter(policy.lm, folder, weights)
        else:
            policy.lm.save_pretrained(folder, state_dict={**_saved_buffers(policy.lm), **dict(weights)})
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def _saved_buffers(lm: Any) -> dict[str, Tensor]:
    kept = lm.state_dict().keys()
    return {name: buffer for name, buffer in lm.named_buffers() if name in kept}


def _disable_dropout(lm: Any) -> None:
    # The engine samples without dropout; training with it would compare two different policies.
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


@torch.no_grad()
def _check_logprobs(policy: PackedPolicy, device: torch.device) -> None:
    lm = policy.lm
    ids_1T = torch.arange(1, 9, device=device)[None] % lm.config.vocab_size
    positions_1T = torch.arange(8, device=device)[None]
    was_training, kind = lm.training, lm.config._attn_implementation
    lm.eval()
    if kind not in SHARES_PROMPTS:
        # Flash kernels compute only where and as training will; what is compared here is the output layer.
        lm.set_attn_implementation("sdpa")
    own_logits_TV = lm(input_ids=ids_1T, position_ids=positions_1T, use_cache=False).logits[0].float()
    expected_M = own_logits_TV.log_softmax(-1)[torch.arange(7), ids_1T[0, 1:]]
    segments_1T = torch.zeros_like(ids_1T)
    found_M, _ = policy(
        ids_1T,
        positions_1T,
        segments_1T,
        segments_1T,
        positions_1T[0, :7],
        ids_1T[0, 1:],
        torch.ones(7, device=device),
    )
    lm.train(was_training)
    if kind not in SHARES_PROMPTS:
        lm.set_attn_implementation(kind)
    difference = float((expected_M - found_M).abs().max())
    if difference > (1e-3 if lm.dtype == torch.float32 else 0.05):
        raise ConfigError(
            f"model type {lm.config.model_type!r} changes its logits after the output layer (logprobs differ by "
            f"{difference:.2g} nats), for example by soft-capping or scaling; this trainer does not support that yet"
        )
