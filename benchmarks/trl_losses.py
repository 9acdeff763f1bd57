# mypy: ignore-errors
"""Loss and gradient of single steps of TRL's GRPOTrainer on given rollouts; run by the interpreter of TRL's own environment.

trl_losses.py MODEL BATCH.json OUTPUT.json

Rollouts, rewards and the engine's logprobs come in through rollout_func. Two things TRL has no door for are put into the batch
that it has scored: the reference's logprobs, and old_per_token_logps, which is what a second pass over a batch compares with.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

NAMED_VERSIONS = ("trl", "transformers", "torch", "accelerate")


class Gradients(TrainerCallback):
    """The norm of each parameter's gradient, before the optimizer."""

    def __init__(self) -> None:
        self.norms: dict[str, float] = {}

    def on_pre_optimizer_step(self, *_: object, model=None, **__: object) -> None:
        self.norms = {name: float(parameter.grad.double().norm()) for name, parameter in model.named_parameters()}


def tokenizer_of(vocabulary: int, eos: int) -> PreTrainedTokenizerFast:
    """One word a token: TRL wants a tokenizer, and decodes completions for its logs."""
    words = {f"<{i}>": i for i in range(vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<0>")), eos_token=f"<{eos}>", pad_token="<0>"
    )


def padded(rows: list[list[float]]) -> torch.Tensor:
    """[B, T], zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def step(model_folder: str, batch: dict, case: dict, output_dir: str) -> dict:
    """Take one step with the settings of a case."""
    sequences = batch["sequences"]
    micro_batch = case.get("micro_batch", len(sequences))
    options = {"beta": 0.0, "temperature": 1.0, **case["trl"]}
    trains_engine_correction = "vllm_importance_sampling_mode" in options
    config = GRPOConfig(
        output_dir=output_dir, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=len(sequences) // micro_batch, num_generations=batch["group_size"],
        max_completion_length=batch["max_completion_length"], max_steps=1, learning_rate=1e-6, max_grad_norm=1e9, bf16=False,
        use_cpu=True, gradient_checkpointing=False, save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True,
        **options,
    )  # fmt: skip
    gradients = Gradients()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=config,
        reward_funcs=lambda completions, **_: [each["reward"] for each in sequences],
        train_dataset=Dataset.from_list(
            [{"prompt": f"<{i + 1}>"} for i in range(len(sequences) // batch["group_size"])]
        ),
        processing_class=tokenizer_of(batch["vocabulary"], batch["eos"]),
        rollout_func=lambda prompts, trainer: {
            "prompt_ids": [each["prompt_ids"] for each in sequences],
            "completion_ids": [each["completion_ids"] for each in sequences],
            "logprobs": [each["logprobs"] for each in sequences],
        },
        callbacks=[gradients],
    )
    if trains_engine_correction:
        # The correction belongs to vLLM's path, which only differs in where the rollouts come from.
        trainer.use_vllm, trainer._last_loaded_step = True, 0
    score = trainer._generate_and_score_completions

    def scored(inputs):
        output = score(inputs)
        if case.get("old_is_engine"):
            output["old_per_token_logps"] = output["sampling_per_token_logps"]
        if options["beta"]:
            output["ref_per_token_logps"] = padded([each["ref_logprobs"] for each in sequences])
        return output

    trainer._generate_and_score_completions = scored
    loss = trainer.train().training_loss
    norm = sum(value**2 for value in gradients.norms.values()) ** 0.5
    return {"loss": loss, "gradient_norm": norm, "parameter_norms": gradients.norms}


def main() -> None:
    model_folder, batch_file, output_file = sys.argv[1:]
    batch = json.loads(Path(batch_file).read_text())
    for name, case in batch["cases"].items():
        with tempfile.TemporaryDirectory() as output_dir:
            case["found"] = step(model_folder, batch, case, output_dir)
        print(name, case["found"]["loss"], case["found"]["gradient_norm"], file=sys.stderr, flush=True)
    versions = {name: version(name) for name in NAMED_VERSIONS}
    Path(output_file).write_text(json.dumps({"versions": versions, **batch}, indent=1) + "\n")


if __name__ == "__main__":
    main()
