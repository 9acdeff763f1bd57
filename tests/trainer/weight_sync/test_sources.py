"""Where weights come from: names, ties, adapters, and what ZeRO-3 splits (there also tests/trainer/test_ranks.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from atroposlib.errors import ConfigError
from tests.trainer.fakes import tiny_llama
from trainer.policy.loading import build_policy
from trainer.policy.logprobs import PackedPolicy
from trainer.policy.lora import LoraOptions, adapter_config, add_adapter, load_adapter, save_adapter
from trainer.weight_sync.sources import (
    ModuleSource,
    PartitionedSource,
    Piece,
    adapter_pieces,
    checkpoint_pieces,
    in_buckets,
    weight_source,
)

OPTIONS = LoraOptions(r=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "down_proj"))


class Wrapper(nn.Module):
    """FAKE of what DDP and DeepSpeed have in common."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def an_adapted_llama() -> Any:
    """With an adapter that is not the zero that fresh ones are."""
    lm = tiny_llama()
    add_adapter(lm, OPTIONS)
    torch.manual_seed(1)
    for name, parameter in lm.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return lm


def a_policy(lm: Any) -> PackedPolicy:
    return PackedPolicy(lm, chunk_size=4)


def gathered(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    weights = weight_source(model, is_rank_0=True, **options).gather()
    assert weights is not None
    return {name: tensor.clone() for name, tensor in weights}


@torch.no_grad()
def logits_of(lm: Any) -> Tensor:
    logits: Tensor = lm(input_ids=torch.tensor([[1, 2, 3]])).logits
    return logits


def in_folder(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("wrap", [lambda policy: policy, Wrapper, torch.compile], ids=["plain", "ddp", "compiled"])
def test_names_and_tensors_are_those_of_a_saved_checkpoint(tmp_path: Path, tie: bool, wrap: Any) -> None:
    lm = tiny_llama(tie=tie)
    lm.save_pretrained(tmp_path)

    found, saved = gathered(wrap(a_policy(lm))), in_folder(tmp_path)

    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert ("lm_head.weight" in found) is not tie


def test_other_ranks_get_nothing() -> None:
    assert weight_source(a_policy(tiny_llama()), is_rank_0=False).gather() is None


def test_weights_can_be_gone_through_again_and_follow_the_model() -> None:
    lm = tiny_llama()
    weights = weight_source(a_policy(lm), is_rank_0=True).gather()
    assert weights is not None
    before = {name: tensor.clone() for name, tensor in weights}

    with torch.no_grad():
        lm.model.norm.weight.add_(1.0)

    after = dict(weights)
    assert after.keys() == before.keys()
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"] + 1)
    assert not any(tensor.requires_grad for tensor in after.values())


def test_nothing_is_copied_of_a_whole_model() -> None:
    lm = tiny_llama()

    weights = dict(weight_source(a_policy(lm), is_rank_0=True).gather() or ())

    assert weights["model.norm.weight"].data_ptr() == lm.model.norm.weight.data_ptr()


def test_an_adapter_is_merged_under_the_names_of_the_model() -> None:
    lm = an_adapted_llama()
    plain = tiny_llama()

    merged = gathered(a_policy(lm))
    missing, unexpected = plain.load_state_dict(merged, strict=False)

    assert (set(missing) - {"lm_head.weight"}, unexpected) == (set(), [])
    torch.testing.assert_close(logits_of(plain), logits_of(lm), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits_of(plain), logits_of(tiny_llama()), atol=1e-3)


def test_a_model_in_pefts_own_wrapper_gives_the_same_names() -> None:
    lm = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))

    assert gathered(a_policy(lm)).keys() == gathered(a_policy(tiny_llama())).keys()
    assert gathered(lm, adapter_only=True).keys() == gathered(an_adapted_llama(), adapter_only=True).keys()


def test_the_adapter_alone_has_the_names_of_a_peft_folder(tmp_path: Path) -> None:
    lm = an_adapted_llama()
    reference = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    reference.save_pretrained(str(tmp_path))

    found = gathered(a_policy(lm), adapter_only=True)

    assert found.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()


def test_peft_reads_the_adapter_that_is_saved(tmp_path: Path) -> None:
    lm = an_adapted_llama()

    save_adapter(lm, tmp_path, gathered(a_policy(lm), adapter_only=True).items())

    read = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    torch.testing.assert_close(logits_of(read), logits_of(lm))
    assert adapter_config(lm)["target_modules"] == ["down_proj", "q_proj"]


