"""GKD beside SFT at equal tokens: a student of few layers learns to speak like SmolLM2-135M.

python -m benchmarks.distillation                                     a few minutes on two cores
python -m benchmarks.distillation --prompts 24 --new-tokens 16 --epochs 2    a try

The teacher writes a completion for each prompt. Both methods then see the same completions in the same order, from the same
first weights, at the same learning rate: SFT learns the words, GKD what the teacher would have said in each place. Measured is the
student's cross-entropy against the teacher on prompts that were held out, in nats a token; the teacher's own entropy is its
floor.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from atroposlib.data.answers import question_of
from atroposlib.data.chats import as_messages
from atroposlib.errors import DataError
from trainer.step.allocator import keep_freed_memory
from trainer.supervised.config import GKDConfig, SFTConfig
from trainer.supervised.examples import Example, prepare, row_tokenizer
from trainer.supervised.gkd_trainer import GKDTrainer
from trainer.supervised.sampling import Sampler, Sampling
from trainer.supervised.sft_trainer import SFTTrainer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
SOURCES = ("sft_loader/data/chats.jsonl", "rlaif_judge/data/requests.jsonl", "gsm8k/data/problems.jsonl",
           "instruction_following/data/instructions.jsonl", "teaching/data/problems.jsonl")  # fmt: skip
HELD_OUT_SHARE = 8
"""One prompt in so many is held out."""

Curve = list[tuple[int, float]]
"""(trained tokens, cross-entropy against the teacher)."""


def prompts(most: int) -> list[str]:
    """What is asked in the samples that come with the environments."""
    found: list[str] = []
    for source in SOURCES:
        for line in (ROOT / "environments" / source).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            try:
                found.append(as_messages(row)[0]["content"] if "messages" in row else question_of(row))
            except DataError:
                found.append(next(value for value in row.values() if isinstance(value, str)))
    return found[:most]


def written_by(
    teacher: Any, tokenizer: Any, asked: Sequence[str], *, new_tokens: int, seed: int
) -> list[dict[str, Any]]:
    """Rows: each prompt with what the teacher says to it at temperature 1."""
    chats = [[{"role": "user", "content": text}] for text in asked]
    ids = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        for chat in chats
    ]
    sampled = Sampler(teacher, tokenizer).sample(ids, Sampling(1.0, new_tokens, batch_size=16), seed=seed)
    texts = [tokenizer.decode(completion, skip_special_tokens=True) for completion in sampled]
    return [
        {"messages": [*chat, {"role": "assistant", "content": text}]} for chat, text in zip(chats, texts, strict=True)
    ]


def cut_to(layers: int) -> Any:
    """The teacher's first layers, and its output."""
    student = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    student.model.layers = student.model.layers[:layers]
    student.config.num_hidden_layers = layers
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = student.config.layer_types[:layers]
    return student


@torch.no_grad()
def cross_entropy(student: Any, teacher: Any, examples: Sequence[Example]) -> float:
    """Mean over the learnt tokens of -sum over the vocabulary of teacher's probability times student's logprob, nats."""
    total, tokens = 0.0, 0
    for example in examples:
        ids = torch.from_numpy(example.tokens_L).long()[None]
        places = torch.from_numpy(example.is_trained_L).nonzero()[:, 0] - 1
        own, other = (lm(input_ids=ids, use_cache=False).logits[0, places].float() for lm in (student, teacher))
        total -= float((other.softmax(-1) * own.log_softmax(-1)).sum())
        tokens += len(places)
    return total / tokens


class Measure(TrainerCallback):  # type: ignore[misc]
    """The curve of one run."""

    def __init__(self, score: Callable[[Any], float], *, every: int, run_dir: Path) -> None:
        self.curve: Curve = []
        self._score = score
        self._every = every
        self._run_dir = run_dir

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        self.curve.append((0, self._score(model.lm)))

    def on_log(self, args: Any, state: Any, *_: Any, model: Any, **__: Any) -> None:
        if (
            state.global_step
            and state.global_step % self._every == 0
            and len(self.curve) <= state.global_step // self._every
        ):
            lines = [json.loads(line) for line in (self._run_dir / "metrics.jsonl").read_text().splitlines()]
            self.curve.append((int(sum(line.get("tokens/trained", 0) for line in lines)), self._score(model.lm)))
            print(f"  {self._run_dir.name}: {self.curve[-1][0]} tokens, {self.curve[-1][1]:.3f} nats", file=sys.stderr)


