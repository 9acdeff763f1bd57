from __future__ import annotations

import json
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load as safetensors_load

from atroposlib.errors import GroupFormatError
from atroposlib.wire.columns import Group, build_group, decode_groups, encode_group, read_blobs
from tests.builders import a_group


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    version=st.integers(0, 3),
    count=st.integers(1, 3),
)
def test_groups_survive_the_wire_unchanged_however_many_share_a_body(
    lengths: list[int], version: int, count: int
) -> None:
    group = build_group(
        group_id="g",
        env_id=3,
        tokens=[list(range(n)) for n in lengths],
        loss_masks=[[1] * n for n in lengths],
        inference_logprobs=[[-0.25] * n for n in lengths],
        versions=[[(version, n)] for n in lengths],
        scores=[float(n) for n in lengths],
        ticket="t",
        messages=[{"role": "user", "content": "π"}],
        generation_params={"temperature": 0.7},
    )

    decoded = decode_groups(encode_group(group) * count)

    assert len(decoded) == count
    for other in decoded:
        assert other.tokens.tolist() == group.tokens.tolist()
        assert other.cu_seqlens.tolist() == group.cu_seqlens.tolist()
        assert other.versions_per_token().tolist() == [version] * sum(lengths)
        assert (other.ticket, other.messages, other.generation_params) == (
            "t",
            [{"role": "user", "content": "π"}],
            {"temperature": 0.7},
        )


def test_a_blob_is_a_safetensors_file_that_other_tools_can_read() -> None:
    columns = safetensors_load(encode_group(a_group(n=2)))

    assert columns["tokens"].dtype == np.int32
    assert columns["cu_seqlens"].tolist() == [0, 7, 14]


def test_the_payload_costs_about_nine_bytes_a_token() -> None:
    blob = encode_group(a_group(n=8, prompt=100, completion=1948))

    assert len(blob) / (8 * 2048) < 9.2


def _with(group: Group, **changes: object) -> bytes:
    from dataclasses import replace

    return encode_group(replace(group, **changes))  # type: ignore[arg-type]


def test_numpy_values_in_header_facts_become_json_values() -> None:
    overrides = [{"weight": np.float32(0.5)}, {"steps": np.arange(2), "on": np.bool_(True)}]

    [decoded] = decode_groups(_with(a_group(), overrides=overrides, extra={"n": np.int64(3)}))

    assert decoded.overrides == [{"weight": 0.5}, {"steps": [0, 1], "on": True}]
    assert decoded.extra == {"n": 3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", [{"content": object()}]),
        ("generation_params", {("a", "b"): 1}),
        ("images", "\ud800"),
        ("extra", {"x": np.longdouble(1)}),
        ("tokens", [1 << 40] * 14),
        ("scores", ["good", "bad"]),
    ],
)
def test_what_cannot_be_encoded_names_the_group_and_the_field(field: str, value: object) -> None:
    with pytest.raises(GroupFormatError, match=f"group 'g7': .*'{field}'"):
        _with(a_group("g7"), **{field: value})


BAD: dict[str, Callable[[], bytes]] = {
    "nan in scores": lambda: _with(a_group(), scores=np.array([0.0, np.nan])),
    "infinite logprob": lambda: _with(a_group(), inference_logprobs=np.full(14, -np.inf, np.float32)),
    "ragged logprobs": lambda: _with(a_group(), inference_logprobs=np.zeros(13, np.float32)),
    "ragged scores": lambda: _with(a_group(), scores=np.zeros(3)),
    "negative token": lambda: _with(a_group(), tokens=np.full(14, -1, np.int32)),
    "mask of 2": lambda: _with(a_group(), loss_mask=np.full(14, 2, np.uint8)),
    "empty sequence": lambda: _with(a_group(), cu_seqlens=np.array([0, 0, 14], np.int32)),
    "cu_seqlens beyond the end": lambda: _with(a_group(), cu_seqlens=np.array([0, 7, 15], np.int32)),
    "no sequence": lambda: _with(
        a_group(), cu_seqlens=np.array([0], np.int32), scores=np.zeros(0), tokens=np.zeros(0, np.int32)
    ),
    "version runs too short": lambda: _with(a_group(), policy_versions=np.array([[0, 13]], np.int32)),
    "empty group id": lambda: _with(a_group(), group_id=""),
    "finish reasons for others": lambda: _with(a_group(), finish_reasons=("stop",)),
    "overrides for others": lambda: _with(a_group(), overrides=[{"sft": True}]),
    "truncated": lambda: encode_group(a_group())[:-1],
    "header length only": lambda: struct.pack("<Q", 10),
    "three bytes": lambda: b"abc",
    "huge header": lambda: struct.pack("<Q", 1 << 40) + b"{}",
    "not json": lambda: struct.pack("<Q", 4) + b"nope",
    "no metadata": lambda: struct.pack("<Q", 2) + b"{}",
    "offsets that lie": lambda: _lying_offsets(),
    "unknown column": lambda: _renamed_column(),
    "negative shape": lambda: _negative_shape(),
}


def _edit_header(change: object) -> bytes:
    blob = encode_group(a_group())
    (length,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + length])
    change(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + blob[8 + length :]


def _lying_offsets() -> bytes:
    return _edit_header(lambda header: header["tokens"].update(data_offsets=[0, 4]))


def _renamed_column() -> bytes:
    return _edit_header(lambda header: header.update(surprise=header.pop("tokens")))


def _negative_shape() -> bytes:
    return _edit_header(lambda header: header["policy_versions"].update(shape=[-4, -2]))


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_group_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(GroupFormatError) as caught:
        list(read_blobs(BAD[name]()))

    assert len(str(caught.value)) > 20


def test_the_version_range_in_the_header_is_checked_against_the_tokens() -> None:
    body = _edit_header(
        lambda header: header["__metadata__"].update(
            group=header["__metadata__"]["group"].replace('"oldest_version":0', '"oldest_version":7')
        )
    )

    with pytest.raises(GroupFormatError, match="header says versions"):
        list(read_blobs(body))