def test_a_saved_adapter_goes_on_training_from_where_it_was(tmp_path: Path) -> None:
    lm = an_adapted_llama()
    save_adapter(lm, tmp_path, gathered(a_policy(lm), adapter_only=True).items())
    fresh = tiny_llama()
    add_adapter(fresh, OPTIONS)

    load_adapter(fresh, tmp_path)

    torch.testing.assert_close(logits_of(fresh), logits_of(lm))
    assert all(parameter.requires_grad for name, parameter in fresh.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize(
    "other",
    [LoraOptions(8, 8.0, 0.0, ("q_proj", "down_proj")), LoraOptions(4, 8.0, 0.0, ("q_proj",)),
     LoraOptions(4, 8.0, 0.0, ("q_proj", "down_proj", "up_proj"))],
    ids=["rank", "fewer", "more"],
)  # fmt: skip
def test_an_adapter_of_another_shape_is_refused(tmp_path: Path, other: LoraOptions) -> None:
    lm = an_adapted_llama()
    save_adapter(lm, tmp_path, gathered(a_policy(lm), adapter_only=True).items())
    fresh = tiny_llama()
    add_adapter(fresh, other)

    with pytest.raises(ConfigError, match="holds another adapter than"):
        load_adapter(fresh, tmp_path)


def test_only_the_adapter_is_trained_and_in_float32() -> None:
    lm = tiny_llama().to(torch.bfloat16)

    add_adapter(lm, LoraOptions(r=4, alpha=8.0, dropout=0.0, target_modules=None))

    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert len(trained) == 2 * 7 * 2  # two factors for seven linear layers of two blocks, not for the output layer


def test_a_layer_that_the_model_has_not_is_named() -> None:
    with pytest.raises(ConfigError, match=r"lora_target_modules: c_attn occurs nowhere .* are down_proj, gate_proj"):
        build_policy(tiny_llama(), logprob_chunk_size=4, lora=LoraOptions(4, 8.0, 0.0, ("c_attn", "q_proj")))


# Split models: what can be seen without a second process


def pieces_of(model: Any) -> list[Piece]:
    return list(checkpoint_pieces(model))


def test_staging_converts_copies_and_is_valid_when_the_model_has_moved_on() -> None:
    lm = tiny_llama()
    source = PartitionedSource(pieces_of(lm), is_rank_0=True, dtype=torch.bfloat16, bucket_numel=100)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in gathered(lm).items()}

    weights = source.gather()
    with torch.no_grad():
        lm.model.norm.weight.add_(1.0)

    assert weights is not None
    assert {name: tensor.dtype for name, tensor in weights} == dict.fromkeys(expected, torch.bfloat16)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights)


def test_gathering_again_gives_the_new_weights_in_the_same_memory() -> None:
    lm = tiny_llama()
    source = PartitionedSource(pieces_of(lm), is_rank_0=True)
    first = dict(source.gather() or ())
    with torch.no_grad():
        lm.model.norm.weight.add_(1.0)

    second = dict(source.gather() or ())

    assert torch.equal(second["model.norm.weight"], lm.model.norm.weight)
    assert {name: t.data_ptr() for name, t in first.items()} == {name: t.data_ptr() for name, t in second.items()}


def test_staging_happens_on_rank_0_alone() -> None:
    def never() -> Tensor:
        raise AssertionError("made on another rank")

    pieces = [Piece("x", (nn.Parameter(torch.ones(1)),), never)]

    assert PartitionedSource(pieces, is_rank_0=False).gather() is None
    assert ModuleSource(pieces, is_rank_0=False).gather() is None


@given(sizes=st.lists(st.integers(0, 9), max_size=12), limit=st.integers(1, 12))
def test_buckets_keep_all_pieces_in_order_and_overfill_for_one_piece_only(sizes: list[int], limit: int) -> None:
    pieces = [Piece(str(i), (nn.Parameter(torch.zeros(size)),), lambda: torch.zeros(0)) for i, size in enumerate(sizes)]

    buckets = list(in_buckets(pieces, limit=limit))

    assert [piece for bucket in buckets for piece in bucket] == pieces
    assert all(len(bucket) == 1 or sum(piece.numel for piece in bucket) <= limit for bucket in buckets)
    assert all(buckets)


def test_a_merged_weight_is_gathered_with_both_factors() -> None:
    merged = next(piece for piece in checkpoint_pieces(an_adapted_llama()) if piece.name.endswith("q_proj.weight"))

    assert len(merged.parameters) == 3
    assert all(
        ".base_layer" not in piece.name and ".lora_" not in piece.name for piece in pieces_of(an_adapted_llama())
    )
    assert all(len(piece.parameters) == 1 for piece in adapter_pieces(an_adapted_llama()))


def test_the_adapters_folder_says_which_model_it_is_for(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path)

    add_adapter(lm, OPTIONS)

    assert adapter_config(lm)["base_model_name_or_path"] == str(tmp_path)
