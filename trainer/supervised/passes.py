"""Examples of a step as the packed passes of one rank.

Shapes: T tokens of a pass in segments, M of them learnt, S spans of a teacher with another tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.batches.packing import pack_for_ranks
from trainer.supervised.examples import Example


@dataclass(frozen=True)
class Pass:
    """Examples end to end, for one forward and backward pass."""

    input_ids_1T: Tensor
    position_ids_1T: Tensor
    segments_1T: Tensor
    """Which example the token is in."""
    target_positions_M: Tensor
    """Where the hidden state lies that predicts the learnt token: one before it."""
    target_ids_M: Tensor
    weights_M: Tensor
    """What the token counts in the loss of the step: 1 / learnt tokens of all ranks; 0 in a pass that only keeps step."""
    is_sampled_M: Tensor
    """Tokens that the student sampled itself."""
    spans_M: Tensor | None = None
    """Which span of this pass the token is in; -1 for none."""
    teacher_logprobs_S: Tensor | None = None
    """Nats, of each span under the teacher."""

    def to(self, device: torch.device) -> Pass:
        """The same on another device."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in columns.items() if x is not None})


def passes_of_rank(
    examples: Sequence[Example], *, rank: int, ranks: int, max_tokens: int, hidden_size: int
) -> tuple[Pass, ...]:
    """Pack examples for all ranks, and build what one of them computes. As many passes on every rank, at least one.

    Args:
        examples: of all ranks, the same on each.
        max_tokens: of a pass; a longer example gets one of its own.
        hidden_size: of the model, for the balance of cost.
    """
    lengths = [len(example.tokens_L) for example in examples]
    plans = pack_for_ranks(lengths, capacity=max_tokens, ranks=ranks, hidden_size=hidden_size)[rank]
    weight = 1.0 / max(1, sum(example.trained_tokens for example in examples))
    return tuple(build_pass([examples[i] for i in plan], weight=weight) if plan else idle_pass() for plan in plans)


def build_pass(examples: Sequence[Example], *, weight: float) -> Pass:
    """Lay examples end to end.

    Args:
        examples: at least one, each with at least one learnt token.
        weight: of each learnt token.
    """
    lengths = [len(example.tokens_L) for example in examples]
    starts = np.cumsum([0, *lengths[:-1]])
    targets = [np.flatnonzero(example.is_trained_L) for example in examples]
    counts = [len(each) for each in targets]
    return Pass(
        input_ids_1T=_row([example.tokens_L for example in examples]),
        position_ids_1T=_row([np.arange(length) for length in lengths]),
        segments_1T=_row([np.full(length, i) for i, length in enumerate(lengths)]),
        target_positions_M=_column([start + each - 1 for start, each in zip(starts, targets, strict=True)]),
        target_ids_M=_column([example.tokens_L[each] for example, each in zip(examples, targets, strict=True)]),
        weights_M=torch.full((sum(counts),), weight, dtype=torch.float32),
        is_sampled_M=_column(
            [np.full(count, example.is_sampled) for example, count in zip(examples, counts, strict=True)]
        ).bool(),
        **_spans(examples, counts),
    )


def idle_pass() -> Pass:
    """Two tokens of weight 0: changes nothing and lets the other ranks' collectives find a partner."""
    example = Example(np.zeros(2, dtype=np.int32), np.array([False, True]))
    return build_pass([example], weight=0.0)


def _spans(examples: Sequence[Example], counts: Sequence[int]) -> dict[str, Tensor]:
    if all(example.spans is None for example in examples):
        return {}
    columns, teacher, first = [], [], 0
    for example, count in zip(examples, counts, strict=True):
        if example.spans is None:
            columns.append(np.full(count, -1))
            continue
        own = np.asarray(example.spans.span_of_token)
        columns.append(np.where(own < 0, -1, own + first))
        teacher.extend(example.spans.teacher_logprobs)
        first += len(example.spans.teacher_logprobs)
    return {"spans_M": _column(columns), "teacher_logprobs_S": torch.tensor(teacher, dtype=torch.float32)}


def _row(parts: Sequence[Any]) -> Tensor:
    return _column(parts)[None]


def _column(parts: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
