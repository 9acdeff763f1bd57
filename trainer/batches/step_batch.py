"""What one optimizer step trains on: the sequences of its groups, each with advantage and temperature.

Every rank builds the same StepBatch from the whole batch, so all averages over the batch are known without talking.
No torch here: tensors are made in micro_batch.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from atroposlib.wire.columns import Group
from atroposlib.wire.layout import NOT_SAMPLED, Float32, Float64, Int32
from trainer.batches.advantages import AdvantageScale, batch_advantages
from trainer.errors import StalenessError, TrainerError

Overlong = Literal["mask", "keep", "soft"]
OVERLONG: tuple[Overlong, ...] = get_args(Overlong)


@dataclass(frozen=True)
class TrainSequence:
    """One trajectory, ready for the loss. L: its tokens, K: candidates of the teacher."""

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
    targets_L: Int32
    """What the model is to say at each place: the tokens, or the sender's labels where it gave some."""
    is_supervised_L: npt.NDArray[np.bool_]
    """Tokens that are learnt as they are (override sft, or a label that differs from the token), without an advantage."""
    ref_logprobs_L: Float32 | None = None
    """Nats, under the reference policy, where the environment knows them."""
    distill_token_ids_LK: Int32 | None = None
    """The teacher's likeliest tokens at each place."""
    distill_logprobs_LK: Float32 | None = None
    """Nats; PADDING_LOGPROB where a place has fewer candidates."""

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

    @property
    def candidates(self) -> int:
        """Most tokens that a teacher names for one place, K; 0 without a teacher."""
        columns = (sequence.distill_token_ids_LK for sequence in self.sequences)
        return max((column.shape[1] for column in columns if column is not None), default=0)

    @property
    def lacks_ref_logprobs(self) -> bool:
        """Whether some trained sequence comes without the reference's logprobs."""
        return any(sequence.ref_logprobs_L is None for sequence in self.sequences if sequence.trained_tokens)

    @property
    def lacks_inference_logprobs(self) -> bool:
        """Whether some trained sequence comes without the engine's logprobs."""
        return any(sequence.inference_logprobs_L is None for sequence in self.sequences if sequence.trained_tokens)

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
    unbias_log_probabilities: bool = True,
    max_completion_length: int | None = None,
    overlong_cache: int | None = None,
    left_out: Collection[tuple[int, int]] = (),
) -> StepBatch:
    """Turn leased groups into what the loss needs.

    Args:
        step: counted from 0.
        groups: as leased, in the server's order.
        advantage_scale: how rewards become advantages, where a group does not bring its own.
        overlong: mask: sequences cut by a length limit get no loss (their reward still counts). soft: long completions
            lose reward, see overlong_penalty.
        temperature: of groups that do not say theirs.
        unbias_log_probabilities: logprobs at the sampling temperature; False: at temperature 1.
        max_completion_length, overlong_cache: tokens, for soft.
        left_out: (place of a group, place of its sequence) that get no loss; their rewards count.
    Raises:
        TrainerError: the batch is empty.
        ValueError: soft without its lengths.
    """
    if not groups:
        raise TrainerError(f"the rollout server sent an empty batch for step {step}")
    rewards = [group.scores for group in groups]
    if overlong == "soft":
        rewards = [_softened(group, max_completion_length, overlong_cache) for group in groups]
    advantages = batch_advantages(rewards, scale=advantage_scale)
    rule = _SequenceRule(
        is_masked=overlong == "mask",
        temperature=temperature if unbias_log_probabilities else None,
        left_out=frozenset(left_out),
    )
    sequences = [
        sequence for index, group in enumerate(groups) for sequence in _sequences(index, group, advantages[index], rule)
    ]
    return StepBatch(
        step=step,
        group_ids=tuple(group.group_id for group in groups),
        rewards=tuple(group.scores for group in groups),
        sequences=tuple(sequences),
    )


def overlong_penalty(completion_tokens_N: Int32, *, max_completion_length: int, overlong_cache: int) -> Float64:
    """[N] what is added to the reward of a long completion: 0 up to max - cache tokens, then falling to -1 at max.

    Source: Yu et al. 2025, arXiv:2503.14476 (soft overlong punishment).
    """
    over_N = completion_tokens_N - (max_completion_length - overlong_cache)
    return -np.clip(over_N / overlong_cache, 0.0, 1.0)


