"""Adapters over a shared disk, to FAKE servers that load what they are told to, or refuse, or forget."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from tests.trainer.fakes import tiny_llama
from trainer.weight_sync.engines.control import EngineControl
from trainer.weight_sync.errors import AdapterError, CorruptWeightsError, ServerSyncError, TransferError
from trainer.weight_sync.states import Edge
from trainer.weight_sync.transports.base import Member
from trainer.weight_sync.transports.lora import LoraTransport, check_adapter, explain_refusal

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": {"q_proj"}}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


class FakeServer:
    """FAKE: a server of adapters, in memory."""

    engine = "vllm"

    def __init__(self, name: str = "a") -> None:
        self.url = f"http://{name}:1"
        self.version = "default"
        self.served: dict[str, str] = {}
        self.refusal = ""
        self.is_forgetful = False

    def load_adapter(self, name: str, folder: str, *, timeout_s: float) -> None:
        if self.refusal:
            raise ServerSyncError(self.url, Edge.SEND, self.refusal)
        if not self.is_forgetful:
            self.served[name] = folder

    def adapters(self, *, timeout_s: float) -> dict[str, str]:
        return self.served

    def name_version(self, weight_version: str, *, timeout_s: float) -> None:
        self.version = weight_version


@pytest.fixture
def transport(tmp_path: Path, calls: ThreadPoolExecutor) -> LoraTransport:
    return a_transport(calls, tmp_path)


def a_transport(calls: ThreadPoolExecutor, folder: Path, **config: Any) -> LoraTransport:
    return LoraTransport(calls, folder=folder, keep=2, adapter_name="policy", adapter_config=CONFIG | config)


def an_adapter(value: float = 1.0, *, rank: int = 2) -> dict[str, torch.Tensor]:
    return {f"{Q}.lora_A.weight": torch.full((rank, 16), value), f"{Q}.lora_B.weight": torch.full((16, rank), value)}


def members(*servers: FakeServer) -> list[Member]:
    return [Member(cast(EngineControl, server), 1, server.version) for server in servers]


def send(transport: LoraTransport, *servers: FakeServer, version: str = "1", value: float = 1.0) -> None:
    transport.open(members(*servers), timeout_s=5)
    transport.send(transport.prepare(an_adapter(value).items(), version), timeout_s=5)


def test_every_server_serves_the_adapter_and_only_then_reports_the_version(
    transport: LoraTransport, tmp_path: Path
) -> None:
    servers = [FakeServer("a"), FakeServer("b")]

    send(transport, *servers, version="4", value=3.0)

    assert [server.served for server in servers] == [{"policy": str(tmp_path / "v4")}] * 2
    assert [server.version for server in servers] == ["4", "4"]
    loaded = load_file(tmp_path / "v4/adapter_model.safetensors")
    assert loaded.keys() == an_adapter().keys()
    assert all(tensor.eq(3.0).all() for tensor in loaded.values())


def test_peft_reads_the_folder_and_computes_what_the_trainer_computes(
    tmp_path: Path, calls: ThreadPoolExecutor
) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trained = get_peft_model(tiny_llama(), config).eval()
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tiny_llama().save_pretrained(tmp_path / "model")
    saved_config = config.to_dict() | {"base_model_name_or_path": str(tmp_path / "model")}
    transport = LoraTransport(
        calls, folder=tmp_path / "weights", keep=2, adapter_name="policy", adapter_config=saved_config
    )

    shipment = transport.prepare(get_peft_model_state_dict(trained).items(), "1")

    read = PeftModel.from_pretrained(tiny_llama(), shipment.folder).eval()
    token_ids = torch.arange(8)[None]
    assert shipment.rank == 2
    assert torch.equal(read(token_ids).logits, trained(token_ids).logits)
    assert not torch.equal(read(token_ids).logits, tiny_llama()(token_ids).logits)


def test_the_configuration_is_written_as_peft_writes_it(transport: LoraTransport) -> None:
    folder = transport.prepare(an_adapter().items(), "1").folder

    assert json.loads((folder / "adapter_config.json").read_text()) == {**CONFIG, "target_modules": ["q_proj"]}


def test_a_server_that_says_yes_and_serves_another_folder_is_not_told_the_version(transport: LoraTransport) -> None:
    server = FakeServer()
    send(transport, server, version="1")
    server.is_forgetful = True

    with pytest.raises(TransferError, match=r"it took adapter 'policy' from .*v2, but serves .*v1"):
        send(transport, server, version="2")

    assert server.version == "1"


def test_a_server_that_serves_none_is_named(transport: LoraTransport) -> None:
    server = FakeServer()
    server.is_forgetful = True

    with pytest.raises(TransferError, match=r"http://a:1 failed to send: .* but serves none of that name"):
        send(transport, server)


def test_one_that_refuses_is_to_blame_and_the_others_are_served(transport: LoraTransport) -> None:
    good, bad = FakeServer("good"), FakeServer("bad")
    bad.refusal = "LoRA rank 2 is greater than max_lora_rank 1."

    with pytest.raises(TransferError, match="start it with --max-lora-rank 2") as caught:
        send(transport, good, bad)

    assert caught.value.culprits.keys() == {"http://bad:1"}
    assert (good.version, bad.version) == ("1", "default")


@pytest.mark.parametrize(
    ("reason", "fix"),
    [
        (
            "/v1/load_lora_adapter answered 500 LoRA rank 64 is greater than max_lora_rank 16.",
            "start it with --max-lora-rank 64, or train with lora_r of at most 16",
        ),
        (
            "/v1/load_lora_adapter answered 404 No adapter found for /w/v1",
            "it does not see /w/v1: put weight_sync.folder on a disk that it shares with the trainer",
        ),
    ],
)
def test_a_refusal_comes_with_its_fix(reason: str, fix: str) -> None:
    assert explain_refusal(reason, rank=64, folder="/w/v1") == f"{reason}; {fix}"


def test_an_unknown_refusal_stays_as_it_is() -> None:
    assert explain_refusal("connection refused", rank=8, folder="/w/v1") == "connection refused"


def test_a_file_that_was_changed_is_named_and_no_server_is_told(transport: LoraTransport) -> None:
    server = FakeServer()
    transport.open(members(server), timeout_s=5)
    shipment = transport.prepare(an_adapter().items(), "1")
    (shipment.folder / "adapter_config.json").write_text("{}")

    with pytest.raises(CorruptWeightsError, match=r"adapter_config\.json has 2 bytes instead of"):
        transport.send(shipment, timeout_s=5)

    assert server.served == {}


MODEL = {"model.layers.0.self_attn.q_proj.weight": (16, 16)}


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({}, "the adapter has no tensors"),
        ({"model.embed_tokens.weight": (32, 16)}, "embed_tokens.weight is not called base_model.model.<module>"),
        ({f"{Q}.lora_A.weight": (2, 16)}, "lora_B.weight is to be a matrix, but is missing"),
        ({f"{Q}.lora_A.weight": (2, 16), f"{Q}.lora_B.weight": (16, 3)}, "q_proj has rank 2 in lora_A and 3 in lora_B"),
        (
            {f"{Q}.lora_A.weight": (4, 16), f"{Q}.lora_B.weight": (16, 4)},
            "q_proj has rank 4, but r=2 in its configuration",
        ),
        ({f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (16, 2)}, r"a matrix \[16, 8\], .* it is \[16, 16\]"),
        ({f"{Q}.lora_A.weight": (2, 16, 1), f"{Q}.lora_B.weight": (16, 2)}, r"is to be a matrix, but is \[2, 16, 1\]"),
        (
            {f"{Q}x.lora_A.weight": (2, 16), f"{Q}x.lora_B.weight": (16, 2)},
            r"a matrix \[16, 16\], in the model it is missing",
        ),
    ],
)
def test_what_is_no_adapter_of_the_model_is_refused(adapter: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        check_adapter(adapter, CONFIG, MODEL)


@given(
    rank=st.integers(1, 8), rows=st.integers(1, 8), columns=st.integers(1, 8), wrong=st.sampled_from([0, 1, 2, 3, None])
)
def test_an_adapter_fits_or_is_refused(rank: int, rows: int, columns: int, wrong: int | None) -> None:
    sides = [rank, columns, rows, rank]
    if wrong is not None:
        sides[wrong] += 1
    adapter = {f"{Q}.lora_A.weight": (sides[0], sides[1]), f"{Q}.lora_B.weight": (sides[2], sides[3])}
    model = {"model.layers.0.self_attn.q_proj.weight": (rows, columns)}

    if wrong is None:
        assert check_adapter(adapter, {"r": rank}, model) == rank
    else:
        with pytest.raises(AdapterError):
            check_adapter(adapter, {"r": rank}, model)


def test_ranks_may_differ_where_the_configuration_says_so() -> None:
    adapter = {f"{Q}.lora_A.weight": (9, 16), f"{Q}.lora_B.weight": (16, 9)}

    assert check_adapter(adapter, CONFIG | {"rank_pattern": {"q_proj": 9}}, MODEL) == 9


def test_shapes_are_not_compared_with_a_model_that_nobody_knows() -> None:
    adapter = {f"{Q}x.lora_A.weight": (2, 5), f"{Q}x.lora_B.weight": (7, 2)}

    assert check_adapter(adapter, CONFIG, {}) == 2
