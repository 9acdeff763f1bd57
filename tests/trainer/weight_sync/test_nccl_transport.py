"""What the nccl transport promises, with FAKE workers and a FAKE NCCL: the real ones need two GPUs (benchmarks/gpu_weight_transfer.py)."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.errors import ConfigError
from tests.trainer.weight_sync.stock_vllm import FakeNccl, FakeWorker, assert_holds, publish
from trainer.weight_sync.errors import TransferError, WeightSyncError
from trainer.weight_sync.states import Edge
from trainer.weight_sync.transports.buckets import TensorSpec
from trainer.weight_sync.transports.nccl import NcclTransport, init_infos
from trainer.weight_sync.transports.packed_chunks import Chunk, chunks_past, chunks_within, fill, specs_of

pytest.importorskip("vllm", reason="vLLM is not installed; run scripts/install_vllm.sh")

BUCKET_BYTES = 600


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> FakeNccl:
    return FakeNccl(monkeypatch)


@pytest.fixture
def workers(nccl: FakeNccl) -> list[FakeWorker]:
    return [FakeWorker(nccl, port) for port in (1, 2)]


@pytest.fixture
def transport(calls: ThreadPoolExecutor, nccl: FakeNccl) -> NcclTransport:
    return NcclTransport(calls, bucket_bytes=BUCKET_BYTES, dtype=torch.bfloat16, meet=nccl.open)


def test_every_server_ends_with_the_weights_in_its_dtype_and_their_version(
    transport: NcclTransport, workers: list[FakeWorker], nccl: FakeNccl
) -> None:
    publish(transport, workers, "1")

    for worker in workers:
        assert_holds(worker, "1")
    assert len(nccl.senders[0].sizes_bytes) > 1


def test_a_group_serves_until_a_server_reports_another_version(
    transport: NcclTransport, workers: list[FakeWorker], nccl: FakeNccl
) -> None:
    publish(transport, workers, "1")
    publish(transport, workers, "2")
    assert len(nccl.senders) == 1

    workers[1].version = "default"  # as after a restart
    publish(transport, workers, "3")

    assert nccl.senders[0].is_aborted.is_set()
    assert len(nccl.senders) == 2
    assert_holds(workers[1], "3")


def test_ranks_are_handed_out_without_gaps_and_vllm_takes_what_it_is_told() -> None:
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo

    workers = [FakeWorker(FakeNccl(pytest.MonkeyPatch()), port) for port in (1, 2, 3)]
    members = [worker.member(world_size) for worker, world_size in zip(workers, (4, 1, 2), strict=True)]

    infos = init_infos(members, address="10.0.0.1", port=29500, bucket_bytes=BUCKET_BYTES)

    parsed = [NCCLWeightTransferInitInfo(**infos[worker.url]) for worker in workers]
    assert [info.rank_offset for info in parsed] == [1, 5, 6]
    assert {(info.world_size, info.packed, info.packed_buffer_size_bytes) for info in parsed} == {(8, True, 600)}


def test_a_server_that_refuses_the_weights_is_named_at_once_and_left_runnable(
    transport: NcclTransport, workers: list[FakeWorker], nccl: FakeNccl
) -> None:
    def refuse() -> None:
        raise ValueError("no such parameter")

    workers[0].faults["load"] = refuse
    start = time.monotonic()

    with pytest.raises(TransferError, match=r"127\.0\.0\.1:1 failed to send.*no such parameter") as caught:
        publish(transport, workers, "1", timeout_s=60)

    assert time.monotonic() - start < 30
    assert workers[0].url in caught.value.culprits
    assert nccl.senders[0].is_aborted.is_set()
    assert workers[0].is_runnable
    assert workers[0].version == "default"


def test_after_a_failure_the_next_attempt_meets_anew_and_starts_clean(
    transport: NcclTransport, workers: list[FakeWorker], nccl: FakeNccl
) -> None:
    def refuse_once() -> None:
        del workers[0].faults["load"]
        raise ValueError("not this time")

    workers[0].faults["load"] = refuse_once
    with pytest.raises(TransferError):
        publish(transport, workers, "1")

    publish(transport, workers, "1")

    assert len(nccl.senders) == 2
    for worker in workers:
        assert_holds(worker, "1")


def test_an_update_that_a_dead_trainer_left_open_is_ended_first(
    transport: NcclTransport, workers: list[FakeWorker]
) -> None:
    workers[0].is_updating, workers[0].is_runnable = True, False

    publish(transport, workers, "1")

    assert_holds(workers[0], "1")


def test_a_server_that_takes_no_part_costs_the_deadline_and_is_named(
    transport: NcclTransport, workers: list[FakeWorker], nccl: FakeNccl
) -> None:
    stalled = threading.Event()
    workers[1].faults["load"] = lambda: void(stalled.wait(10))

    with pytest.raises(TransferError, match=r"no answer .*from .*127\.0\.0\.1:2") as caught:
        publish(transport, workers, "1", timeout_s=1.0)

    stalled.set()
    assert caught.value.edge is Edge.SEND
    assert nccl.senders[0].is_aborted.is_set()


def test_a_server_that_does_not_come_to_the_meeting_costs_the_deadline_and_is_named(
    transport: NcclTransport, workers: list[FakeWorker]
) -> None:
    stalled = threading.Event()
    workers[1].faults["/init_weight_transfer_engine"] = lambda: void(stalled.wait(10))

    with pytest.raises(TransferError, match=r"no answer .*from .*127\.0\.0\.1:2") as caught:
        publish(transport, workers, "1", timeout_s=0.3)

    stalled.set()
    assert caught.value.edge is Edge.ATTACH


def test_a_meeting_that_ends_before_the_deadline_does_names_who_did_not_come_too(
    transport: NcclTransport, workers: list[FakeWorker]
) -> None:
    stalled = threading.Event()
    workers[1].faults["/init_weight_transfer_engine"] = lambda: void(stalled.wait(10))
    meet = transport._meet
    transport._meet = lambda listener, **options: meet(listener, **{**options, "timeout_s": 0.1})

    with pytest.raises(TransferError, match=r"waited in vain; no answer from .*127\.0\.0\.1:2"):
        publish(transport, workers, "1", timeout_s=5.0)

    stalled.set()


def test_a_meeting_that_comes_about_too_late_is_left(transport: NcclTransport, workers: list[FakeWorker]) -> None:
    late, came = threading.Event(), threading.Event()
    stuck = FakeSenderSeen(came)

    def meet(listener: object, **_: object) -> FakeSenderSeen:
        late.wait(10)
        return stuck

    transport._meet = meet  # type: ignore[assignment]
    with pytest.raises(TransferError):
        publish(transport, workers, "1", timeout_s=0.2)

    late.set()

    assert came.wait(10)


def test_weights_that_change_between_two_passes_end_the_transfer(
    transport: NcclTransport, workers: list[FakeWorker], nccl: FakeNccl
) -> None:
    changing = ChangingWeights()
    shipment = transport.prepare(changing, "1")
    transport.open([worker.member() for worker in workers], timeout_s=20)

    with pytest.raises(WeightSyncError, match=r"'w' \[4\] was announced, 'w' \[5\] came"):
        transport.send(shipment, timeout_s=20)

    assert nccl.senders[0].is_aborted.is_set()
    assert [worker.version for worker in workers] == ["default", "default"]


def test_without_cuda_the_fix_is_named(calls: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ConfigError, match=r"transport=nccl needs a CUDA device.*weight_sync\.transport=gloo"):
        NcclTransport(calls, bucket_bytes=1, dtype=torch.bfloat16)


SPECS = st.lists(
    st.tuples(st.sampled_from([torch.float32, torch.bfloat16, torch.int32]), st.integers(0, 12)), max_size=8
)


@given(described=SPECS, capacity_bytes=st.integers(1, 40))
def test_chunks_are_cut_and_filled_as_vllm_does_it(
    described: list[tuple[torch.dtype, int]], capacity_bytes: int
) -> None:
    from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

    weights = [(f"t{i}", torch.arange(count).to(dtype)) for i, (dtype, count) in enumerate(described)]
    chunks = chunks_past(specs_of(weights, dtype=torch.float32), capacity_bytes=capacity_bytes)
    sent = [(name, tensor.float() if tensor.is_floating_point() else tensor) for name, tensor in weights]
    theirs, pairs = iter(sent), iter(weights)

    for chunk in chunks:
        buffer = torch.empty(chunk.size_bytes, dtype=torch.uint8)
        fill(chunk, pairs, buffer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a tensor above the capacity
            packed = pack_tensors(theirs, lambda pair: pair[1], capacity_bytes)
        assert packed is not None
        assert packed.names == chunk.columns["names"]
        assert packed.tensor_sizes == chunk.sizes_bytes
        assert torch.equal(packed.packed_tensor, buffer)
    assert next(theirs, None) is None


@given(sizes=st.lists(st.integers(0, 12), max_size=12), capacity_bytes=st.integers(1, 24))
def test_chunks_within_a_capacity_keep_order_and_overfill_only_for_one_tensor(
    sizes: list[int], capacity_bytes: int
) -> None:
    specs = [TensorSpec(f"t{i}", "uint8", (size,)) for i, size in enumerate(sizes)]

    chunks = chunks_within(specs, capacity_bytes=capacity_bytes)

    assert [spec for chunk in chunks for spec in chunk.specs] == specs
    assert all(chunk.size_bytes <= capacity_bytes or len(chunk.specs) == 1 for chunk in chunks)
    joined = [a.size_bytes + b.specs[0].size_bytes for a, b in pairwise(chunks)]
    assert all(size > capacity_bytes for size in joined)


def test_a_tensor_that_vllm_could_not_read_where_it_would_lie_is_refused() -> None:
    specs = [TensorSpec("flags", "bool", (3,)), TensorSpec("w", "bfloat16", (2,))]

    with pytest.raises(WeightSyncError, match=r"'w' \(bfloat16\) would begin at byte 3"):
        chunks_past(specs, capacity_bytes=100)


class ChangingWeights:
    """Another shape at every pass."""

    def __init__(self) -> None:
        self.length = 3

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.length += 1
        yield "w", torch.zeros(self.length)


class FakeSenderSeen:
    """A sender that only notes that it was left."""

    def __init__(self, left: threading.Event) -> None:
        self._left = left

    def broadcast(self, chunks: list[Chunk], weights: object) -> None:
        raise AssertionError("the group is not open")

    def abort(self) -> None:
        self._left.set()


def void(_: object) -> None:
    pass
