"""Lay the prompt of a group's completions down once, instead of once for each of them. Pure.

The completions of a group differ after the prompt only, and the prompt usually is the longer part. A cluster is one
prompt followed by the rest of each sequence; attention lets each rest see the prompt and itself. Values and gradients
are those of the whole sequences; the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.batches.step_batch import TrainSequence


@dataclass(frozen=True)
class Cluster:
    """Sequences that share a prompt, by their place in the batch."""

    members: tuple[int, ...]
    prompt_tokens: int
    """Laid down once for all members; 0 where nothing is shared."""
    tokens: int
    """Laid down in all."""


def cluster(
    sequences: Sequence[TrainSequence], indices: Sequence[int], *, capacity: int, shares_prompts: bool
) -> list[Cluster]:
    """Put sequences of one group and one prompt together, as many as fit.

    Args:
        indices: of the sequences to lay down, each with a trained token.
        capacity: tokens of a cluster. A longer sequence gets a cluster of its own.
        shares_prompts: False makes a cluster of each sequence, for attention kernels that know no such mask.
    """
    by_prompt: dict[tuple[int, bytes], list[int]] = {}
    for index in indices:
        sequence = sequences[index]
        prompt = sequence.tokens_L[: prompt_length(sequence)].tobytes()
        by_prompt.setdefault((sequence.group_index, prompt) if shares_prompts else (index, b""), []).append(index)
    return [part for same in by_prompt.values() for part in _split(sequences, same, capacity)]


def prompt_length(sequence: TrainSequence) -> int:
    """Tokens before the first trained one."""
    return int(np.argmax(sequence.is_trained_L))


def _split(sequences: Sequence[TrainSequence], members: Sequence[int], capacity: int) -> list[Cluster]:
    prompt = prompt_length(sequences[members[0]])
    parts: list[list[int]] = []
    room = 0
    for index in members:
        rest = len(sequences[index].tokens_L) - prompt
        if not parts or rest > room:
            parts.append([])
            room = capacity - prompt
        parts[-1].append(index)
        room -= rest
    return [_cluster_of(sequences, part, prompt) for part in parts]


def _cluster_of(sequences: Sequence[TrainSequence], members: Sequence[int], prompt: int) -> Cluster:
    shared = prompt if len(members) > 1 else 0
    tokens = shared + sum(len(sequences[index].tokens_L) - shared for index in members)
    return Cluster(tuple(members), shared, tokens)
