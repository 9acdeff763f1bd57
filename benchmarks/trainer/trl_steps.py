# mypy: ignore-errors
"""TRL's GRPOTrainer on given completions; run by the interpreter of TRL's own environment.

trl_steps.py MODEL WORKLOAD.json MICRO_BATCH OUTPUT_DIR

Prints one line of JSON: seconds of each step, without sampling (the completions are there), and peak memory in bytes.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        if not self.ends:
            self.ends.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))


def main() -> None:
    model_folder, workload_file, micro_batch, output_dir = sys.argv[1:]
    facts = json.loads(Path(workload_file).read_text())
    workload, steps = facts["workload"], iter(facts["steps"])
    sequences = workload["groups"] * workload["group_size"]
    rewards: list[float] = []

    def rollouts(prompts, trainer):
        step = next(steps)
        rewards[:] = [one["reward"] for one in step]
        return {
            "prompt_ids": [one["prompt_ids"] for one in step],
            "completion_ids": [one["completion_ids"] for one in step],
            "logprobs": [one["logprobs"] for one in step],
        }

    config = GRPOConfig(
        output_dir=output_dir, per_device_train_batch_size=int(micro_batch),
        gradient_accumulation_steps=sequences // int(micro_batch), num_generations=workload["group_size"],
        max_completion_length=workload["max_tokens"], max_steps=workload["steps"], learning_rate=1e-5, beta=0.0,
        bf16=True, use_cpu=True, gradient_checkpointing=False, save_strategy="no", report_to=[], logging_steps=1,
        disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    clock = Clock()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=config,
        reward_funcs=lambda completions, **_: list(rewards),
        train_dataset=Dataset.from_list(
            [{"prompt": f"prompt {i}"} for i in range(workload["groups"] * workload["steps"])]
        ),
        processing_class=tokenizer,
        rollout_func=rollouts,
        callbacks=[clock],
    )
    trainer.train()
    seconds, cpu_seconds = np.diff(np.array(clock.ends), axis=0).T.tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