def train(name: str, options: argparse.Namespace, rows: list[dict[str, Any]], held_out: list[Example], folder: Path,
          teacher: Any, tokenizer: Any, **gkd: Any) -> tuple[Curve, float]:  # fmt: skip
    """One run; its curve, and seconds of the run without measuring."""
    run_dir = folder / name
    common: dict[str, Any] = {
        "model_name_or_path": str(MODEL), "run_dir": str(run_dir), "batch_size": options.batch_size, "learning_rate": options.learning_rate,
        "num_train_epochs": options.epochs, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
        "max_seq_length": 512, "save_strategy": "no", "seed": options.seed, "use_cpu": True, "logging_steps": 1,
    }  # fmt: skip
    measured = 0.0

    def score(student: Any) -> float:
        nonlocal measured
        started, was_training = time.monotonic(), student.training
        student.eval()
        value = cross_entropy(student, teacher, held_out)
        student.train(was_training)
        measured += time.monotonic() - started
        return value

    steps = -(-len(rows) // options.batch_size)
    measure = Measure(score, every=max(1, round(steps * options.epochs / options.points)), run_dir=run_dir)
    shared: dict[str, Any] = {
        "model": cut_to(options.layers),
        "tokenizer": tokenizer,
        "train_dataset": rows,
        "callbacks": [measure],
    }
    if not gkd:
        trainer: Any = SFTTrainer(SFTConfig(**common), **shared)
    else:
        distilled = GKDConfig(**common, teacher_model_name_or_path=str(MODEL), eval_strategy="no", **gkd)
        trainer = GKDTrainer(distilled, teacher_model=teacher, teacher_processing_class=tokenizer, **shared)
    started = time.monotonic()
    trainer.train()
    return measure.curve, time.monotonic() - started - measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the student")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=48, help="of a completion, at most")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--points", type=int, default=6, help="of each curve")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keep_freed_memory()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    teacher = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    rows = written_by(teacher, tokenizer, prompts(options.prompts), new_tokens=options.new_tokens, seed=options.seed)
    training = [row for i, row in enumerate(rows) if i % HELD_OUT_SHARE]
    tokenize = row_tokenizer(
        tokenizer, completion_only=True, last_turn_only=False, response_marker=None, takes_prompts=False
    )
    held_out, _ = prepare(rows[::HELD_OUT_SHARE], tokenize, max_seq_length=512)
    print(f"{len(training)} rows to learn, {len(held_out)} held out; the teacher's own entropy is "
          f"{cross_entropy(teacher, teacher, held_out):.3f} nats a token")  # fmt: skip
    methods: dict[str, dict[str, Any]] = {
        "sft": {},
        "gkd_beta_0": {"beta": 0.0, "lmbda": 0.0},
        "gkd_beta_0.5": {"beta": 0.5, "lmbda": 0.0},
    }
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: train(name, options, training, held_out, Path(folder), teacher, tokenizer, **gkd)
            for name, gkd in methods.items()
        }
    report({name: curve for name, (curve, _) in found.items()}, {name: seconds for name, (_, seconds) in found.items()})


def report(curves: dict[str, Curve], seconds: dict[str, float]) -> None:
    """The curves side by side, and whether GKD ends below SFT."""
    names = list(curves)
    print("\n| trained tokens | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for points in zip(*(curves[name] for name in names), strict=True):
        assert len({tokens for tokens, _ in points}) == 1, "the methods saw different tokens"
        print(f"| {points[0][0]} | " + " | ".join(f"{value:.3f}" for _, value in points) + " |")
    print("| seconds | " + " | ".join(f"{seconds[name]:.0f}" for name in names) + " |")
    last = {name: curve[-1][1] for name, curve in curves.items()}
    best = min((name for name in names if name != "sft"), key=lambda name: last[name])
    verdict = "below" if last[best] < last["sft"] else "NOT below"
    print(f"\n{best} ends at {last[best]:.3f}, {verdict} sft's {last['sft']:.3f}")


if __name__ == "__main__":
    main()
