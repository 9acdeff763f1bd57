from __future__ import annotations

import pytest

from atroposlib.errors import GroupFormatError
from atroposlib.wire.columns import decode_groups, encode_group
from atroposlib.wire.json_codec import KEYS, ScoredData, group_from_json, group_to_json


def test_an_atropos_group_comes_back_with_every_key_and_the_same_values() -> None:
    data = ScoredData(
        tokens=[[1, 2, 3], [4, 5]],
        masks=[[-100, 2, 3], [-100, 5]],
        scores=[1.0, 0.0],
        inference_logprobs=[[1.0, -0.5, -0.25], [1.0, -2.0]],
        overrides=[{"set_advantage_to_zero": True}, {}],
        env_id=4,
    )

    (group,) = decode_groups(encode_group(group_from_json(data, group_id="g")))
    back = group_to_json(group)

    assert set(back) == set(KEYS)
    assert back["tokens"] == data.tokens
    assert back["masks"] == data.masks
    assert back["inference_logprobs"] == data.inference_logprobs
    assert back["overrides"] == data.overrides
    assert back["env_id"] == 4
    assert back["advantages"] is None


def test_a_mask_that_is_not_the_token_id_survives() -> None:
    data = ScoredData(tokens=[[1, 2]], masks=[[-100, 9]], scores=[0.0])

    assert group_to_json(group_from_json(data, group_id="g"))["masks"] == [[-100, 9]]


def test_one_advantage_for_a_sequence_is_spread_over_its_tokens() -> None:
    data = ScoredData(tokens=[[1, 2], [3]], masks=[[1, 2], [3]], scores=[0.0, 1.0], advantages=[0.5, -0.5])

    assert group_to_json(group_from_json(data, group_id="g"))["advantages"] == [[0.5, 0.5], [-0.5]]


def test_ragged_rows_name_the_field() -> None:
    with pytest.raises(GroupFormatError, match="masks has rows of"):
        group_from_json(ScoredData(tokens=[[1, 2]], masks=[[1]], scores=[0.0]), group_id="g")
