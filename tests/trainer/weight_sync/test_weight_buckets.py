"""What the plan of a transfer promises: nothing lost, nothing overlapping, nothing out of order."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.weight_sync.transports.buckets import ALIGNMENT_BYTES, TensorSpec, lay_out, plan_buckets
from trainer.weight_sync.transports.gloo import packed_buckets

DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "int64", "uint8", "bool"])
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@st.composite
def tensor_specs(draw: st.DrawFn) -> list[TensorSpec]:
    kinds = draw(st.lists(st.tuples(DTYPES, SHAPES), max_size=12))
    return [TensorSpec(f"layer.{i}", dtype_name, shape) for i, (dtype_name, shape) in enumerate(kinds)]


@given(specs=tensor_specs(), capacity_bytes=st.integers(1, 2000))
def test_every_tensor_travels_once_and_in_order(specs: list[TensorSpec], capacity_bytes: int) -> None:
    buckets = list(plan_buckets(specs, capacity_bytes=capacity_bytes))

    assert [spec for bucket in buckets for spec in bucket.specs] == specs
    assert all(bucket.slots for bucket in buckets)


@given(specs=tensor_specs(), capacity_bytes=st.integers(1, 2000))
def test_no_bucket_overflows_unless_one_tensor_does(specs: list[TensorSpec], capacity_bytes: int) -> None:
    for bucket in plan_buckets(specs, capacity_bytes=capacity_bytes):
        assert bucket.size_bytes <= capacity_bytes or len(bucket.slots) == 1


@given(specs=tensor_specs(), capacity_bytes=st.integers(1, 2000))
def test_no_two_neighbouring_buckets_would_fit_into_one(specs: list[TensorSpec], capacity_bytes: int) -> None:
    buckets = list(plan_buckets(specs, capacity_bytes=capacity_bytes))

    for left, right in pairwise(buckets):
        assert lay_out([*left.specs, right.specs[0]]).size_bytes > capacity_bytes


@given(specs=tensor_specs())
def test_tensors_lie_aligned_and_do_not_overlap(specs: list[TensorSpec]) -> None:
    bucket = lay_out(specs)

    assert all(slot.offset_bytes % ALIGNMENT_BYTES == 0 for slot in bucket.slots)
    assert all(left.end_bytes <= right.offset_bytes for left, right in pairwise(bucket.slots))
    assert all(slot.end_bytes <= bucket.size_bytes for slot in bucket.slots)


@given(specs=tensor_specs(), capacity_bytes=st.integers(1, 2000))
def test_the_receiver_lays_a_bucket_out_as_the_sender_did(specs: list[TensorSpec], capacity_bytes: int) -> None:
    for bucket in plan_buckets(specs, capacity_bytes=capacity_bytes):
        assert lay_out(bucket.specs) == bucket


@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16", "int64", "float8_e4m3fn", "bool"])
def test_sizes_are_torch_sizes(dtype_name: str) -> None:
    tensor = torch.empty(3, 5, dtype=getattr(torch, dtype_name))

    assert TensorSpec("weight", dtype_name, (3, 5)).size_bytes == tensor.numel() * tensor.element_size()


def test_an_unknown_dtype_is_refused_by_the_name_of_its_tensor() -> None:
    with pytest.raises(ValueError, match=r"lm_head\.weight.*complex64"):
        lay_out([TensorSpec("lm_head.weight", "complex64", (2,))])


@given(specs=tensor_specs(), capacity_bytes=st.integers(1, 2000))
def test_packing_keeps_values_and_converts_only_floating_point(specs: list[TensorSpec], capacity_bytes: int) -> None:
    weights = [
        (spec.name, (torch.arange(torch.Size(spec.shape).numel()) % 2).to(getattr(torch, spec.dtype_name)))
        for spec in specs
    ]
    weights = [(name, flat.view(spec.shape)) for (name, flat), spec in zip(weights, specs, strict=True)]

    arrived: dict[str, torch.Tensor] = {}
    for bucket, buffer in packed_buckets(weights, [], capacity_bytes=capacity_bytes, dtype=torch.bfloat16):
        for slot in bucket.slots:
            view = buffer[slot.offset_bytes : slot.end_bytes].view(getattr(torch, slot.spec.dtype_name))
            arrived[slot.spec.name] = view.view(slot.spec.shape).clone()

    assert list(arrived) == [name for name, _ in weights]
    for name, sent in weights:
        assert arrived[name].dtype == (torch.bfloat16 if sent.is_floating_point() else sent.dtype)
        assert torch.equal(arrived[name].to(sent.dtype), sent)


def test_buffers_are_used_again_and_grow_where_they_must() -> None:
    buffers: list[torch.Tensor] = []
    sizes = ((8, 8), (4, 8, 2), (100_000,))
    for value, lengths in enumerate(sizes, start=1):
        weights = [(f"w{i}", torch.full((length,), float(value))) for i, length in enumerate(lengths)]
        before = [buffer.data_ptr() for buffer in buffers]

        packed = list(packed_buckets(weights, buffers, capacity_bytes=16, dtype=torch.bfloat16))

        for (bucket, buffer), length in zip(packed, lengths, strict=True):
            assert bucket.size_bytes == 2 * length
            assert buffer.view(torch.bfloat16).tolist() == [float(value)] * length
        if value == 2:
            assert [buffer.data_ptr() for buffer in buffers][:2] == before
