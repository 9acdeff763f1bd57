"""`atropos up recipe=smoke_cpu` whole: every process is the real one, and only what the inference server answers is a MOCK."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from atroposlib.launch.jsonl import read_jsonl
from atroposlib.launch.mock_model import CONFIG, VOCABULARY, write_mock_model
from atroposlib.testing.byte_tokenizer import byte_tokenizer
from tests.launch.test_up import processes_of

ROOT = Path(__file__).parents[2]
DEADLINE_S = 300
"""It takes less than a minute on two cores that have nothing else to do."""


@pytest.mark.timeout(DEADLINE_S + 30)
def test_the_smoke_run_needs_nothing_and_trains(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "atroposlib.cli.main", "up", "recipe=smoke_cpu", f"runs_dir={tmp_path}"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "smoke_cpu"
    summary = json.loads((run / "summary.json").read_text())
    games = read_jsonl(run / "eval" / "before" / "samples.jsonl")
    assert (summary["steps"], summary["sequences_trained"]) == (2, 16)
    assert (summary["sequences_lost"], summary["sequences_repeated"]) == (0, 0)
    assert summary["heldout_reward_before"] == summary["heldout_reward_after"] > 0
    assert summary["heldout_change"]["items"] == len(games) == 24
    assert {(game["question"][:10], bool(game["gold_answer"])) for game in games} == {("I think of", True)}
    before, after = (load_file(folder / "model.safetensors") for folder in (run / "mock", run / "final"))
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    assert processes_of(tmp_path) == []


def test_the_mock_model_is_a_checkpoint_like_any_other(tmp_path: Path) -> None:
    write_mock_model(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)

    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    assert [key for key, found in loading.items() if found] == []
    assert len(tokenizer) == VOCABULARY == model.config.vocab_size
    assert tokenizer.eos_token_id == CONFIG["eos_token_id"]
    assert tokenizer.pad_token_id == CONFIG["pad_token_id"]