def _softened(group: Group, max_completion_length: int | None, overlong_cache: int | None) -> Float64:
    if max_completion_length is None or overlong_cache is None:
        raise ValueError("overlong 'soft' needs max_completion_length and overlong_cache")
    sampled_N = np.add.reduceat(group.loss_mask, group.cu_seqlens[:-1], dtype=np.int32)
    return group.scores + overlong_penalty(
        sampled_N, max_completion_length=max_completion_length, overlong_cache=overlong_cache
    )


@dataclass(frozen=True)
class _SequenceRule:
    is_masked: bool
    """Truncated sequences get no loss."""
    temperature: float | None
    """Of groups that do not say theirs; None: logprobs at temperature 1, whatever they say."""
    left_out: frozenset[tuple[int, int]]


def _sequences(group_index: int, group: Group, advantages_N: Float64, rule: _SequenceRule) -> Iterator[TrainSequence]:
    versions_T = group.versions_per_token()
    ids_TK: Int32 | None = group.distill_token_ids if group.distill_logprobs is not None else None
    for i in range(group.n_sequences):
        span = slice(int(group.cu_seqlens[i]), int(group.cu_seqlens[i + 1]))
        override = (group.overrides[i] if group.overrides else None) or {}
        is_sampled_L = group.loss_mask[span] != 0
        is_truncated = bool(group.finish_reasons) and group.finish_reasons[i] == "length"
        is_trained_L = is_sampled_L.copy()
        is_trained_L[0] = False  # nothing comes before the first token, so nothing predicts it
        if (is_truncated and rule.is_masked) or (group_index, i) in rule.left_out:
            is_trained_L[:] = False
        tokens_L = group.tokens[span]
        targets_L = tokens_L if group.labels is None else group.labels[span]
        yield TrainSequence(
            group_index=group_index,
            tokens_L=tokens_L,
            is_trained_L=is_trained_L,
            inference_logprobs_L=_part(group.inference_logprobs, span),
            advantages_L=_advantages(group, override, span, float(advantages_N[i])),
            temperature=_temperature(group, override, rule.temperature),
            reward=float(group.scores[i]),
            completion_tokens=int(is_sampled_L.sum()),
            is_truncated=is_truncated,
            oldest_version=_oldest(versions_T[span][is_trained_L]),
            targets_L=targets_L,
            is_supervised_L=(targets_L != tokens_L) | _is_sft(group, override),
            ref_logprobs_L=_part(group.ref_logprobs, span),
            distill_token_ids_LK=None if ids_TK is None else ids_TK[span],
            distill_logprobs_LK=_part(group.distill_logprobs, span),
        )


def _part(column_T: Float32 | None, span: slice) -> Float32 | None:
    return None if column_T is None else column_T[span]


def _is_sft(group: Group, override: Mapping[str, Any]) -> bool:
    return bool(override.get("sft") or (group.group_overrides or {}).get("sft"))


def _advantages(group: Group, override: Mapping[str, Any], span: slice, advantage: float) -> Float32:
    """Per token: the environment's own where it sends them, else one value for the whole sequence."""
    length = span.stop - span.start
    if override.get("set_advantage_to_zero"):
        return np.zeros(length, dtype=np.float32)
    own_T: Float32 | None = group.advantages
    return np.full(length, advantage, dtype=np.float32) if own_T is None else own_T[span]


def _temperature(group: Group, override: Mapping[str, Any], fallback: float | None) -> float:
    """Temperature that the engine sampled at, which scales the logits of every logprob we compare."""
    if fallback is None:
        return 1.0
    sources = (override, group.generation_params or {}, group.group_overrides or {})
    value = next((found for source in sources if (found := source.get("temperature")) is not None), fallback)
    # Engines report the unscaled distribution when they decode greedily (temperature 0).
    return float(value) if float(value) > 0 else 1.0


def _oldest(versions: Int32) -> int | None:
    known = versions[versions != NOT_SAMPLED]
    return int(known.min()) if len(known) else None
