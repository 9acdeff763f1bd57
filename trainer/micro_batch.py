"""Tensors of one packed micro batch, and the share of a step's batch that one rank trains on.

Shapes: T tokens of the micro batch, M of them trained.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from atroposlib.wire.layout import Float32
from trainer.losses.aggregation import LossAggregation, loss_weights
from trainer.packing import pack_for_ranks
from trainer.prompt_sharing import Cluster, cluster
from trainer.step_batch import StepBatch, TrainSequence


@dataclass(frozen=True)
class MicroBatch:
    """Segments laid end to end, for one forward and backward pass: whole sequences, or a prompt and what follows it."""

    input_ids_1T: Tensor
    position_ids_1T: Tensor
    """Place of the token in its sequence."""
    segments_1T: Tensor
    """Which segment the token is in."""
    prefixes_1T: Tensor
    """The prompt's segment that its own goes on from; its own where there is none."""
    target_positions_M: Tensor
    """Where in T the hidden state lies that predicts the trained token: one before it."""
    target_ids_M: Tensor
    temperatures_M: Tensor
    advantages_M: Tensor
    loss_weights_M: Tensor
    """What the token counts in the loss of the whole batch; 0 in a micro batch that only keeps step."""
    inference_logprobs_M: Tensor
    has_inference_logprobs_M: Tensor
    sequence_M: Tensor
    """Which sequence of this micro batch the token is in, counted from 0."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        return MicroBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass(frozen=True)
class RankShare:
    """One rank's part of a step. The same number of micro batches on every rank."""

    batch: StepBatch
    micro_batches: tuple[MicroBatch, ...]
    forward_tokens: int
    """Tokens that all ranks together compute, prompts that are shared counted once."""


