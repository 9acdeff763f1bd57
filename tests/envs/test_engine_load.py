"""Reading an engine's Prometheus page."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs.server_handling.engines.engine_load import EngineLoad, parse_engine_load

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a {model} 9"} 3.0
vllm:num_requests_running{engine="1",model_name="a {model} 9"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 5.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 5.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.75
vllm:time_to_first_token_seconds_bucket{le="+Inf"} 7.0
"""


def test_requests_of_all_replicas_count_and_the_fullest_cache() -> None:
    assert parse_engine_load(VLLM) == EngineLoad(running=7, waiting=5, kv_cache_usage=0.75)


def test_the_older_name_of_the_cache_gauge() -> None:
    page = "vllm:num_requests_running 1\nvllm:gpu_cache_usage_perc 0.5 1712345678000\n"

    assert parse_engine_load(page) == EngineLoad(running=1, waiting=0, kv_cache_usage=0.5)


def test_sglang() -> None:
    page = 'sglang:num_running_reqs{tp_rank="0"} 2.0\nsglang:num_queue_reqs{tp_rank="0"} 9.0\nsglang:token_usage 0.1\n'

    assert parse_engine_load(page) == EngineLoad(running=2, waiting=9, kv_cache_usage=0.1)


def test_counts_by_priority_are_not_added_to_their_total() -> None:
    page = (
        'sglang:num_running_reqs{priority=""} 3.0\nsglang:num_running_reqs{priority="1"} 1.0\n'
        'sglang:num_running_reqs{priority="2"} 2.0\n'
    )

    assert parse_engine_load(page) == EngineLoad(running=3, waiting=0, kv_cache_usage=0.0)


def test_another_page_is_none() -> None:
    assert parse_engine_load("") is None
    assert parse_engine_load("<html>vllm:num_requests_running</html>") is None
    assert parse_engine_load("process_cpu_seconds_total 5\nvllm:num_requests_waiting 5\n") is None


def test_values_that_are_no_numbers_are_left_out() -> None:
    page = "vllm:num_requests_running 1\nvllm:num_requests_waiting NaN\nvllm:kv_cache_usage_perc +Inf\n"

    assert parse_engine_load(page) == EngineLoad(running=1, waiting=0, kv_cache_usage=0.0)


@given(st.text() | st.lists(st.sampled_from([*'{}" \n09aN=', "vllm:num_requests_running"])).map("".join))
def test_no_page_breaks_it(page: str) -> None:
    load = parse_engine_load(page)
    assert load is None or (load.running >= 0 and load.waiting >= 0)
