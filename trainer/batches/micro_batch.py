"""Tensors of one packed micro batch, and the share of a step's batch that one rank trains on.

Shapes: T tokens of the micro batch, M of them trained, K candidates of a teacher.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from atroposlib.wire.layout import PADDING_LOGPROB, Float32
from trainer.batches.packing import pack_for_ranks
from trainer.batches.prompt_sharing import Cluster, cluster
from trainer.batches.step_batch import StepBatch, TrainSequence
from trainer.losses.aggregation import LossAggregation, loss_weights


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
    is_supervised_M: Tensor
    """Tokens that are learnt as they are: their loss is their negative logprob."""
    ref_logprobs_M: Tensor | None = None
    """Nats, under the reference policy: the environment's, or put in before the step."""
    has_ref_logprobs_M: Tensor | None = None
    """False where the environment did not send them."""
    proximal_logprobs_M: Tensor | None = None
    """Nats, under the weights at the start of the step; None where those are the weights of the pass itself."""
    distill_token_ids_MK: Tensor | None = None
    distill_logprobs_MK: Tensor | None = None
    """Nats, under the teacher; PADDING_LOGPROB where a token has fewer candidates."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in columns.items() if x is not None})


@dataclass(frozen=True)
class RankShare:
    """One rank's part of a step. The same number of minibatches, and of micro batches in each, on every rank."""

    batch: StepBatch
    minibatches: tuple[tuple[MicroBatch, ...], ...]
    """For each optimizer step over the batch, its passes. A part in which no sequence has a gradient makes no step: the
    optimizer's momentum would move the weights all the same."""
    forward_tokens: int
    """Tokens that all ranks together compute in one go through the batch, prompts that are shared counted once."""

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """The passes of one go through the batch."""
        return tuple(chain.from_iterable(self.minibatches))


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
    num_minibatches: int = 1,
    seed: int = 0,
    skips_zero_advantages: bool = False,
    has_teacher: bool = False,
) -> RankShare:
    """Pack the batch's trained sequences for all ranks and build the tensors of one of them.

    Args:
        max_tokens: of a micro batch; a longer sequence gets one of its own.
        hidden_size: of the model, for the balance of cost.
        shares_prompts: lay the prompt of a group down once.
        num_minibatches: optimizer steps that the batch is cut into.
        seed: of the cut; the same on every rank.
        skips_zero_advantages: compute no sequence whose policy gradient is zero. It counts in the averages all the same.
        has_teacher: give the micro batches the teacher's candidates.
    """
    packer = _Packer(
        batch, rank, ranks, max_tokens, hidden_size, shares_prompts, candidates=batch.candidates if has_teacher else 0
    )
    minibatches: list[tuple[MicroBatch, ...]] = []
    forward_tokens = 0
    for part in cut(batch, num_minibatches, seed=seed):
        weights_N = _token_weights(batch, part, aggregation, max_completion_length)
        kept = [i for i in part if not (skips_zero_advantages and _is_without_signal(batch.sequences[i]))]
        micro_batches, tokens = packer.pack(kept, weights_N)
        if tokens:
            minibatches.append(micro_batches)
        forward_tokens += tokens
    return RankShare(batch, tuple(minibatches), forward_tokens)


