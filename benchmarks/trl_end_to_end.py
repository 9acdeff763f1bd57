# mypy: ignore-errors
"""TRL's GRPOTrainer on given prompts, sampling with transformers; run by the interpreter of TRL's own environment.

trl_end_to_end.py WORKLOAD.json OUTPUT_DIR

Prints one line of JSON for each event, with the seconds since this program began: ready (the model is loaded), step (mean
reward of its completions), done.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

ANSWER = re.compile(r"-?[0-9]{1,1000}")


def tell(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, "seconds": time.perf_counter() - STARTED, **facts}), flush=True)


class Watch(TrainerCallback):
    """Reports each step, and ends the training when its time is over."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.began = 0.0
        self.rewards: list[float] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.began = time.perf_counter()
        tell("ready")

    def on_step_end(self, args, state, control, **__: object) -> None:
        # With all completions of a step sampled before it, these are its own.
        tell(
            "step", step=state.global_step, reward=sum(self.rewards) / len(self.rewards), completions=len(self.rewards)
        )
        self.rewards.clear()
        control.should_training_stop = time.perf_counter() - self.began > self.limit_s


def main() -> None:
    facts = json.loads(Path(sys.argv[1]).read_text())
    watch = Watch(facts["limit_s"])

    def right(completions, answer, **_):
        """As environments/chain_sum.py pays."""
        texts = [text.strip() for text in completions]
        rewards = [
            float(ANSWER.fullmatch(text) is not None and int(text) == number)
            for text, number in zip(texts, answer, strict=True)
        ]
        watch.rewards += rewards
        return rewards

    config = GRPOConfig(
        output_dir=sys.argv[2], per_device_train_batch_size=facts["micro_batch"],
        gradient_accumulation_steps=facts["batch_size"] // facts["micro_batch"], num_generations=facts["group_size"],
        max_completion_length=facts["max_tokens"], temperature=1.0, max_steps=facts["max_steps"],
        learning_rate=facts["learning_rate"], lr_scheduler_type="linear", warmup_steps=0, beta=0.0, bf16=True, use_cpu=True,
        gradient_checkpointing=False, save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True,
        shuffle_dataset=False, seed=facts["seed"],
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(facts["model"], dtype=torch.float32),
        args=config,
        reward_funcs=right,
        train_dataset=Dataset.from_list(facts["rows"]),
        processing_class=AutoTokenizer.from_pretrained(facts["model"]),
        callbacks=[watch],
    )
    trainer.train()
    tell("done")


if __name__ == "__main__":
    main()
