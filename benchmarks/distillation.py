"""GKD beside SFT at equal tokens: a student of few layers learns to speak like SmolLM2-135M.

python -m benchmarks.distillation                                        three seeds, ten to fifteen minutes on two cores
python -m benchmarks.distillation --seeds 1 --prompts 32 --new-tokens 16    a try

The teacher writes a completion for each prompt. The student is made of its first and last layers and warmed up with SFT on some
of the completions, as in Agarwal et al. 2024 (arXiv:2306.13649). From there every method sees the same other completions in
the same order, at the same learning rate: SFT learns the words, GKD what the teacher would have said in each place. Measured is,
on prompts that were held out, the student's cross-entropy against the teacher, whose floor is the teacher's own entropy, and the
Jensen-Shannon divergence of the two, which is what beta 0.5 lowers and at most log 2; both in nats a token. A seed samples other
completions, and learns them in another order.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging as transformers_logging

from atroposlib.data.answers import question_of
from trainer.losses.distillation import generalised_jsd
from trainer.step.allocator import keep_freed_memory
from trainer.supervised.config import GKDConfig, SFTConfig
from trainer.supervised.examples import Example, prepare, row_tokenizer
from trainer.supervised.gkd_trainer import GKDTrainer
from trainer.supervised.sampling import Sampler, Sampling
from trainer.supervised.schedule import Schedule
from trainer.supervised.sft_trainer import SFTTrainer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
SOURCES = ("sft_loader/data/chats.jsonl", "rlaif_judge/data/requests.jsonl", "gsm8k/data/problems.jsonl",
           "instruction_following/data/instructions.jsonl", "teacher_distillation/data/problems.jsonl",
           "tool_calling/data/questions.jsonl", "code_execution/data/tasks.jsonl")  # fmt: skip
"""Samples whose prompts are not made from a few patterns, so that none held out is nearly one that is learnt."""
HELD_OUT_SHARE = 10
"""One prompt in so many is held out."""
METHODS: dict[str, dict[str, Any]] = {
    "SFT": {},
    "GKD beta 0": {"beta": 0.0, "lmbda": 0.0},
    "GKD beta 0.5": {"beta": 0.5, "lmbda": 0.0},
}

Row = dict[str, Any]


class Distance(NamedTuple):
    """Of a student from the teacher, means over the learnt tokens, nats."""

    cross_entropy: float
    """-sum over the vocabulary of teacher's probability times student's logprob."""
    jsd: float
    """Jensen-Shannon divergence."""

    def __str__(self) -> str:
        return f"{self.cross_entropy:.3f} ({self.jsd:.3f})"


Score = Callable[[Any], Distance]
Curve = list[tuple[int, Distance]]
"""(trained tokens, distance from the teacher)."""


@dataclass(frozen=True)
class Task:
    """What the methods of one seed share."""

    teacher: Any
    tokenizer: Any
    warm_up: list[Row]
    training: list[Row]
    score: Score
    entropy: float
    """The teacher's own, on what is held out, nats a token."""


