"""The Atropos JSON form of a group, converted once to columns and back.

Masks hold -100 where a token is not trained and its id where it is; logprobs hold 1.0 where there is none. float32 columns
come back as the shortest decimals that read as the same float32.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from pydantic import FailFast, TypeAdapter

from atroposlib.errors import GroupFormatError
from atroposlib.wire.columns import Group
from atroposlib.wire.layout import NOT_SAMPLED, PADDING_LOGPROB, Float32, Int32
from atroposlib.wire.short_floats import short_decimals

NOT_TRAINED = -100
NO_LOGPROB = 1.0
NO_ENV_ID = -1
"""GroupHeader.env_id of a group whose sender named no environment."""
ENV_IDS = range(-(1 << 31), 1 << 31)
EXTRA_KEY = "atropos_json"
"""Where in a group's `extra` stands what the columns cannot say; see JsonFacts."""

KEYS = (
    "tokens", "masks", "scores", "advantages", "ref_logprobs", "messages", "generation_params", "inference_logprobs",
    "overrides", "group_overrides", "images", "env_id", "distill_token_ids", "distill_logprobs",
)  # fmt: skip
"""Every group that leaves in JSON carries all of these; both known trainers index them without a guard."""


class _FirstError(FailFast):
    """One error says it all: a list of a million wrong tokens is answered with the first. Hashable, as typing wants it."""

    __hash__ = object.__hash__


_FIRST_ERROR = _FirstError()
_Ints = Annotated[list[int], _FIRST_ERROR]
_Floats = Annotated[list[float], _FIRST_ERROR]
_IntRows = Annotated[list[_Ints], _FIRST_ERROR]
_FloatRows = Annotated[list[_Floats], _FIRST_ERROR]


class GroupFieldError(GroupFormatError):
    """A field of a group in JSON does not fit the other fields, or its column."""

    code: ClassVar[str] = "group_field"

    def __init__(self, text: str, *, field: str = "tokens") -> None:
        super().__init__(text)
        self.field = field


@dataclass(slots=True, kw_only=True)
class ScoredData:
    """One group as old clients post it. Unknown fields are ignored; an empty list stands for an absent column."""

    tokens: _IntRows
    masks: _IntRows
    scores: _Floats
    advantages: Annotated[list[float | _Floats], _FIRST_ERROR] | None = None
    """One list for each sequence, or one number (bare, or alone in its list) for each sequence."""
    ref_logprobs: _FloatRows | None = None
    messages: Any = None
    generation_params: dict[str, Any] | None = None
    inference_logprobs: _FloatRows | None = None
    overrides: list[dict[str, Any] | None] | None = None
    group_overrides: dict[str, Any] | None = None
    images: Any = None
    env_id: int | None = None
    distill_token_ids: Annotated[list[_IntRows], _FIRST_ERROR] | None = None
    distill_logprobs: Annotated[list[_FloatRows], _FIRST_ERROR] | None = None


class JsonFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the JSON form said that the columns cannot hold."""

    has_env_id: bool = True
    unsampled_logprobs: float | list[float] = NO_LOGPROB
    """inference_logprobs where masks hold -100: one value for all, or one for each in order."""
    distill_counts: list[int] | None = None
    """[T] candidates of each position, where positions differ; the columns are padded."""


_GROUP = msgspec.json.Decoder(ScoredData)
_PARTS = msgspec.json.Decoder(list[msgspec.Raw])
_LENIENT_GROUP = TypeAdapter(ScoredData)
_LENIENT_PARTS = TypeAdapter(list[Any])


def read_scored_data(body: bytes | memoryview | msgspec.Raw) -> ScoredData:
    """The group in a JSON text.

    Raises:
        pydantic.ValidationError: as FastAPI reports it, with the place of what is wrong.
    """
    try:
        return _GROUP.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # Numbers in quotes, 4.0 for 4, true for 1.0: rare and slow, but they were always taken.
        return _LENIENT_GROUP.validate_json(bytes(body))


def split_scored_data_list(body: bytes | memoryview) -> Sequence[bytes | memoryview | msgspec.Raw]:
    """The texts of the groups in a JSON list, to be read one by one: the numbers of all as Python objects take much memory.

    Raises:
        pydantic.ValidationError: not a JSON list.
    """
    try:
        return _PARTS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # NaN is no JSON, but was always read; whoever reads the group refuses it by name.
        return [json.dumps(part).encode() for part in _LENIENT_PARTS.validate_json(bytes(body))]


def group_from_json(data: ScoredData, *, group_id: str) -> Group:
    """Columns of an old client's group. Its policy version is unknown.

    Raises:
        GroupFieldError: lists that should have one entry for each token or sequence do not, or a value fits no column.
    """
    lengths = _lengths(data)
    tokens = _column("tokens", data.tokens, "i")
    masks = _column("masks", data.masks, "i")
    is_trained = masks != NOT_TRAINED
    logprobs, unsampled = _sampled_logprobs(data.inference_logprobs, is_trained)
    distill_ids, distill_logprobs, counts = _distillation(data, lengths)
    facts = JsonFacts(has_env_id=data.env_id is not None, unsampled_logprobs=unsampled, distill_counts=counts)
    return Group(
        group_id=group_id,
        env_id=NO_ENV_ID if data.env_id is None else data.env_id,
        tokens=tokens,
        cu_seqlens=np.array([0, *accumulate(lengths)], dtype=np.int32),
        loss_mask=is_trained.astype(np.uint8),
        inference_logprobs=logprobs,
        policy_versions=np.array([[NOT_SAMPLED, len(tokens)]], dtype=np.int32),
        scores=np.array(data.scores, dtype=np.float64),
        advantages=_advantages(data.advantages, lengths),
        ref_logprobs=_column("ref_logprobs", data.ref_logprobs, "f") if data.ref_logprobs else None,
        labels=masks if np.any((masks != tokens) & is_trained) else None,
        distill_token_ids=distill_ids,
        distill_logprobs=distill_logprobs,
        messages=data.messages,
        generation_params=data.generation_params,
        overrides=data.overrides or None,
        group_overrides=data.group_overrides,
        images=data.images,
        extra={EXTRA_KEY: kept} if (kept := msgspec.to_builtins(facts)) else {},
    )


def _lengths(data: ScoredData) -> list[int]:
    """Tokens of each sequence, once everything that must agree with them does."""
    lengths = [len(sequence) for sequence in data.tokens]
    if not lengths or 0 in lengths:
        raise GroupFieldError(
            f"tokens has sequences of {lengths[:8]} tokens; expected one sequence or more, none empty"
        )
    for name in ("masks", "ref_logprobs", "inference_logprobs", "distill_token_ids", "distill_logprobs"):
        rows = getattr(data, name)
        if (rows or name == "masks") and [len(row) for row in rows] != lengths:
            raise _ragged(name, [len(row) for row in rows], lengths)
    if len(data.scores) != len(lengths):
        raise GroupFieldError(
            f"scores has {len(data.scores)} entries, expected one for each of {len(lengths)} sequences", field="scores"
        )
    if data.overrides and len(data.overrides) < len(lengths):
        raise GroupFieldError(
            f"overrides has {len(data.overrides)} entries, expected one for each of {len(lengths)} sequences",
            field="overrides",
        )
    if data.env_id is not None and data.env_id not in ENV_IDS:
        raise GroupFieldError(f"env_id {data.env_id} does not fit 32 bits", field="env_id")
    return lengths


def _ragged(name: str, actual: Sequence[int], lengths: Sequence[int]) -> GroupFieldError:
    return GroupFieldError(
        f"{name} has rows of {list(actual[:8])} entries, tokens has {list(lengths[:8])}; they must be equal", field=name
    )


def _column(name: str, rows: Sequence[Sequence[Any]], code: Literal["i", "f"]) -> npt.NDArray[Any]:
    """[T] int32 or float32. struct packs a list of Python numbers several times faster than numpy reads it."""
    try:
        packed = b"".join([struct.pack(f"<{len(row)}{code}", *row) for row in rows])
    except (struct.error, OverflowError) as error:
        raise _no_fit(name, rows, code) from error
    return np.frombuffer(packed, dtype=f"<{code}4")


def _no_fit(name: str, rows: Iterable[Iterable[Any]], code: Literal["i", "f"]) -> GroupFieldError:
    limit = (1 << 31) - 1 if code == "i" else float(np.finfo(np.float32).max)
    wrong = next(value for value in chain.from_iterable(rows) if not -limit <= value <= limit)
    kind = "32-bit integers" if code == "i" else "32-bit floats"
    return GroupFieldError(f"{name} holds {wrong}; expected {kind}", field=name)


def _sampled_logprobs(
    rows: Sequence[Sequence[float]] | None, is_trained: npt.NDArray[np.bool_]
) -> tuple[Float32 | None, float | list[float]]:
    """[T] with 0.0 where nothing was sampled, and what stood there."""
    if not rows:
        return None, NO_LOGPROB
    logprobs: Float32 = _column("inference_logprobs", rows, "f")
    unsampled = logprobs[~is_trained]
    if not np.isfinite(unsampled).all():
        raise GroupFieldError(
            "inference_logprobs holds NaN or infinity; expected finite numbers", field="inference_logprobs"
        )
    cleared: Float32 = np.where(is_trained, logprobs, np.float32(0.0))
    if not len(unsampled) or np.all(unsampled == NO_LOGPROB):
        return cleared, NO_LOGPROB
    values: list[float] = short_decimals(unsampled).tolist()
    return cleared, values[0] if np.all(unsampled == unsampled[0]) else values


def _advantages(advantages: Sequence[float | list[float]] | None, lengths: Sequence[int]) -> Float32 | None:
    """[T] float32; one number for each sequence is spread over its tokens."""
    if not advantages:
        return None
    rows = [entry if isinstance(entry, list) else [entry] for entry in advantages]
    actual = [len(row) for row in rows]
    if actual != lengths:
        if actual != [1] * len(lengths):
            raise _ragged("advantages", actual, lengths)
        rows = [row * length for row, length in zip(rows, lengths, strict=True)]
    return _column("advantages", rows, "f")


def _distillation(data: ScoredData, lengths: Sequence[int]) -> tuple[Int32 | None, Float32 | None, list[int] | None]:
    """[T, K] candidates and their logprobs, and how many each position has where that differs."""
    fields = {name: getattr(data, name) for name in ("distill_token_ids", "distill_logprobs") if getattr(data, name)}
    counts = {name: [len(position) for row in rows for position in row] for name, rows in fields.items()}
    if len(counts) == 2 and counts["distill_token_ids"] != counts["distill_logprobs"]:
        raise GroupFieldError(
            "distill_logprobs has other numbers of candidates than distill_token_ids; expected one for each",
            field="distill_logprobs",
        )
    each = next(iter(counts.values()), [])
    width = max(each, default=0)
    if width == 0:
        return None, None, None
    ids = _candidates("distill_token_ids", data.distill_token_ids, each, width)
    logprobs = _candidates("distill_logprobs", data.distill_logprobs, each, width)
    return ids, logprobs, each if min(each) < width else None


def _candidates(
    name: Literal["distill_token_ids", "distill_logprobs"], rows: Any, counts: Sequence[int], width: int
) -> npt.NDArray[Any] | None:
    if not rows:
        return None
    is_ids = name == "distill_token_ids"
    values = _column(name, [position for row in rows for position in row], "i" if is_ids else "f")
    padded = np.full((len(counts), width), 0 if is_ids else PADDING_LOGPROB, dtype=values.dtype)
    padded[_is_candidate(counts, width)] = values
    return padded


def _is_candidate(counts: Sequence[int], width: int) -> npt.NDArray[np.bool_]:
    """[T, K] True where a position has a candidate."""
    mask: npt.NDArray[np.bool_] = np.arange(width) < np.asarray(counts)[:, None]
    return mask


def group_to_json(group: Group) -> dict[str, Any]:
    """All 14 keys of the Atropos form, null where absent."""
    trained = group.loss_mask == 1
    labels = group.tokens if group.labels is None else group.labels
    facts = _facts(group)
    columns: dict[str, Any] = {
        "tokens": _rows(group, group.tokens),
        "masks": _rows(group, np.where(trained, labels, NOT_TRAINED)),
        "scores": group.scores.tolist(),
        "advantages": _rows(group, group.advantages),
        "ref_logprobs": _rows(group, group.ref_logprobs),
        "inference_logprobs": _rows(group, _all_logprobs(group, trained, facts)),
        "env_id": group.env_id if facts.has_env_id else None,
        "distill_token_ids": _candidate_rows(group, group.distill_token_ids, facts),
        "distill_logprobs": _candidate_rows(group, group.distill_logprobs, facts),
    }
    return {key: columns[key] if key in columns else getattr(group, key) for key in KEYS}


def group_to_json_text(group: Group) -> bytes:
    """group_to_json, written out."""
    return msgspec.json.encode(group_to_json(group))


def _facts(group: Group) -> JsonFacts:
    # Any sender may write into `extra`; what cannot have come from here says nothing.
    try:
        return msgspec.convert(group.extra.get(EXTRA_KEY, {}), JsonFacts)
    except msgspec.ValidationError:
        return JsonFacts()


def _all_logprobs(group: Group, trained: npt.NDArray[np.bool_], facts: JsonFacts) -> npt.NDArray[np.float64] | None:
    """[T] logprobs where something was sampled, and what the sender wrote elsewhere."""
    if group.inference_logprobs is None:
        return None
    n_unsampled = len(trained) - int(np.count_nonzero(trained))
    unsampled = facts.unsampled_logprobs
    is_known = isinstance(unsampled, float) or len(unsampled) == n_unsampled
    logprobs = np.empty(len(trained), dtype=np.float64)
    logprobs[trained] = short_decimals(group.inference_logprobs[trained])
    logprobs[~trained] = unsampled if is_known else NO_LOGPROB
    return logprobs


def _rows(group: Group, column: npt.NDArray[Any] | None) -> list[Any] | None:
    """The column cut into sequences."""
    if column is None:
        return None
    flat: list[Any] = (short_decimals(column) if column.dtype == np.float32 else column).tolist()
    return [flat[start:end] for start, end in pairwise(group.cu_seqlens.tolist())]


def _candidate_rows(group: Group, column: npt.NDArray[Any] | None, facts: JsonFacts) -> list[Any] | None:
    if column is None:
        return None
    n_positions, width = column.shape
    counts = facts.distill_counts
    if counts is None or len(counts) != n_positions or not all(0 <= count <= width for count in counts):
        counts = [width] * n_positions
    values = column[_is_candidate(counts, width)]
    flat = (short_decimals(values) if column.dtype == np.float32 else values).tolist()
    positions = [flat[start:end] for start, end in pairwise([0, *accumulate(counts)])]
    return [positions[start:end] for start, end in pairwise(group.cu_seqlens.tolist())]
