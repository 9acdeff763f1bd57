"""What the ipc transport promises, with FAKE workers and a FAKE GPU: real ones need CUDA (benchmarks/gpu_weight_transfer.py)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from atroposlib.errors import ConfigError
from tests.trainer.weight_sync.stock_vllm import FakeIpc, FakeWorker, assert_holds, publish
from trainer.weight_sync.errors import TransferError
from trainer.weight_sync.transports.ipc import IpcTransport

pytest.importorskip("vllm", reason="vLLM is not installed; run scripts/install_vllm.sh")

BUFFER_BYTES = 300


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeIpc:
    return FakeIpc(monkeypatch)


@pytest.fixture
def workers(gpu: FakeIpc) -> list[FakeWorker]:
    return [FakeWorker(gpu, port) for port in (1, 2)]


@pytest.fixture
def transport(calls: ThreadPoolExecutor, gpu: FakeIpc) -> IpcTransport:
    return IpcTransport(calls, dtype=torch.bfloat16, buffer_bytes=BUFFER_BYTES, device=gpu)


def test_every_server_ends_with_the_weights_in_its_dtype_and_their_version(
    transport: IpcTransport, workers: list[FakeWorker], gpu: FakeIpc
) -> None:
    publish(transport, workers, "1")
    publish(transport, workers, "2")

    for worker in workers:
        assert_holds(worker, "2")
        assert worker.calls.count("/init_weight_transfer_engine") == 1
        assert worker.calls.count("/update_weights") > 4  # several chunks through one buffer
    assert gpu.sizes_bytes == [640, 640]  # the largest tensor


def test_every_server_opens_an_export_of_its_own(
    transport: IpcTransport, workers: list[FakeWorker], gpu: FakeIpc
) -> None:
    publish(transport, workers, "1")

    assert {url: len(numbers) for url, numbers in gpu.opened.items()} == {worker.url: 1 for worker in workers}
    assert len(set.union(*gpu.opened.values())) == 2


def test_no_chunk_is_overwritten_before_the_slowest_server_has_read_it(
    transport: IpcTransport, workers: list[FakeWorker]
) -> None:
    gate = threading.Event()
    workers[1].faults["load"] = lambda: void(gate.wait(10))
    with ThreadPoolExecutor(1) as trainer:
        publication = trainer.submit(publish, transport, workers, "1")
        while "/update_weights" not in workers[1].calls:
            assert not publication.done()
        gate.set()
        publication.result()

    assert_holds(workers[1], "1")


def test_the_shared_memory_lives_until_all_have_answered_and_not_longer(
    transport: IpcTransport, workers: list[FakeWorker], gpu: FakeIpc
) -> None:
    publish(transport, workers, "1")
    assert gpu.allocated() is None

    stalled = threading.Event()
    workers[1].faults["load"] = lambda: void(stalled.wait(10))
    with pytest.raises(TransferError, match=r"http://127\.0\.0\.1:2 failed to send: no answer in time"):
        publish(transport, workers, "2", timeout_s=1.0)
    transport.leave()

    assert gpu.allocated() is not None  # its reader may still come
    stalled.set()


def test_a_server_that_refuses_the_weights_is_named_and_left_runnable_and_the_next_attempt_starts_clean(
    transport: IpcTransport, workers: list[FakeWorker]
) -> None:
    def refuse_once() -> None:
        del workers[0].faults["load"]
        raise ValueError("IPC handle not found for GPU UUID")

    workers[0].faults["load"] = refuse_once
    with pytest.raises(TransferError, match=r"127\.0\.0\.1:1 failed to send.*IPC handle not found"):
        publish(transport, workers, "1")
    assert [worker.is_runnable for worker in workers] == [True, True]
    assert [worker.version for worker in workers] == ["default", "default"]

    publish(transport, workers, "1")

    for worker in workers:
        assert_holds(worker, "1")


def test_an_update_that_a_dead_trainer_left_open_is_ended_first(
    transport: IpcTransport, workers: list[FakeWorker]
) -> None:
    workers[0].is_updating, workers[0].is_runnable = True, False

    publish(transport, workers, "1")

    assert_holds(workers[0], "1")


def test_a_server_on_several_gpus_is_refused_by_name(transport: IpcTransport, workers: list[FakeWorker]) -> None:
    members = [workers[0].member(), workers[1].member(world_size=2)]

    with pytest.raises(TransferError, match=r"127\.0\.0\.1:2 .*2 workers.*transport=nccl") as caught:
        transport.open(members, timeout_s=1)

    assert list(caught.value.culprits) == [workers[1].url]


def test_vllm_refuses_pickled_handles_unless_it_was_told_to_take_them(
    transport: IpcTransport, workers: list[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "0")

    with pytest.raises(TransferError, match="VLLM_ALLOW_INSECURE_SERIALIZATION=1"):
        publish(transport, workers, "1")


def test_a_gpu_without_room_ends_in_a_transfer_error(
    transport: IpcTransport, workers: list[FakeWorker], gpu: FakeIpc, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "allocate", full)

    with pytest.raises(TransferError, match=r"0 MiB of this GPU could be shared: CUDA out of memory"):
        publish(transport, workers, "1")


def test_without_cuda_the_fix_is_named(calls: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ConfigError, match=r"transport=ipc needs a CUDA device.*weight_sync\.transport=gloo"):
        IpcTransport(calls, dtype=torch.bfloat16)


def void(_: object) -> None:
    pass
