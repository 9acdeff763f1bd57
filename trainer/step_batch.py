"""What one optimizer step trains on: the sequences of its groups, each with advantage, loss weight and temperature.

Every rank builds the same StepBatch from the whole batch, so all averages over the batch are known without talking.
No torch here: tensors are made in micro_batch.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from atroposlib.wire.columns import Group
from atroposlib.wire.layout import NOT_SAMPLED, Float32, Float64, Int32
from trainer.advantages import AdvantageScale, batch_advantages
from trainer.errors import StalenessError, TrainerError

Overlong = Literal["mask", "keep"]
OVERLONG: tuple[Overlong, ...] = get_args(Overlong)


@dataclass(frozen=True)
class TrainSequence:
    """One trajectory, ready for the loss. L: its tokens."""

    group_index: int
    tokens_L: Int32
    is_trained_L: npt.NDArray[np.bool_]
    """The tokens that get a loss: sampled by the policy, not the first token, not of an overlong sequence."""
    inference_logprobs_L: Float32 | None
    """None from old clients that send none: there is nothing to correct with."""
    advantages_L: Float32
    temperature: float
    reward: float
    completion_tokens: int
    """Tokens that the policy sampled, whether trained or not."""
    is_truncated: bool
    """Cut by a length limit."""
    oldest_version: int | None
    """Of its trained tokens; None when the sender does not know."""

    @property
    def trained_tokens(self) -> int:
        """Tokens that get a loss."""
        return int(self.is_trained_L.sum())


@dataclass(frozen=True)
class StepBatch:
    """The whole batch of a step, in the server's order."""

    step: int
    """Counted from 0; the weights that train it are policy version `step`."""
    group_ids: tuple[str, ...]
    rewards: tuple[Float64, ...]
    """For each group, its [N] rewards."""
    sequences: tuple[TrainSequence, ...]

    @property
    def trained_tokens(self) -> int:
        """Tokens that get a loss, in all sequences."""
        return sum(sequence.trained_tokens for sequence in self.sequences)

    def staleness(self) -> list[int]:
        """Versions between the oldest trained token of each sequence and this step, where known."""
        return [self.step - s.oldest_version for s in self.sequences if s.oldest_version is not None]

    def check_staleness(self, max_staleness: int) -> None:
        """Refuse a batch that breaks the server's promise.

        Raises:
            StalenessError: names the oldest group.
        """
        known = [s for s in self.sequences if s.oldest_version is not None]
        oldest = min(known, key=lambda s: s.oldest_version or 0, default=None)
        if oldest is None or oldest.oldest_version is None:
            return
        if self.step - oldest.oldest_version > max_staleness:
            raise StalenessError(
                self.group_ids[oldest.group_index],
                step=self.step,
                oldest_version=oldest.oldest_version,
                max_staleness=max_staleness,
            )


def build_step_batch(
    step: int,
    groups: Sequence[Group],
    *,
    advantage_scale: AdvantageScale,
    overlong: Overlong,
    temperature: float,
) -> StepBatch:
    """Turn leased groups into what the loss needs.

    Args:
        step: counted from 0.
        groups: as leased, in the server's order.
        advantage_scale: how rewards become advantages, where a group does not bring its own.
        overlong: mask: sequences cut by a length limit get no loss (their reward still counts).
        temperature: of groups that do not say theirs.
    Raises:
        TrainerError: the batch is empty.
    """
    if not groups:
        raise TrainerError(f"the rollout server sent an empty batch for step {step}")
    advantages = batch_advantages([group.scores for group in groups], scale=advantage_scale)
    sequences = [
        sequence
        for index, group in enumerate(groups)
        for sequence in _sequences(index, group, advantages[index], overlong=overlong, temperature=temperature)
    ]
    return StepBatch(
        step=step,
        group_ids=tuple(group.group_id for group in groups),
        rewards=tuple(group.scores for group in groups),
        sequences=tuple(sequences),
    )


def _sequences(
    group_index: int, group: Group, advantages_N: Float64, *, overlong: Overlong, temperature: float
) -> Iterator[TrainSequence]:
    versions_T = group.versions_per_token()
    sampling_temperature = _temperature(group, temperature)
    for i in range(group.n_sequences):
        span = slice(int(group.cu_seqlens[i]), int(group.cu_seqlens[i + 1]))
        is_sampled_L = group.loss_mask[span] != 0
        is_truncated = bool(group.finish_reasons) and group.finish_reasons[i] == "length"
        is_trained_L = is_sampled_L.copy()
        is_trained_L[0] = False  # nothing comes before the first token, so nothing predicts it
        if is_truncated and overlong == "mask":
            is_trained_L[:] = False
        inference_T: Float32 | None = group.inference_logprobs
        yield TrainSequence(
            group_index=group_index,
            tokens_L=group.tokens[span],
            is_trained_L=is_trained_L,
            inference_logprobs_L=None if inference_T is None else inference_T[span],
            advantages_L=_advantages(group, i, span, float(advantages_N[i])),
            temperature=sampling_temperature,
            reward=float(group.scores[i]),
            completion_tokens=int(is_sampled_L.sum()),
            is_truncated=is_truncated,
            oldest_version=_oldest(versions_T[span][is_trained_L]),
        )


def _advantages(group: Group, i: int, span: slice, advantage: float) -> Float32:
    """Per token: the environment's own where it sends them, else one value for the whole sequence."""
    length = span.stop - span.start
    overrides = group.overrides[i] if group.overrides else None
    if overrides and overrides.get("set_advantage_to_zero"):
        return np.zeros(length, dtype=np.float32)
    own_T: Float32 | None = group.advantages
    return np.full(length, advantage, dtype=np.float32) if own_T is None else own_T[span]


def _temperature(group: Group, fallback: float) -> float:
    """Temperature that the engine sampled at, which scales the logits of every logprob we compare."""
    value = (group.generation_params or {}).get("temperature")
    if value is None:
        return fallback
    # Engines report the unscaled distribution when they decode greedily (temperature 0).
    return float(value) if float(value) > 0 else 1.0


def _oldest(versions: Int32) -> int | None:
    known = versions[versions != NOT_SAMPLED]
    return int(known.min()) if len(known) else None
