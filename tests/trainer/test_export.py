"""Exported checkpoints are plain model folders with the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from atroposlib.errors import ConfigError
from tests.trainer.fakes import tiny_llama
from trainer.export import export, main
from trainer.policy.lora import LoraOptions, add_adapter, save_adapter

IDS = torch.tensor([[1, 5, 9, 2]])


@torch.no_grad()
def logits(lm: Any) -> torch.Tensor:
    output: torch.Tensor = lm.eval()(input_ids=IDS).logits
    return output.float()


def test_a_checkpoint_becomes_a_folder_of_the_asked_precision(tmp_path: Path) -> None:
    lm = tiny_llama()
    lm.save_pretrained(tmp_path / "final")

    folder = export(tmp_path / "final", tmp_path / "out", dtype="bfloat16")

    found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(logits(found), logits(lm), atol=0.02, rtol=0.02)
    assert not (tmp_path / "out.partial").exists()


def test_an_adapter_is_merged_into_its_model(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(lm)
    add_adapter(lm, LoraOptions(r=2, alpha=4.0, dropout=0.0, target_modules=None))
    weights = {}
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
            weights[f"base_model.model.{name.replace(f'.{_adapter(name)}.', '.')}"] = parameter.detach()
    save_adapter(lm, tmp_path / "final", weights.items())

    found = AutoModelForCausalLM.from_pretrained(export(tmp_path / "final", tmp_path / "out"))

    assert not any("lora" in name for name, _ in found.named_parameters())
    assert (logits(lm) - before).abs().max() > 0.01
    torch.testing.assert_close(logits(found), logits(lm), atol=1e-4, rtol=1e-4)


def test_a_model_of_an_adapter_that_is_gone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))

    assert main([str(tmp_path), str(tmp_path / "out")]) == 2

    error = capsys.readouterr().err
    assert f"cannot load {tmp_path / 'base'}, the adapter's model" in error
    assert "give --base-model FOLDER" in error


def _adapter(name: str) -> str:
    """The adapter's name in a parameter's name, which peft leaves out in its files."""
    return name.split(".")[-2]


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()

    assert main([str(tmp_path), str(tmp_path / "out")]) == 2

    assert "exists already" in capsys.readouterr().err


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no model"):
        export(tmp_path, tmp_path / "out")

    assert not (tmp_path / "out").exists()
