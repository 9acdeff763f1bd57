"""From an author's group to columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atroposlib.envs.base import BaseEnvConfig
from atroposlib.envs.server_handling.sessions.provenance import Origin, Origins, remember, remember_origins
from atroposlib.envs.serving.delivery import drop_reason, wire_group
from atroposlib.envs.serving.grouping import merge_trajectories
from atroposlib.errors import GroupFormatError
from atroposlib.type_definitions import ScoredDataGroup
from atroposlib.wire.columns import Group
from tests.envs.fakes import a_scored_group


def to_wire(group: Any, origins: Origins | None = None, fallback_version: int = 9) -> Group:
    return wire_group(
        group,
        group_id="g",
        env_id=0,
        run_id="run-id",
        ticket=None,
        origins=origins or {},
        fallback_version=fallback_version,
    )


def bare(group: ScoredDataGroup) -> dict[str, Any]:
    """As upstream environments build it: tokens, masks, scores."""
    return {name: group[name] for name in ("tokens", "masks", "scores")}


def test_what_the_author_left_out_comes_from_the_session_that_sampled_it() -> None:
    group = a_scored_group(length=5)
    with remember_origins() as origins:
        for tokens in group["tokens"]:
            remember(
                tokens,
                Origin(logprobs=[1.0, 1.0, -0.1, -0.2, -0.3], versions=[(-1, 2), (4, 3)], finish_reason="length"),
            )

    wired = to_wire(bare(group), origins)

    assert wired.inference_logprobs is not None
    assert (
        wired.inference_logprobs.round(3).tolist()
        == [0.0, 0.0, pytest.approx(-0.1), pytest.approx(-0.2), pytest.approx(-0.3)] * 2
    )
    assert wired.versions_per_token().tolist() == [-1, -1, 4, 4, 4] * 2
    assert wired.finish_reasons == ("length", "length")


def test_identical_sequences_each_keep_their_own_origin() -> None:
    group = a_scored_group(length=3)
    group["tokens"] = group["masks"] = [[5, 6, 7]] * 3
    group["scores"] = [0.0, 1.0, 1.0]
    with remember_origins() as origins:
        remember([5, 6, 7], Origin(logprobs=[-1.0] * 3, versions=[(3, 3)], finish_reason="length"))
        remember([5, 6, 7], Origin(logprobs=[-2.0] * 3, versions=[(4, 3)], finish_reason="stop"))

    wired = to_wire(bare(group), origins)

    assert wired.policy_versions.tolist() == [[3, 3], [4, 3], [4, 3]]
    assert wired.inference_logprobs is not None
    assert wired.inference_logprobs.tolist() == [-1.0] * 3 + [-2.0] * 6
    assert wired.finish_reasons == ("length", "stop", "stop")


def test_hand_made_tokens_get_the_tickets_version_and_no_invented_logprobs() -> None:
    wired = to_wire(bare(a_scored_group(length=4)), fallback_version=6)

    assert wired.inference_logprobs is None
    assert wired.versions_per_token().tolist() == [-1, -1, 6, 6] * 2


def test_no_run_of_versions_spans_two_sequences() -> None:
    tokens = [[1, 2, 3], [4, 5]]
    wired = to_wire({"tokens": tokens, "masks": tokens, "scores": [0.0, 1.0]}, fallback_version=6)

    assert wired.policy_versions.tolist() == [[6, 3], [6, 2]]


@pytest.mark.parametrize("column", ["masks", "inference_logprobs", "policy_versions"])
def test_columns_that_do_not_fit_their_sequence_are_refused(column: str) -> None:
    group: Any = a_scored_group(length=5)
    group[column] = [group[column][0], [(0, 4)] if column == "policy_versions" else group[column][1][:4]]

    with pytest.raises(GroupFormatError, match=r"4 .*5 tokens|cover 4 tokens of 5"):
        to_wire(group)


def test_logprobs_of_some_sequences_only_are_an_error() -> None:
    group = a_scored_group()
    group["tokens"][1] = [*group["tokens"][1][:-1], 77]
    group["masks"][1] = [*group["masks"][1][:-1], 77]
    with remember_origins() as origins:
        remember(group["tokens"][0], Origin(logprobs=[0.0] * 5, versions=[(-1, 2), (4, 3)], finish_reason="stop"))

    with pytest.raises(GroupFormatError, match="sequence 1: 0 inference_logprobs for 5 tokens"):
        to_wire(bare(group), origins)


def test_labels_travel_only_where_masks_say_more_than_a_bit() -> None:
    group = a_scored_group(length=4)
    assert to_wire(group).labels is None

    group["masks"][0][3] = 99
    labels = to_wire(group).labels
    assert labels is not None
    assert labels.tolist() == [-100, -100, 10, 99, -100, -100, 10, 11]


def test_one_advantage_a_sequence_stands_for_all_its_tokens() -> None:
    advantages = to_wire({**a_scored_group(length=3), "advantages": [0.5, [0.0, 0.0, -1.0]]}).advantages

    assert advantages is not None
    assert advantages.tolist() == [0.5, 0.5, 0.5, 0.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("group", "config", "reason"),
    [
        (a_scored_group((0.0, 1.0)), {}, None),
        (a_scored_group((1.0, 1.0)), {}, "zero_variance"),
        (a_scored_group((1.0, 1.0)), {"ensure_scores_are_not_same": False}, None),
        (a_scored_group((0.0, 1.0)), {"group_size": 4}, "wrong_size"),
        (a_scored_group((0.0, 1.0)), {"group_size": 4, "min_valid_per_group": 2}, None),
        ({**a_scored_group((0.0, 1.0)), "group_overrides": {"group_size": 2}}, {"group_size": 4}, None),
        ({**a_scored_group((0.0, 1.0)), "group_overrides": None}, {}, None),
        (a_scored_group(length=30), {}, "too_long"),
        ({"tokens": [], "masks": [], "scores": []}, {}, "empty"),
    ],
)
def test_what_may_be_sent(group: Any, config: dict[str, Any], reason: str | None) -> None:
    assert drop_reason(group, BaseEnvConfig(**{"group_size": 2, **config}), max_token_len=29) == reason


def test_single_trajectories_merge_with_every_column_that_all_have() -> None:
    group = a_scored_group()
    items: list[Any] = [
        {
            "tokens": group["tokens"][i],
            "masks": group["masks"][i],
            "scores": group["scores"][i],
            "inference_logprobs": [0.0] * 5,
        }
        for i in range(2)
    ]
    items[0]["messages"] = "only one has it"

    merged = merge_trajectories(items)

    assert merged["tokens"] == group["tokens"]
    assert merged["inference_logprobs"] == [[0.0] * 5] * 2
    assert merged.get("messages") is None
    assert merged["group_overrides"] is None


def test_a_result_that_is_no_trajectory_is_named() -> None:
    with pytest.raises(ValueError, match="first element is NoneType"):
        merge_trajectories([None])  # type: ignore[list-item]


def test_a_trained_token_that_nobody_sampled_is_refused() -> None:
    """Few-shot turns of a prompt have 1.0 for a logprob; trained on, the ratio would be wrong without a sign."""
    group = bare(a_scored_group(length=4))
    group["inference_logprobs"] = [[1.0, 1.0, -0.1, -0.2], [1.0, 1.0, 1.0, -0.2]]

    with pytest.raises(GroupFormatError, match="sequence 1 trains a token with the logprob 1"):
        to_wire(group)


@pytest.mark.parametrize("column", ["advantages", "ref_logprobs"])
def test_rows_whose_wrong_lengths_add_up_are_refused(column: str) -> None:
    group = bare(a_scored_group(length=4)) | {column: [[0.1] * 3, [0.1] * 5]}

    with pytest.raises(GroupFormatError, match=f"sequence 0: 3 {column} for 4 tokens"):
        to_wire(group)


def test_advantages_may_be_arrays() -> None:
    group = bare(a_scored_group(length=4)) | {"advantages": [np.array([1.0, 2.0, 3.0, 4.0]), np.float64(0.5)]}

    assert to_wire(group).advantages.tolist() == [1.0, 2.0, 3.0, 4.0, 0.5, 0.5, 0.5, 0.5]  # type: ignore[union-attr]