def cut(batch: StepBatch, count: int, *, seed: int) -> list[list[int]]:
    """Cut a batch into minibatches of whole sequences, about the same number each, for one optimizer step each.

    Groups stay together as far as the numbers allow, in an order of chance, so that prompts can be shared.

    Returns:
        For each minibatch its sequences, by their place in the batch. Masked ones are among them: they count in averages.
    """
    everything = list(range(len(batch.sequences)))
    if count == 1:
        return [everything]
    order = np.random.default_rng((seed, batch.step)).permutation(len(batch.group_ids))
    everything.sort(key=lambda i: order[batch.sequences[i].group_index])
    count = min(count, len(everything))
    edges = [len(everything) * i // count for i in range(count + 1)]
    return [everything[start:end] for start, end in pairwise(edges)]


def _token_weights(
    batch: StepBatch, part: Sequence[int], aggregation: LossAggregation, max_completion_length: int | None
) -> dict[int, float]:
    """What one token of each sequence of a minibatch counts in its loss."""
    sequences = [batch.sequences[i] for i in part]
    _, group_index_N = np.unique([sequence.group_index for sequence in sequences], return_inverse=True)
    weights_N = loss_weights(
        torch.tensor([sequence.trained_tokens for sequence in sequences]),
        torch.from_numpy(group_index_N),
        aggregation=aggregation,
        max_completion_length=max_completion_length,
    ).tolist()
    return dict(zip(part, weights_N, strict=True))


def _is_without_signal(sequence: TrainSequence) -> bool:
    is_trained_L = sequence.is_trained_L
    return not (sequence.advantages_L[is_trained_L].any() or sequence.is_supervised_L[is_trained_L].any())


@dataclass(frozen=True)
class _Packer:
    batch: StepBatch
    rank: int
    ranks: int
    max_tokens: int
    hidden_size: int
    shares_prompts: bool
    candidates: int

    def pack(self, part: Sequence[int], weights: Mapping[int, float]) -> tuple[tuple[MicroBatch, ...], int]:
        """The passes of this rank over some sequences, and the tokens that all ranks compute."""
        sequences = self.batch.sequences
        trained = [i for i in part if sequences[i].trained_tokens]
        whole = sum(len(sequences[i].tokens_L) for i in trained)
        # No cluster larger than a rank's share: a cluster is not divided any more.
        capacity = min(self.max_tokens, -(-whole // self.ranks))
        clusters = cluster(sequences, trained, capacity=capacity, shares_prompts=self.shares_prompts)
        lengths = [each.tokens for each in clusters]
        plans = pack_for_ranks(lengths, capacity=self.max_tokens, ranks=self.ranks, hidden_size=self.hidden_size)[
            self.rank
        ]
        micro_batches = (
            build_micro_batch(sequences, [clusters[i] for i in plan], weights, candidates=self.candidates)
            if plan
            else idle_micro_batch()
            for plan in plans
        )
        return tuple(micro_batches), sum(lengths)


def build_micro_batch(
    sequences: Sequence[TrainSequence],
    clusters: Sequence[Cluster],
    weights: Sequence[float] | Mapping[int, float],
    *,
    candidates: int = 0,
) -> MicroBatch:
    """Lay clusters end to end.

    Args:
        sequences: of the batch.
        clusters: at least one.
        weights: for each sequence of the batch, what one of its tokens counts in the loss.
        candidates: K, of a teacher; 0 leaves its columns out.
    """
    layout = _Layout(candidates)
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
        is_supervised_M=join("is_supervised", np.bool_),
        **_reference(join) if any(known.any() for known in columns["has_ref_logprobs"]) else {},
        **_teacher(join) if candidates else {},
    )


def _reference(join: Callable[[str, type[np.generic]], Tensor]) -> dict[str, Tensor]:
    return {
        "ref_logprobs_M": join("ref_logprobs", np.float32),
        "has_ref_logprobs_M": join("has_ref_logprobs", np.bool_),
    }


def _teacher(join: Callable[[str, type[np.generic]], Tensor]) -> dict[str, Tensor]:
    return {
        "distill_token_ids_MK": join("distill_token_ids", np.int64),
        "distill_logprobs_MK": join("distill_logprobs", np.float32),
    }


class _Layout:
    """The columns of a micro batch as they grow."""

    def __init__(self, candidates: int) -> None:
        self._candidates = candidates
        self.columns: defaultdict[str, list[npt.NDArray[Any]]] = defaultdict(list)
        self._tokens = 0
        self._segments = 0
        self._sequences = 0

    def add(
        self, sequences: Sequence[TrainSequence], part: Cluster, weights: Sequence[float] | Mapping[int, float]
    ) -> None:
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
        self.columns["target_ids"].append(sequence.targets_L[targets])
        self.columns["temperatures"].append(np.full(len(targets), sequence.temperature))
        self.columns["advantages"].append(sequence.advantages_L[targets])
        self.columns["loss_weights"].append(np.full(len(targets), weight))
        self.columns["inference_logprobs"].append(_or_zeros(known, len(sequence.tokens_L))[targets])
        self.columns["has_inference_logprobs"].append(np.full(len(targets), known is not None))
        self.columns["sequences"].append(np.full(len(targets), self._sequences))
        self._sequences += 1
        self.columns["is_supervised"].append(sequence.is_supervised_L[targets])
        ref = sequence.ref_logprobs_L
        self.columns["ref_logprobs"].append(_or_zeros(ref, len(sequence.tokens_L))[targets])
        self.columns["has_ref_logprobs"].append(np.full(len(targets), ref is not None))
        if self._candidates:
            self._teachers(sequence, targets)

    def _teachers(self, sequence: TrainSequence, targets: npt.NDArray[Any]) -> None:
        shape = (len(targets), self._candidates)
        ids_MK, logprobs_MK = np.zeros(shape, dtype=np.int32), np.full(shape, PADDING_LOGPROB, dtype=np.float32)
        if sequence.distill_token_ids_LK is not None and sequence.distill_logprobs_LK is not None:
            known = sequence.distill_token_ids_LK.shape[1]
            ids_MK[:, :known] = sequence.distill_token_ids_LK[targets]
            logprobs_MK[:, :known] = sequence.distill_logprobs_LK[targets]
        self.columns["distill_token_ids"].append(ids_MK)
        self.columns["distill_logprobs"].append(logprobs_MK)


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
        is_supervised_M=torch.zeros(1, dtype=torch.bool),
    )
