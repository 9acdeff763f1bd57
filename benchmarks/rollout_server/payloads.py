"""Groups encoded once; each sending only overwrites their ids, which all have the same length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from atroposlib.wire.columns import Group, encode_group
from atroposlib.wire.layout import NOT_SAMPLED
from benchmarks.rollout_server.shapes import Shape

ID_DIGITS = 24
PLACEHOLDER = b"9" * ID_DIGITS
PROMPT_SHARE = 4
"""One token in so many is prompt."""


def id_text(number: int) -> bytes:
    """The id of the group with this number."""
    return b"%024d" % number


@dataclass(frozen=True)
class EncodedGroup:
    """One group as bytes, with the place of its id."""

    data: bytes

    @cached_property
    def id_at(self) -> int:
        """Offset of the id."""
        at = self.data.find(PLACEHOLDER)
        if at < 0 or self.data.find(PLACEHOLDER, at + 1) >= 0:
            raise ValueError("the placeholder id must occur exactly once in an encoded group")
        return at

    def stamped(self, number: int) -> bytes:
        """The group with this number's id."""
        at = self.id_at
        return self.data[:at] + id_text(number) + self.data[at + ID_DIGITS :]


@dataclass(frozen=True)
class Payload:
    """The groups of one request, and the request body they make."""

    groups: Sequence[EncodedGroup]
    opening: bytes = b""
    separator: bytes = b""
    closing: bytes = b""

    @cached_property
    def id_offsets(self) -> Sequence[int]:
        """Where each group's id is in the body."""
        offsets, at = [], len(self.opening)
        for group in self.groups:
            offsets.append(at + group.id_at)
            at += len(group.data) + len(self.separator)
        return offsets

    def body(self) -> bytearray:
        """A new body, to be stamped again for each request."""
        joined = self.separator.join(group.data for group in self.groups)
        return bytearray(self.opening + joined + self.closing)

    def stamp(self, body: bytearray, first: int) -> range:
        """Give the body's groups the numbers from `first`, a multiple of their count; returns the numbers."""
        for i, at in enumerate(self.id_offsets):
            body[at : at + ID_DIGITS] = id_text(first + i)
        return range(first, first + len(self.groups))

    def original(self, number: int) -> bytes:
        """What the group with this number must look like."""
        return self.groups[number % len(self.groups)].stamped(number)


def sample_group(shape: Shape, seed: int) -> Group:
    """A group like a real one: a quarter prompt, ids of a 128k vocabulary, logprobs with all their digits."""
    rng = np.random.default_rng(seed)
    prompt = shape.tokens_each // PROMPT_SHARE
    mask = np.tile((np.arange(shape.tokens_each) >= prompt).astype(np.uint8), shape.sequences)
    run = [[NOT_SAMPLED, prompt], [0, shape.tokens_each - prompt]]
    return Group(
        group_id=PLACEHOLDER.decode(),
        env_id=0,
        tokens=rng.integers(0, 128_000, shape.tokens, dtype=np.int32),
        cu_seqlens=np.arange(shape.sequences + 1, dtype=np.int32) * shape.tokens_each,
        loss_mask=mask,
        policy_versions=np.array([part for part in run if part[1]] * shape.sequences, dtype=np.int32),
        scores=rng.random(shape.sequences),
        inference_logprobs=np.where(mask, -rng.exponential(0.3, shape.tokens), 0.0).astype(np.float32),
        finish_reasons=("stop",) * shape.sequences,
    )


def columns_payload(shape: Shape, groups: int) -> Payload:
    """The native encoding: blobs one after another."""
    return Payload([EncodedGroup(encode_group(sample_group(shape, seed))) for seed in range(groups)])


def json_payload(shape: Shape, groups: int) -> Payload:
    """The old encoding: a list of objects. Their ids ride in group_overrides, which every server hands on."""
    encoded = [EncodedGroup(msgspec.json.encode(json_group(shape, seed))) for seed in range(groups)]
    return Payload(encoded, b"[", b",", b"]")


def single_json_payload(shape: Shape) -> Payload:
    """One object without a list around it."""
    return Payload([EncodedGroup(msgspec.json.encode(json_group(shape, 0)))])


def json_group(shape: Shape, seed: int) -> dict[str, object]:
    """What an old environment sends for a sample group: logprobs with the digits that inference servers answer with."""
    group = sample_group(shape, seed)
    assert group.inference_logprobs is not None
    trained, wide = group.loss_mask == 1, group.inference_logprobs.astype(np.float64)

    def rows(column: npt.NDArray[Any]) -> list[Any]:
        return list(column.reshape(shape.sequences, shape.tokens_each).tolist())

    return {
        "tokens": rows(group.tokens),
        "masks": rows(np.where(trained, group.tokens, -100)),
        "scores": group.scores.tolist(),
        "inference_logprobs": rows(np.where(trained, wide, 1.0)),
        "env_id": 0,
        "group_overrides": {"id": PLACEHOLDER.decode()},
    }


def widened(logprobs: list[list[float]]) -> list[list[float]]:
    """Single-precision numbers with all their digits, however few they were written with."""
    return [np.array(row, dtype=np.float32).astype(np.float64).tolist() for row in logprobs]