def share_of_rank(
    batch: StepBatch,
    *,
    rank: int,
    ranks: int,
    max_tokens: int,
    hidden_size: int,
    aggregation: LossAggregation,
    max_completion_length: int | None,
    shares_prompts: bool,
) -> RankShare:
    """Pack the batch's trained sequences for all ranks and build the tensors of one of them.

    Args:
        max_tokens: of a micro batch; a longer sequence gets one of its own.
        hidden_size: of the model, for the balance of cost.
        shares_prompts: lay the prompt of a group down once.
    """
    weights_N = loss_weights(
        torch.tensor([sequence.trained_tokens for sequence in batch.sequences]),
        torch.tensor([sequence.group_index for sequence in batch.sequences]),
        aggregation=aggregation,
        max_completion_length=max_completion_length,
    ).tolist()
    trained = [i for i, sequence in enumerate(batch.sequences) if sequence.trained_tokens]
    whole = sum(len(batch.sequences[i].tokens_L) for i in trained)
    # No cluster larger than a rank's share: a cluster is not divided any more.
    clusters = cluster(
        batch.sequences, trained, capacity=min(max_tokens, -(-whole // ranks)), shares_prompts=shares_prompts
    )
    lengths = [part.tokens for part in clusters]
    plans = pack_for_ranks(lengths, capacity=max_tokens, ranks=ranks, hidden_size=hidden_size)[rank]
    micro_batches = tuple(
        build_micro_batch(batch.sequences, [clusters[i] for i in plan], weights_N) if plan else idle_micro_batch()
        for plan in plans
    )
    return RankShare(batch, micro_batches, forward_tokens=sum(lengths))


def build_micro_batch(
    sequences: Sequence[TrainSequence], clusters: Sequence[Cluster], weights: Sequence[float]
) -> MicroBatch:
    """Lay clusters end to end.

    Args:
        sequences: of the batch.
        clusters: at least one.
        weights: for each sequence of the batch, what one of its tokens counts in the loss.
    """
    layout = _Layout()
    for part in clusters:
        layout.add(sequences, part, weights)
    columns = layout.columns

    def join(name: str, dtype: type[np.generic]) -> Tensor:
        return torch.from_numpy(np.concatenate(columns[name]).astype(dtype))

    return MicroBatch(
        input_ids_1T=join("tokens", np.int64)[None],
        position_ids_1T=join("positions", np.int64)[None],
        segments_1T=join("segments", np.int64)[None],
        prefixes_1T=join("prefixes", np.int64)[None],
        target_positions_M=join("target_positions", np.int64),
        target_ids_M=join("target_ids", np.int64),
        temperatures_M=join("temperatures", np.float32),
        advantages_M=join("advantages", np.float32),
        loss_weights_M=join("loss_weights", np.float32),
        inference_logprobs_M=join("inference_logprobs", np.float32),
        has_inference_logprobs_M=join("has_inference_logprobs", np.bool_),
        sequence_M=join("sequences", np.int64),
    )


class _Layout:
    """The columns of a micro batch as they grow."""

    def __init__(self) -> None:
        self.columns: defaultdict[str, list[npt.NDArray[Any]]] = defaultdict(list)
        self._tokens = 0
        self._segments = 0
        self._sequences = 0

    def add(self, sequences: Sequence[TrainSequence], part: Cluster, weights: Sequence[float]) -> None:
        """Lay down the shared prompt, if any, and then the rest of each member."""
        prompt, start = part.prompt_tokens, self._tokens
        prefix = self._segment(sequences[part.members[0]].tokens_L[:prompt], first_position=0) if prompt else None
        for index in part.members:
            sequence = sequences[index]
            targets = np.flatnonzero(sequence.is_trained_L)
            before = targets - 1  # the hidden state there predicts the target
            places = np.where(before < prompt, start + before, self._tokens + before - prompt)
            self._segment(sequence.tokens_L[prompt:], first_position=prompt, prefix=prefix)
            self._targets(sequence, targets, places, weights[index])

    def _segment(self, tokens_L: npt.NDArray[Any], *, first_position: int, prefix: int | None = None) -> int:
        segment, length = self._segments, len(tokens_L)
        self.columns["tokens"].append(tokens_L)
        self.columns["positions"].append(np.arange(first_position, first_position + length))
        self.columns["segments"].append(np.full(length, segment))
        self.columns["prefixes"].append(np.full(length, segment if prefix is None else prefix))
        self._tokens += length
        self._segments += 1
        return segment

    def _targets(
        self, sequence: TrainSequence, targets: npt.NDArray[Any], places: npt.NDArray[Any], weight: float
    ) -> None:
        known = sequence.inference_logprobs_L
        self.columns["target_positions"].append(places)
        self.columns["target_ids"].append(sequence.tokens_L[targets])
        self.columns["temperatures"].append(np.full(len(targets), sequence.temperature))
        self.columns["advantages"].append(sequence.advantages_L[targets])
        self.columns["loss_weights"].append(np.full(len(targets), weight))
        self.columns["inference_logprobs"].append(_or_zeros(known, len(sequence.tokens_L))[targets])
        self.columns["has_inference_logprobs"].append(np.full(len(targets), known is not None))
        self.columns["sequences"].append(np.full(len(targets), self._sequences))
        self._sequences += 1


def _or_zeros(column_L: Float32 | None, length: int) -> Float32:
    return np.zeros(length, dtype=np.float32) if column_L is None else column_L


def idle_micro_batch() -> MicroBatch:
    """Two tokens of weight 0: a pass that changes nothing and lets the other ranks' collectives find a partner."""
    return MicroBatch(
        input_ids_1T=torch.zeros(1, 2, dtype=torch.int64),
        position_ids_1T=torch.arange(2)[None],
        segments_1T=torch.zeros(1, 2, dtype=torch.int64),
        prefixes_1T=torch.zeros(1, 2, dtype=torch.int64),
        target_positions_M=torch.zeros(1, dtype=torch.int64),
        target_ids_M=torch.zeros(1, dtype=torch.int64),
        temperatures_M=torch.ones(1),
        advantages_M=torch.zeros(1),
        loss_weights_M=torch.zeros(1),
        inference_logprobs_M=torch.zeros(1),
        has_inference_logprobs_M=torch.zeros(1, dtype=torch.bool),
        sequence_M=torch.zeros(1, dtype=torch.int64),
    )
