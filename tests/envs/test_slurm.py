"""Servers of a SLURM job, and what server configs mean."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs.server_handling.pool.server_configs import at_url, server_list, with_address
from atroposlib.envs.server_handling.pool.slurm import expand_nodelist, hostnames, slurm_urls
from atroposlib.envs.server_handling.server_baseline import APIServerConfig, ServerBaseline
from atroposlib.errors import ConfigError

JOB = {"SLURM_JOB_NODELIST": "gpu[1-3]", "NUM_TRAINING_NODES": "1"}


@pytest.fixture
def no_scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("login", ["login"]),
        ("a,b", ["a", "b"]),
        ("gpu[1-3]", ["gpu1", "gpu2", "gpu3"]),
        ("gpu[08-11,20],login", ["gpu08", "gpu09", "gpu10", "gpu11", "gpu20", "login"]),
        ("r[1-2]n[1,3].site", ["r1n1.site", "r1n3.site", "r2n1.site", "r2n3.site"]),
        ("node-a-[1-2]", ["node-a-1", "node-a-2"]),
    ],
)
def test_node_lists_are_read(nodelist: str, hosts: list[str]) -> None:
    assert expand_nodelist(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["", "a,", ",a", "a[1-", "a[]", "a[3-1]", "a[x]", "a]b"])
def test_a_broken_node_list_is_an_error_that_shows_it(nodelist: str) -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_NODELIST"):
        expand_nodelist(nodelist)


@given(names=st.lists(st.from_regex(r"[a-z][a-z0-9-]{0,5}", fullmatch=True), min_size=1, max_size=5))
def test_plain_names_stay_as_they_are(names: list[str]) -> None:
    assert expand_nodelist(",".join(names)) == names


@given(prefix=st.from_regex(r"[a-z]{1,4}", fullmatch=True), numbers=st.sets(st.integers(0, 9999), min_size=1))
def test_numbers_keep_their_width(prefix: str, numbers: set[int]) -> None:
    texts = [f"{number:04}" for number in sorted(numbers)]

    assert expand_nodelist(f"{prefix}[{','.join(texts)}]") == [prefix + text for text in texts]


@pytest.mark.usefixtures("no_scontrol")
def test_the_first_nodes_train_and_each_other_one_has_a_server_for_every_gpu() -> None:
    urls = slurm_urls(JOB)

    assert urls is not None
    assert len(urls) == 16
    assert urls[0] == "http://gpu2:9000/v1"
    assert urls[-1] == "http://gpu3:9007/v1"


@pytest.mark.usefixtures("no_scontrol")
def test_infer_tp_takes_several_gpus_a_server() -> None:
    assert slurm_urls({**JOB, "NUM_TRAINING_NODES": "2", "INFER_TP": "4"}) == [
        "http://gpu3:9000/v1", "http://gpu3:9001/v1",
    ]  # fmt: skip


@pytest.mark.usefixtures("no_scontrol")
@pytest.mark.parametrize(
    "wrong", [{"INFER_TP": "0"}, {"INFER_TP": "16"}, {"INFER_TP": "two"}, {"NUM_TRAINING_NODES": "3"}]
)
def test_a_variable_out_of_range_is_an_error_that_names_it(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        slurm_urls({**JOB, **wrong})


@pytest.mark.usefixtures("no_scontrol")
def test_no_job_and_a_job_of_one_node_have_no_servers() -> None:
    assert slurm_urls({}) is None
    assert slurm_urls({"SLURM_JOB_NODELIST": "gpu1"}) is None


def test_scontrol_is_asked_where_it_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && echo "from-$3" && echo b\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert hostnames("x") == ["from-x", "b"]

    scontrol.write_text("#!/bin/sh\nexit 1\n")
    assert hostnames("x[1-2]") == ["x1", "x2"]


@pytest.mark.usefixtures("no_scontrol")
def test_a_list_with_slurm_is_a_template_and_without_it_is_taken_as_it_is() -> None:
    configs = [APIServerConfig(base_url="http://a/v1", api_key="k"), APIServerConfig(base_url="http://b/v1")]

    found = server_list(configs, slurm=True, environ=JOB)

    assert len(found) == 16
    assert {config.api_key for config in found} == {"k"}
    assert server_list(configs, slurm=True, environ={}) == configs
    assert server_list(configs, environ=JOB) == configs


@pytest.mark.usefixtures("no_scontrol")
def test_a_baseline_in_a_job_means_the_servers_of_the_job() -> None:
    found = server_list(ServerBaseline(model_name="m"), environ=JOB)

    assert [config.base_url for config in found] == slurm_urls(JOB)
    assert {config.model_name for config in found} == {"m"}


def test_a_bare_config_is_one_server_in_a_job_too() -> None:
    bare = APIServerConfig(base_url="http://a/v1", api_key="k")

    assert server_list(bare, environ=JOB) == [bare]


def test_four_assumed_ports_come_with_one_warning_that_names_the_fix(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        server_list(ServerBaseline(), environ={})

    [record] = caplog.records
    assert "return APIServerConfig(base_url=...) instead" in record.getMessage()


def test_no_server_at_all_is_an_error() -> None:
    with pytest.raises(ConfigError, match="at least one inference server"):
        server_list([], environ={})


def test_a_config_without_an_address_is_an_error_that_shows_one() -> None:
    for config in (APIServerConfig(), APIServerConfig(base_url=None, server_type="vllm")):
        with pytest.raises(ConfigError, match=r"--openai\.base_url http://localhost:9001/v1"):
            with_address(config)
    hosted = APIServerConfig(base_url=None)
    assert with_address(hosted) is hosted


def test_a_server_elsewhere_has_the_same_settings() -> None:
    template = APIServerConfig(base_url="http://a/v1", timeout=7)

    moved = at_url(template, "http://b/v1")

    assert (moved.base_url, moved.timeout, template.base_url) == ("http://b/v1", 7, "http://a/v1")
