"""What the start-up probe and the fingerprint see in a real vLLM with a real model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.end_to_end.conftest import MODEL, running_vllm
from trainer.policy.logprobs import PackedPolicy
from trainer.weight_sync.config import WeightSyncConfig
from trainer.weight_sync.connect import connect
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import NumericsError, ServerSyncError
from trainer.weight_sync.fingerprint import Fingerprint, Outcome
from trainer.weight_sync.numerics import Verdict, check_prompt, probe
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.scoring import fixed_prompts, score_tokens

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LIMIT = WeightSyncConfig().max_logprob_difference
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def policy() -> PackedPolicy:
    # In float32, as a trainer holds it.
    return PackedPolicy(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), chunk_size=64)


@pytest.fixture(scope="module")
def prompts(policy: PackedPolicy) -> list[list[int]]:
    return fixed_prompts(AutoTokenizer.from_pretrained(MODEL).encode, vocabulary=policy.config.vocab_size)


@pytest.fixture
def publisher(vllm_server: str) -> Iterator[WeightPublisher]:
    publisher = connect([vllm_server], WeightSyncConfig(timeout_s=60))
    yield publisher
    publisher.close()


@contextmanager
def changed(policy: PackedPolicy, size: float) -> Iterator[None]:
    """Move every weight by up to `size` standard deviations of its tensor, and put it back."""
    kept = {name: tensor.clone() for name, tensor in policy.lm.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.lm.parameters():
            parameter.add_(size * parameter.std() * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        policy.lm.load_state_dict(kept)


def run_probe(server: str, policy: PackedPolicy, prompts: list[list[int]]) -> list[Verdict]:
    return probe(VllmControl(server), prompts, lambda ids, t: score_tokens(policy, ids, t), limit=LIMIT)


def test_the_probe_passes_the_right_weights_with_processed_logprobs(
    vllm_server: str, publisher: WeightPublisher, policy: PackedPolicy, prompts: list[list[int]]
) -> None:
    publisher.publish(101, policy.lm.named_parameters())

    verdicts = run_probe(vllm_server, policy, prompts)

    print(*(verdict.figures() for verdict in verdicts), sep="\n")
    assert [verdict.cause for verdict in verdicts] == [None, None]
    assert all(verdict.tokens == 128 and verdict.mean_abs < LIMIT / 2 for verdict in verdicts)


def test_the_probe_refuses_a_server_that_was_given_other_weights(
    vllm_server: str, publisher: WeightPublisher, policy: PackedPolicy, prompts: list[list[int]], tmp_path: Path
) -> None:
    with changed(policy, 0.1):
        policy.lm.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_bytes((MODEL / "tokenizer.json").read_bytes())
    control = VllmControl(vllm_server)
    control.load_folder(str(tmp_path / "other"), "102", timeout_s=60)

    with pytest.raises(NumericsError, match="other weights") as raised:
        run_probe(vllm_server, policy, prompts)

    print(raised.value)
    assert vllm_server in str(raised.value)
    publisher.publish(103, policy.lm.named_parameters())
    assert run_probe(vllm_server, policy, prompts)


def test_the_server_reads_a_conversation_as_the_trainers_tokenizer_does(vllm_server: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    message = {"role": "user", "content": QUESTION}
    ours = tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]

    check_prompt(VllmControl(vllm_server), QUESTION, ours)
    with pytest.raises(NumericsError, match="chat template"):
        check_prompt(VllmControl(vllm_server), QUESTION, tokenizer.encode(QUESTION))


def test_a_push_is_proven_and_a_server_that_was_only_told_a_version_is_unmasked(
    vllm_server: str, publisher: WeightPublisher, policy: PackedPolicy, prompts: list[list[int]]
) -> None:
    control = VllmControl(vllm_server)
    fingerprint = Fingerprint(prompts, lambda ids: score_tokens(policy, ids), every=1, limit=LIMIT)

    def publish(version: int) -> None:
        fingerprint.expect(str(version))
        publisher.publish(version, policy.lm.named_parameters())
        fingerprint.prove(control, str(version))

    publish(104)
    with changed(policy, 0.02):
        publish(105)
    publish(106)
    with changed(policy, 0.02):
        fingerprint.expect("107")
        httpx.post(f"{vllm_server}/update_weight_version", json={"new_version": "107"}).raise_for_status()
        assert control.weight_version(timeout_s=20) == "107"
        with pytest.raises(ServerSyncError, match="did not take the update") as raised:
            fingerprint.prove(control, "107")

    print(raised.value)
    assert fingerprint.counts == {Outcome.PROVEN: 3, Outcome.STALE: 1}


def test_a_paused_server_is_not_asked_for_long(vllm_server: str, prompts: list[list[int]]) -> None:
    control = VllmControl(vllm_server)
    before = control.prompt_logprobs(prompts[0], timeout_s=20)
    control.pause("keep", timeout_s=20)
    try:
        with pytest.raises(ServerSyncError, match=r"did not answer within 0\.5 s"):
            control.prompt_logprobs(prompts[0], timeout_s=0.5)
    finally:
        control.resume(timeout_s=20)

    assert control.prompt_logprobs(prompts[0], timeout_s=20) == before


def test_the_probe_refuses_raw_logprobs_at_temperature_0_7(
    policy: PackedPolicy, prompts: list[list[int]], tmp_path: Path
) -> None:
    # As vLLM starts when nobody asks for processed logprobs.
    raw = {"extra_args": ["--logprobs-mode", "raw_logprobs"]}
    with (
        running_vllm(tmp_path / "server.log", **raw) as server,
        pytest.raises(NumericsError, match=r"temperature 0\.7 .*raw(.|\n)*processed_logprobs") as raised,
    ):
        run_probe(server.url, policy, prompts)
    print(raised.value)
