"""Sums of a step's passes over all ranks, and the means of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class FigureSums:
    """Named sums of one rank; `gathered` makes them those of all ranks. Every rank adds the same names."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, **values: Tensor) -> None:
        """Add a pass."""
        for name, value in values.items():
            addend = value.detach().double().to(self._device)
            self._sums[name] = self._sums[name] + addend if name in self._sums else addend

    def gathered(self, *, wants_to_stop: bool = False) -> dict[str, float]:
        """The sums over all ranks; every rank must call it.

        Args:
            wants_to_stop: this rank was told to; the sum `stop` is over 0 where any was.
        """
        names = sorted(self._sums)
        stop = torch.tensor(float(wants_to_stop), dtype=torch.float64, device=self._device)
        column = torch.stack([*(self._sums[name] for name in names), stop])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(column)
        return dict(zip([*names, "stop"], column.tolist(), strict=True))


def evaluation_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Means of what an evaluation has added up."""
    tokens = max(1.0, sums["tokens"])
    nll = sums["nll"] / tokens
    figures = {"loss": sums["loss"], "nll": nll, "perplexity": math.exp(min(nll, 700.0)), "tokens": sums["tokens"]}
    if "teacher_cross_entropy" in sums:
        figures["teacher_cross_entropy"] = sums["teacher_cross_entropy"] / tokens
    return figures
