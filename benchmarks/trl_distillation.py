# mypy: ignore-errors
"""TRL's generalised JSD and its gradient on fixed logits; run by the interpreter of TRL's own environment.

trl_distillation.py OUTPUT.json
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from trl.experimental.gkd import GKDTrainer

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (1.0, 0.7)
SHAPE = (7, 11)
"""Tokens, vocabulary."""


def case(student, teacher, beta: float, temperature: float) -> dict:
    logits = student.clone().requires_grad_()
    loss = GKDTrainer.generalized_jsd_loss(
        logits[None], teacher[None], beta=beta, temperature=temperature, reduction="sum"
    )
    loss.backward()
    return {
        "beta": beta, "temperature": temperature, "loss": float(loss.detach()) / SHAPE[0],
        "gradient": (logits.grad / SHAPE[0]).tolist(),
    }  # fmt: skip


def main() -> None:
    generator = torch.Generator().manual_seed(5)
    student, teacher = (2 * torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    cases = [case(student, teacher, beta, temperature) for beta in BETAS for temperature in TEMPERATURES]
    found = {"trl": version("trl"), "student": student.tolist(), "teacher": teacher.tolist(), "cases": cases}
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
