"""What a publication promises on SGLang servers, against a FAKE one that receives over real gloo."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.trainer.weight_sync.publications import WEIGHTS, at_call, runs, serving, urls_of
from tests.trainer.weight_sync.sglang_server import FakeSglang, Refusal
from trainer.weight_sync.engines.control import PauseMode
from trainer.weight_sync.engines.sglang import SglangControl
from trainer.weight_sync.errors import ServerSyncError, WeightSyncError
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.states import Edge
from trainer.weight_sync.transports import torch_group
from trainer.weight_sync.transports.flat_buckets import flat_buckets


@pytest.fixture
def servers() -> Iterator[list[FakeSglang]]:
    with serving(FakeSglang(), FakeSglang()) as fakes:
        yield fakes


@pytest.fixture
def server(servers: list[FakeSglang]) -> FakeSglang:
    return servers[0]


@pytest.fixture
def control(server: FakeSglang) -> Iterator[SglangControl]:
    control = SglangControl(f"{server.url}/v1")
    yield control
    control.close()


def refused(message: str = "no", status: int = 400) -> Callable[[], None]:
    def fault() -> None:
        raise Refusal(message, status)

    return fault


# Publications


def test_a_group_is_left_at_the_end(servers: list[FakeSglang], publisher: WeightPublisher) -> None:
    publisher.publish(1, WEIGHTS.items())
    assert all(fake.groups for fake in servers)

    publisher.close()

    assert not any(fake.groups for fake in servers)


def test_buckets_go_into_a_session_of_a_paused_server_that_does_not_call_a_mixture_by_a_published_version(
    servers: list[FakeSglang], publisher: WeightPublisher
) -> None:
    publisher.publish(1, WEIGHTS.items())
    before = len(servers[0].bodies)
    versions: list[str] = []
    servers[0].faults["/update_weights_from_distributed"] = lambda: versions.append(servers[0].version)

    publisher.publish(2, list(WEIGHTS.items())[:4])

    sent = [(path, body) for path, body in servers[0].bodies[before:] if path not in ("/model_info", "/server_info")]
    assert [path for path, _ in sent] == [
        "/pause_generation",
        "/update_weight_version",
        "/begin_weight_update",
        *["/update_weights_from_distributed"] * 2,
        "/end_weight_update",
        "/update_weight_version",
        "/flush_cache",
        "/continue_generation",
    ]
    assert versions == ["default", "default"]
    bucket = sent[3][1]
    assert bucket["names"] == ["layer.0.weight", "layer.1.weight"]
    assert (bucket["dtypes"], bucket["shapes"]) == (["bfloat16"] * 2, [[16, 8]] * 2)
    assert (bucket["load_format"], bucket["flush_cache"]) == ("flattened_bucket", False)
    assert sent[-3][1] == {"new_version": "2", "abort_all_requests": False}


def test_a_server_without_sessions_gets_one_broadcast_a_tensor(connected: Callable[..., WeightPublisher]) -> None:
    old = FakeSglang(has_sessions=False)
    publisher = connected([old.url])

    publisher.publish(1, WEIGHTS.items())

    publisher.close()
    updates = [body for path, body in old.bodies if path == "/update_weights_from_distributed"]
    old.die()
    assert [body["load_format"] for body in updates] == [None] * 3
    assert all(torch.equal(old.weights[name], tensor.bfloat16()) for name, tensor in WEIGHTS.items())


def test_the_trainers_own_default_group_is_left_alone(
    servers: list[FakeSglang], connected: Callable[..., WeightPublisher], tmp_path: Path
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        own = dist.group.WORLD
        publisher = connected(urls_of(servers))
        publisher.publish(1, WEIGHTS.items())
        publisher.close()

        assert dist.group.WORLD is own
        dist.all_reduce(torch.ones(1))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("mode", "recompute", "asked"),
    [("keep", True, "retract"), ("keep", False, "in_place"), ("abort", True, "abort")],
)
def test_requests_in_flight_are_treated_as_configured(
    servers: list[FakeSglang],
    connected: Callable[..., WeightPublisher],
    mode: PauseMode,
    recompute: bool,
    asked: str,
) -> None:
    publisher = connected(urls_of(servers), pause_mode=mode, recompute=recompute)
    servers[0].running_requests = 3

    result = publisher.publish(1, WEIGHTS.items())

    assert result.failed == ()
    assert servers[0].pause_mode == asked
    assert servers[0].aborted_requests == (3 if mode == "abort" else 0)
    assert all(runs(fake, "1") for fake in servers)


def test_a_server_that_waits_for_its_requests_aborts_those_that_do_not_end(
    servers: list[FakeSglang], connected: Callable[..., WeightPublisher]
) -> None:
    publisher = connected(urls_of(servers), pause_mode="wait", recompute=True, timeout_s=1.0)
    servers[0].running_requests = 1

    result = publisher.publish(1, WEIGHTS.items())

    assert result.failed == ()
    assert (servers[0].aborted_requests, servers[1].aborted_requests) == (1, 0)
    assert servers[1].pause_mode == "retract"


# Faults


@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize(
    "path",
    [
        "/pause_generation",
        "/begin_weight_update",
        "/update_weights_from_distributed",
        "/end_weight_update",
        "/update_weight_version",
    ],
)
def test_a_server_that_refuses_is_named_with_its_reason_and_the_other_is_served(
    servers: list[FakeSglang], publisher: WeightPublisher, path: str, status: int
) -> None:
    servers[1].faults[path] = refused("out of memory", status)

    result = publisher.publish(1, WEIGHTS.items())

    (failed,) = result.failed
    assert failed.error is not None
    assert (failed.server, failed.error.edge) == (
        servers[1].url,
        Edge.PAUSE if path == "/pause_generation" else Edge.SEND,
    )
    assert "out of memory" in failed.error.reason
    assert runs(servers[0], "1")
    assert not servers[1].is_paused


def test_a_server_whose_update_broke_reports_no_published_version(
    servers: list[FakeSglang], publisher: WeightPublisher
) -> None:
    publisher.publish(1, WEIGHTS.items())
    for fake in servers:
        fake.faults["/update_weights_from_distributed"] = at_call(2, refused("partially updated"))

    publisher.publish(2, WEIGHTS.items())

    assert all(runs(fake, "2") for fake in servers)
    for fake in servers:
        fake.faults["/update_weights_from_distributed"] = refused("partially updated")
    with pytest.raises(WeightSyncError, match="partially updated"):
        publisher.publish(3, WEIGHTS.items())
    assert [fake.version for fake in servers] == ["default", "default"]
    assert not any(fake.is_paused for fake in servers)


def test_a_server_that_cannot_join_is_named_and_the_other_is_served(
    servers: list[FakeSglang], publisher: WeightPublisher
) -> None:
    servers[1].faults["/init_weights_update_group"] = refused("no route to the trainer")

    result = publisher.publish(1, WEIGHTS.items())

    (failed,) = result.failed
    assert failed.error is not None
    assert (failed.server, failed.error.edge) == (servers[1].url, Edge.ATTACH)
    assert "no route to the trainer" in failed.error.reason
    assert runs(servers[0], "1")


def test_a_server_with_replicas_is_refused_before_anything_hangs(connected: Callable[..., WeightPublisher]) -> None:
    replicated = FakeSglang(dp_size=2)
    publisher = connected([replicated.url])

    with pytest.raises(WeightSyncError, match=r"dp_size=2.*transport=disk"):
        publisher.publish(1, WEIGHTS.items())

    publisher.close()
    replicated.die()
    assert "/init_weights_update_group" not in replicated.calls


def test_a_server_in_another_group_is_met_again(servers: list[FakeSglang], publisher: WeightPublisher) -> None:
    publisher.publish(1, WEIGHTS.items())
    servers[1].groups.clear()

    result = publisher.publish(2, WEIGHTS.items())

    assert result.failed == ()
    assert all(runs(fake, "2") for fake in servers)
    assert all(len(fake.groups) == 1 for fake in servers)


def test_a_server_that_falls_silent_costs_deadlines_and_the_other_is_served(
    servers: list[FakeSglang], connected: Callable[..., WeightPublisher]
) -> None:
    publisher = connected(urls_of(servers), timeout_s=1.0)
    publisher.attach()
    silence = threading.Event()
    servers[1].faults["/update_weights_from_distributed"] = silence.wait
    servers[1].faults["/model_info"] = at_call(3, silence.wait)

    result = publisher.publish(1, WEIGHTS.items())

    silence.set()
    assert [failed.server for failed in result.failed] == [servers[1].url]
    assert runs(servers[0], "1")


def test_a_server_that_answers_questions_but_takes_no_bucket_is_left_out(
    servers: list[FakeSglang], connected: Callable[..., WeightPublisher]
) -> None:
    endless = threading.Event()
    servers[1].faults["/update_weights_from_distributed"] = endless.wait

    result = connected(urls_of(servers), timeout_s=2.0).publish(1, WEIGHTS.items())

    endless.set()
    assert [failed.server for failed in result.failed] == [servers[1].url]
    assert runs(servers[0], "1")


# The control


def test_the_size_of_a_server_counts_replicas() -> None:
    replicated = FakeSglang(dp_size=4)
    control = SglangControl(replicated.url)

    size = control.world_size(timeout_s=2)

    control.close()
    replicated.die()
    assert size == 4


def test_a_paused_server_is_alive_and_known_to_be_paused(server: FakeSglang, control: SglangControl) -> None:
    control.pause(timeout_s=2)

    control.health(timeout_s=2)

    assert control.is_paused(timeout_s=2)
    control.resume(timeout_s=2)
    assert not control.is_paused(timeout_s=2)


def test_waiting_for_requests_that_do_not_end_is_an_error_that_names_the_way_out(
    server: FakeSglang, control: SglangControl
) -> None:
    server.running_requests = 1

    with pytest.raises(ServerSyncError, match="pause_mode=keep or abort") as caught:
        control.pause("wait", recompute=False, timeout_s=0.2)

    assert caught.value.edge == Edge.PAUSE
    assert not server.is_paused


def test_the_cache_stays_while_frozen_requests_hold_it(server: FakeSglang, control: SglangControl) -> None:
    server.running_requests = 1
    control.pause("keep", recompute=False, timeout_s=2)
    kept = control.reset_prefix_cache(recompute=False, timeout_s=2)
    control.resume(timeout_s=2)
    control.pause("keep", recompute=True, timeout_s=2)

    assert (kept, control.reset_prefix_cache(timeout_s=2)) == (False, True)


def test_a_folder_is_loaded_and_gives_its_version(server: FakeSglang, control: SglangControl, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")

    control.load_folder(str(tmp_path), "5", timeout_s=2)

    assert torch.equal(server.weights["a"], torch.ones(2))
    assert control.weight_version(timeout_s=2) == "5"


def test_a_folder_that_cannot_be_loaded_is_an_error_with_the_servers_reason(
    control: SglangControl, tmp_path: Path
) -> None:
    with pytest.raises(ServerSyncError, match="Failed to get weights iterator") as caught:
        control.load_folder(str(tmp_path), "5", timeout_s=2)

    assert caught.value.edge == Edge.SEND
    assert control.weight_version(timeout_s=2) == "default"


def test_success_false_is_a_failure_under_any_status(server: FakeSglang, control: SglangControl) -> None:
    server.faults["/update_weights_from_disk"] = refused("wrong architecture", status=200)

    with pytest.raises(ServerSyncError, match="success=false: wrong architecture"):
        control.load_folder("/nowhere", "5", timeout_s=2)


def test_an_adapter_takes_the_place_of_the_one_before(server: FakeSglang, control: SglangControl) -> None:
    control.load_adapter("policy", "/runs/v1", timeout_s=2)
    control.load_adapter("policy", "/runs/v2", timeout_s=2)

    assert control.adapters(timeout_s=2) == {"policy": "/runs/v2"}


def test_prompt_logprobs_are_those_of_every_token_but_the_first(control: SglangControl, server: FakeSglang) -> None:
    logprobs = control.prompt_logprobs([5, 6, 7], model="policy", timeout_s=2)

    assert logprobs == [-1.0, -2.0]
    assert server.bodies[-1][1]["lora_path"] == "policy"
    assert server.bodies[-1][1]["logprob_start_len"] == 0


def test_completions_come_with_their_logprobs(control: SglangControl, server: FakeSglang) -> None:
    found = control.sample([[5, 6], [7]], max_tokens=2, temperature=0.7, seed=3, timeout_s=2)

    assert [(one.token_ids, one.logprobs) for one in found] == [([6, 6], [-0.5, -0.5]), ([7, 7], [-0.5, -0.5])]
    assert server.bodies[-1][1]["sampling_params"]["temperature"] == 0.7


def test_unreadable_logprobs_name_the_server(server: FakeSglang, control: SglangControl) -> None:
    server.faults["/generate"] = refused(status=200)
    with pytest.raises(ServerSyncError, match="success=false"):
        control.prompt_logprobs([5, 6], timeout_s=2)

    with pytest.raises(ServerSyncError, match="gave no prompt logprobs that can be read"):
        control._prompt_logprobs_of({"meta_info": {}}, 2)


def test_a_slow_server_is_an_error_that_names_server_edge_and_deadline(
    server: FakeSglang, control: SglangControl
) -> None:
    silence = threading.Event()
    server.faults["/continue_generation"] = silence.wait

    with pytest.raises(ServerSyncError) as caught:
        control.resume(timeout_s=0.1)

    silence.set()
    assert (
        str(caught.value)
        == f"inference server {server.url} failed to resume: /continue_generation did not answer within 0.1 s"
    )


# Flat buckets


@given(
    sizes=st.lists(st.integers(0, 5), max_size=8),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.int64, torch.bool]), min_size=8, max_size=8),
    capacity_bytes=st.integers(1, 30),
)
def test_flat_buckets_lose_nothing_hold_one_dtype_and_keep_to_their_size(
    sizes: list[int], dtypes: list[torch.dtype], capacity_bytes: int
) -> None:
    weights = [(str(i), torch.arange(n).to(dtype)) for i, (n, dtype) in enumerate(zip(sizes, dtypes, strict=False))]

    buckets = list(
        flat_buckets(weights, capacity_bytes=capacity_bytes, dtype=torch.bfloat16, device=torch.device("cpu"))
    )

    received = [
        (spec.name, part) for bucket in buckets for spec, part in zip(bucket.specs, bucket.parts(), strict=True)
    ]
    assert [name for name, _ in received] == [name for name, _ in weights]
    for (_, part), (_, tensor) in zip(received, weights, strict=True):
        expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert part.dtype == expected.dtype
        assert torch.equal(part, expected)
    for bucket in buckets:
        assert len({spec.dtype_name for spec in bucket.specs}) == 1
        assert len(bucket.flat) <= capacity_bytes or len(bucket.specs) == 1 or bucket.specs[0].size_bytes == 0


def test_a_group_that_breaks_when_it_is_used_costs_one_attempt(
    servers: list[FakeSglang], publisher: WeightPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    broadcast, tries = torch_group.broadcast, iter([True])

    def breaks_once(*args: Any, **options: Any) -> Any:
        if next(tries, False):
            raise RuntimeError("connection closed by peer")
        return broadcast(*args, **options)

    monkeypatch.setattr(torch_group, "broadcast", breaks_once)

    assert publisher.publish(1, WEIGHTS.items()).failed == ()
    assert all(runs(fake, "1") for fake in servers)
