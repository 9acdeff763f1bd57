"""TRL's loss and gradient norms on a small batch, for tests/trainer/test_trl_losses.py to compare ours with.

python -m benchmarks.trainer_losses    writes tests/trainer/golden/trl_losses.json
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import peer_python
from tests.trainer.fakes import VOCABULARY
from tests.trainer.mixed_batch import sharp_llama
from tests.trainer.plain_reference import logprobs_of

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "trainer" / "golden" / "trl_losses.json"
TIMEOUT_S = 280.0

EOS = VOCABULARY - 1
GROUP_SIZE = 4
COMPLETIONS = ((1, 9, 4, 6), (7, 3, 12, 2))
PROMPTS = (5, 2)
REWARDS = ((1.0, 0.0, 0.25, 0.5), (0.0, 2.0, 0.0, 1.0))
UNFINISHED = {(0, 1), (1, 2)}
"""(group, sequence) whose completion does not end with EOS."""

_K3 = {"beta": 0.04, "use_bias_correction_kl": False}

CASES: dict[str, dict[str, Any]] = {
    "grpo": {"trl": {"loss_type": "grpo", **_K3}},
    "grpo_accumulated": {"trl": {"loss_type": "grpo"}, "micro_batch": 2},
    "grpo_clipped": {"trl": {"loss_type": "grpo"}, "old_is_engine": True},
    "grpo_bias_corrected_kl": {"trl": {"loss_type": "grpo", "beta": 0.3}, "old_is_engine": True},
    "bnpo": {"trl": {"loss_type": "bnpo"}},
    "dapo": {"trl": {"loss_type": "dapo", "epsilon_high": 0.28}},
    "dapo_clipped": {"trl": {"loss_type": "dapo", "epsilon_high": 0.28}, "old_is_engine": True},
    "dapo_two_sided": {"trl": {"loss_type": "dapo", "delta": 1.4}, "old_is_engine": True},
    "dapo_accumulated": {"trl": {"loss_type": "dapo"}, "micro_batch": 4},
    "dapo_truncated_masked": {"trl": {"loss_type": "dapo", "mask_truncated_completions": True, **_K3}},
    "dapo_entropy_and_temperature": {"trl": {"loss_type": "dapo", "entropy_coef": 0.05, "temperature": 0.7}},
    "dr_grpo": {"trl": {"loss_type": "dr_grpo", "scale_rewards": "none"}, "old_is_engine": True},
    "scaled_by_batch": {"trl": {"loss_type": "dapo", "scale_rewards": "batch"}},
    "cispo": {"trl": {"loss_type": "cispo", "epsilon_high": 1.4}, "old_is_engine": True},
    "gspo": {
        "trl": {
            "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.15,
        },
        "old_is_engine": True,
    },
    "token_truncate": {
        "trl": {
            "loss_type": "dapo", "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.5,
        }
    },
    "token_mask": {
        "trl": {
            "loss_type": "dapo", "vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 1.6,
            "vllm_importance_sampling_clip_min": 0.6,
        }
    },
    "sequence_truncate": {
        "trl": {
            "loss_type": "dapo", "vllm_importance_sampling_mode": "sequence_truncate",
            "vllm_importance_sampling_clip_max": 1.5,
        }
    },
    "sequence_mask": {
        "trl": {
            "loss_type": "dapo", "vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 1.35,
        }
    },
}  # fmt: skip


def batch() -> dict[str, Any]:
    """Two groups of ragged completions. Engine and reference logprobs lie around the model's own."""
    lm, generator = sharp_llama(), np.random.default_rng(2)
    sequences = []
    for g, lengths in enumerate(COMPLETIONS):
        prompt = generator.integers(1, EOS, size=PROMPTS[g]).tolist()
        for i, length in enumerate(lengths):
            completion = generator.integers(3, EOS, size=length).tolist()
            if (g, i) not in UNFINISHED:
                completion[-1] = EOS
            own = logprobs_of(lm, prompt + completion, temperature=1.0)[0].detach().numpy()[-length:]
            sequences.append(
                {
                    "prompt_ids": prompt,
                    "completion_ids": completion,
                    "logprobs": (own + generator.normal(scale=0.4, size=length)).round(4).tolist(),
                    "ref_logprobs": (own + generator.normal(scale=0.3, size=length)).round(4).tolist(),
                    "reward": REWARDS[g][i],
                }
            )
    return {
        "vocabulary": VOCABULARY,
        "eos": EOS,
        "group_size": GROUP_SIZE,
        "max_completion_length": 16,
        "sequences": sequences,
    }


def main() -> None:
    GOLDEN.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model, given = Path(folder) / "model", Path(folder) / "batch.json"
        sharp_llama().save_pretrained(model)
        given.write_text(json.dumps({"made_by": "python -m benchmarks.trainer_losses", **batch(), "cases": CASES}))
        script = Path(__file__).with_name("trl_losses.py")
        # -P: or the packages of this repository would be imported in the place of TRL's.
        command = [str(peer_python("trl")), "-P", str(script), str(model), str(given), str(GOLDEN)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, env=environment, check=True, timeout=TIMEOUT_S)
    print(GOLDEN)


if __name__ == "__main__":
    main()
