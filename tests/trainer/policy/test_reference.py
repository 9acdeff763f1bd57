"""The reference policy: which model it is, that it stays where it was, and how it moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.fakes import a_config, tiny_llama
from trainer.config.grpo import GRPOConfig
from trainer.policy import reference as module
from trainer.policy.loading import build_policy
from trainer.policy.logprobs import PackedPolicy
from trainer.policy.lora import LoraOptions
from trainer.policy.reference import AdapterOff, OwnCopy, own_policy, reference_of

CPU = torch.device("cpu")


def a_policy(seed: int = 0, **options: Any) -> PackedPolicy:
    return build_policy(tiny_llama(seed), logprob_chunk_size=4, **options)


def logits(policy: PackedPolicy) -> Tensor:
    with torch.no_grad():
        found: Tensor = policy.lm(input_ids=torch.tensor([[1, 2, 3]])).logits
    return found


def reference_for(config: GRPOConfig, policy: PackedPolicy, ref_model: Any = None) -> AdapterOff | OwnCopy | None:
    return reference_of(config, policy, own_policy(config, policy, ref_model), deepspeed_config=None)


def filled(value: float) -> PackedPolicy:
    """A policy whose weights are all one number."""
    policy = a_policy()
    for parameter in policy.parameters():
        parameter.data.fill_(value)
    return policy


def weights_of(policy: PackedPolicy) -> set[float]:
    return {value for parameter in policy.parameters() for value in torch.unique(parameter).tolist()}


def test_without_beta_there_is_no_reference_and_nothing_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load_named", "build_policy", "deepcopy"):
        monkeypatch.setattr(module, name, None)  # calling it would fail

    assert reference_for(a_config(tmp_path), a_policy(), ref_model=tiny_llama()) is None


def test_the_copy_stays_where_the_policy_was(tmp_path: Path) -> None:
    policy = a_policy()
    before = logits(policy)
    reference = reference_for(a_config(tmp_path, beta=0.1), policy)
    for parameter in policy.parameters():
        parameter.data.add_(1.0)

    assert reference is not None
    with reference.in_use(policy) as model:
        assert torch.equal(logits(model), before)
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_reference_of_its_own_may_be_given_as_a_model_or_by_name(tmp_path: Path) -> None:
    other = tiny_llama(7)
    other.save_pretrained(tmp_path / "other")
    expected = logits(a_policy(7))
    named = a_config(tmp_path, beta=0.1, ref_model_name_or_path=str(tmp_path / "other"))

    for reference in (
        reference_for(a_config(tmp_path, beta=0.1), a_policy(), other),
        reference_for(a_config(tmp_path, beta=0.1), a_policy(), str(tmp_path / "other")),
        reference_for(named, a_policy()),
    ):
        assert reference is not None
        with reference.in_use(None) as model:
            torch.testing.assert_close(logits(model), expected)


def test_with_an_adapter_the_reference_is_the_model_without_it(tmp_path: Path) -> None:
    before = logits(a_policy())
    policy = a_policy(lora=LoraOptions(2, 4.0, 0.0, None))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.5)
    with_adapter = logits(policy)
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]

    reference = reference_for(a_config(tmp_path, beta=0.1, use_peft=True), policy)

    assert isinstance(reference, AdapterOff)
    with reference.in_use(policy) as model:
        torch.testing.assert_close(logits(model), before)
    assert torch.equal(logits(policy), with_adapter)
    assert not torch.allclose(with_adapter, before)
    assert [name for name, parameter in policy.named_parameters() if parameter.requires_grad] == trained


def test_syncing_moves_the_reference_by_alpha() -> None:
    policy, reference = filled(1.0), filled(0.0)
    copy = OwnCopy(reference, device=CPU)

    for expected in (0.9, 0.99):
        copy.mix_in(policy, alpha=0.9)
        assert list(weights_of(reference)) == pytest.approx([expected])
    assert weights_of(policy) == {1.0}


def test_one_parameter_is_whole_at_a_time_however_many_are_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: dict[str, set[int]] = {"policy": set(), "reference": set()}
    most = Counter[str]()

    @contextmanager
    def counted(side: str, parameters: list[Tensor]) -> Iterator[None]:
        whole[side] |= {id(parameter) for parameter in parameters}
        most[side] = max(most[side], len(whole[side]))
        yield
        whole[side] -= {id(parameter) for parameter in parameters}

    monkeypatch.setattr(module, "whole", lambda parameters: counted("policy", parameters))
    monkeypatch.setattr(module, "_writable", lambda parameter: counted("reference", [parameter]))
    copy = OwnCopy(filled(0.0), device=CPU)

    copy.mix_in(filled(1.0), alpha=0.5)
    copy.save(tmp_path, is_writer=True)
    copy.load(tmp_path)

    assert most == {"policy": 1, "reference": 1}


def test_an_offloaded_copy_is_on_the_device_only_while_in_use() -> None:
    places: list[str] = []

    class Recorder(PackedPolicy):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            places.append(str(device))
            return self

    copy = OwnCopy(Recorder(tiny_llama(), chunk_size=1), device=torch.device("meta"), is_offloaded=True)
    assert places == []
    with copy.in_use(None):
        assert places == ["meta"]
    assert places == ["meta", "cpu"]


def test_a_moved_reference_is_saved_and_loaded(tmp_path: Path) -> None:
    moved = OwnCopy(filled(0.25), device=CPU)
    fresh = filled(0.0)

    moved.save(tmp_path, is_writer=True)
    OwnCopy(fresh, device=CPU).load(tmp_path)

    assert weights_of(fresh) == {0.25}