def prompts(most: int) -> list[str]:
    """What is asked in the samples that come with the environments, some of each."""
    found = {
        asked_in(json.loads(line)): None
        for source in SOURCES
        for line in (ROOT / "environments" / source).read_text(encoding="utf-8").splitlines()
    }
    every = list(found)
    most = min(most, len(every))
    return [every[place * len(every) // most] for place in range(most)]


def asked_in(row: Mapping[str, Any]) -> str:
    if "messages" in row:
        return str(next(message["content"] for message in row["messages"] if message["role"] == "user"))
    return str(row["request"]) if "request" in row else question_of(row)


def load_tokenizer() -> Any:
    """The teacher's; of a reply, its chat template adds no end: the teacher writes that itself, unless it was cut short."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    end = "'<|im_end|>' + '\n'"
    assert end in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(end, f"('' if message['role'] == 'assistant' else {end})")
    return tokenizer


def written_by(teacher: Any, tokenizer: Any, asked: Sequence[str], *, new_tokens: int, seed: int) -> list[Row]:
    """Rows: each prompt with what the teacher says to it at temperature 1."""
    chats = [[{"role": "user", "content": text}] for text in asked]
    ids = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        for chat in chats
    ]
    sampled = Sampler(teacher, tokenizer).sample(ids, Sampling(1.0, new_tokens, batch_size=64), seed=seed)
    texts = [tokenizer.decode(completion) for completion in sampled]
    return [
        {"messages": [*chat, {"role": "assistant", "content": text}]} for chat, text in zip(chats, texts, strict=True)
    ]


def cut_to(layers: int) -> Any:
    """The teacher with half of these layers from its start and half from its end: those in between matter least."""
    student = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    every = student.model.layers
    student.model.layers = nn.ModuleList([*every[: layers - layers // 2], *every[len(every) - layers // 2 :]])
    for place, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = place
    student.config.num_hidden_layers = layers
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = student.config.layer_types[:layers]
    return student


@torch.no_grad()
def logprobs_of(lm: Any, example: Example) -> Tensor:
    """[M, V] nats, in the places that predict the learnt tokens."""
    ids_1T = torch.from_numpy(example.tokens_L).long()[None]
    places_M = torch.from_numpy(example.is_trained_L).nonzero()[:, 0] - 1
    hidden_MH = lm.model(input_ids=ids_1T, use_cache=False).last_hidden_state[0, places_M]
    logits_MV: Tensor = lm.get_output_embeddings()(hidden_MH)
    return logits_MV.log_softmax(-1)


@torch.no_grad()
def distances(student: Any, teacher_MV: Tensor, example: Example) -> Tensor:
    """[2] the sums of a Distance over an example's learnt tokens."""
    own_MV = logprobs_of(student, example)
    return torch.stack(
        [-(teacher_MV.exp() * own_MV).sum(), generalised_jsd(own_MV, teacher_MV, beta=0.5).sum()]
    ).double()


def scoring(teacher: Any, examples: Sequence[Example]) -> Score:
    """What measures a student on these examples. The teacher is asked once."""
    wanted = [logprobs_of(teacher, example) for example in examples]
    tokens = sum(example.trained_tokens for example in examples)

    def score(student: Any) -> Distance:
        was_training = student.training
        student.eval()
        sums = torch.stack([distances(student, known, each) for known, each in zip(wanted, examples, strict=True)])
        student.train(was_training)
        return Distance(*(sums.sum(0) / tokens).tolist())

    return score


def task_of(options: argparse.Namespace, seed: int) -> Task:
    tokenizer = load_tokenizer()
    teacher = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    started = time.monotonic()
    rows = written_by(teacher, tokenizer, prompts(options.prompts), new_tokens=options.new_tokens, seed=seed)
    tell(f"seed {seed}: the teacher wrote {len(rows)} completions in {time.monotonic() - started:.0f} s")
    tokenize = row_tokenizer(
        tokenizer, completion_only=True, last_turn_only=False, response_marker=None, takes_prompts=False
    )
    held_out, _ = prepare(rows[::HELD_OUT_SHARE], tokenize, max_seq_length=options.max_seq_length)
    learnt = [row for place, row in enumerate(rows) if place % HELD_OUT_SHARE]
    warm_up = [row for place, row in enumerate(learnt) if place % options.warm_up_share == 0]
    training = [row for place, row in enumerate(learnt) if place % options.warm_up_share]
    score = scoring(teacher, held_out)
    return Task(teacher, tokenizer, warm_up, training, score, score(teacher).cross_entropy)


class Measure(TrainerCallback):  # type: ignore[misc]
    """The curve of one run, measured after these steps."""

    def __init__(self, name: str, score: Score, steps: Sequence[int], run_dir: Path) -> None:
        self.curve: Curve = []
        self.seconds = 0.0
        """That measuring took."""
        self._name = name
        self._score = score
        self._due = set(steps)
        self._run_dir = run_dir

    def on_log(self, args: Any, state: Any, *_: Any, model: Any, **__: Any) -> None:
        if state.global_step not in self._due:
            return
        self._due.remove(state.global_step)
        started = time.monotonic()
        lines = [json.loads(line) for line in (self._run_dir / "metrics.jsonl").read_text().splitlines()]
        tokens = int(sum(line.get("tokens/trained", 0) for line in lines))
        self.curve.append((tokens, self._score(model.lm)))
        self.seconds += time.monotonic() - started
        tell(f"  {self._name}: {tokens} tokens, {self.curve[-1][1]} nats")


def common_options(options: argparse.Namespace, run_dir: Path, seed: int) -> dict[str, Any]:
    """What SFT and GKD are told alike."""
    return {
        "model_name_or_path": str(MODEL), "run_dir": str(run_dir), "batch_size": options.batch_size, "bf16": options.bf16,
        "learning_rate": options.learning_rate, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
        "max_seq_length": options.max_seq_length, "save_strategy": "no", "seed": seed, "use_cpu": True, "logging_steps": 1,
        "disable_tqdm": True,
    }  # fmt: skip


def warmed_up(options: argparse.Namespace, task: Task, folder: Path, seed: int) -> Any:
    """The student that every method begins with."""
    student = cut_to(options.layers)
    config = SFTConfig(**common_options(options, folder / "warm-up", seed), num_train_epochs=options.warm_up_epochs)
    SFTTrainer(config, model=student, tokenizer=task.tokenizer, train_dataset=task.warm_up).train()
    return student


def train(name: str, options: argparse.Namespace, task: Task, student: Any, folder: Path, seed: int) -> tuple[Curve, float]:  # fmt: skip
    """One run; its curve, and its seconds without measuring."""
    run_dir = folder / name.replace(" ", "_")
    steps = steps_of(options, len(task.training))
    measure = Measure(name, task.score, [steps * i // options.points for i in range(1, options.points + 1)], run_dir)
    common = {**common_options(options, run_dir, seed), "num_train_epochs": options.epochs}
    shared: dict[str, Any] = {
        "model": deepcopy(student), "tokenizer": task.tokenizer, "train_dataset": task.training, "callbacks": [measure],
    }  # fmt: skip
    if name == "SFT":
        trainer: Any = SFTTrainer(SFTConfig(**common), **shared)
    else:
        config = GKDConfig(
            **common, **METHODS[name], teacher_model_name_or_path=str(MODEL), eval_strategy="no", max_new_tokens=1
        )
        trainer = GKDTrainer(config, teacher_model=task.teacher, teacher_processing_class=task.tokenizer, **shared)
    started = time.monotonic()
    trainer.train()
    return measure.curve, time.monotonic() - started - measure.seconds


def steps_of(options: argparse.Namespace, rows: int) -> int:
    return Schedule(rows, batch_size=options.batch_size, seed=0).total_steps(epochs=options.epochs, max_steps=-1)


def compare(options: argparse.Namespace, seed: int) -> dict[str, Curve]:
    """The curves of one seed."""
    task = task_of(options, seed)
    steps = steps_of(options, len(task.training))
    if steps < options.points:
        sys.exit(f"error: {len(task.training)} rows make {steps} steps, too few for --points {options.points}: give more "
                 "--prompts or --epochs, or fewer --points")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        student = warmed_up(options, task, Path(folder), seed)
        first = task.score(student)
        tell(f"  {len(task.warm_up)} rows to warm up, {len(task.training)} to learn; all begin at {first} nats, the "
             f"teacher's entropy is {task.entropy:.3f}")  # fmt: skip
        curves = {}
        for name in METHODS:
            curve, seconds = train(name, options, task, student, Path(folder), seed)
            curves[name] = [(0, first), *curve]
            tell(f"  {name}: {seconds:.0f} s without measuring")
    return curves


def print_table(found: Mapping[int, Mapping[str, Curve]]) -> None:
    """The curves of each seed side by side, as Markdown: cross-entropy (JSD), nats."""
    print("\n| seed | tokens | " + " | ".join(METHODS) + " |\n|---|---" + "|---" * len(METHODS) + "|")
    for seed, curves in found.items():
        for points in zip(*curves.values(), strict=True):
            assert len({tokens for tokens, _ in points}) == 1, "the methods saw different tokens"
            print(f"| {seed} | {points[0][0]} | " + " | ".join(str(distance) for _, distance in points) + " |")


def print_verdicts(found: Mapping[int, Mapping[str, Curve]]) -> None:
    """For each GKD, whether it is below SFT: at every point, and in the end below the best that SFT ever was."""
    print()
    for name in (name for name in METHODS if name != "SFT"):
        for seed, curves in found.items():
            own, sft = ([distance.cross_entropy for _, distance in curves[each][1:]] for each in (name, "SFT"))
            below = sum(one < other for one, other in zip(own, sft, strict=True))
            print(f"{name}, seed {seed}: below SFT at {below} of {len(own)} points; ends at {own[-1]:.3f}, SFT at "
                  f"{sft[-1]:.3f}, its best is {min(sft):.3f}")  # fmt: skip


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="of the student")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=48, help="of a completion, at most")
    parser.add_argument("--warm-up-share", type=int, default=4, help="one learnt prompt in so many is for the warm-up")
    parser.add_argument("--warm-up-epochs", type=float, default=2)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--points", type=int, default=3, help="of each curve, beside its start")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="matrix products in bfloat16"
    )
    options = parser.parse_args()
    keep_freed_memory()
    transformers_logging.disable_progress_bar()
    found = {}
    for seed in range(options.seeds):
        found[seed] = compare(options, seed)
        # A run that is cut short has said something.
        print_table({seed: found[seed]})
    print_table(found)
    print_verdicts(found)


if __name__ == "__main__":
    main()
