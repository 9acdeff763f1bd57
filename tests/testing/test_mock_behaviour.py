"""Time, faults, versions and chance of the mock inference server."""

from __future__ import annotations

import asyncio
import random
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.errors import ConfigError
from atroposlib.testing.mock.behaviour import FAULT_KINDS, Dice, FaultRates, Faults, Latency
from atroposlib.testing.mock.codec import ByteCodec
from atroposlib.testing.mock.generation import mock_logprobs, prompt_logprobs, version_spans
from atroposlib.testing.mock.policies import (  # fmt: skip
    Echo,
    OneOf,
    Prompt,
    PromptFunction,
    Rules,
    Script,
    as_policy,
    load_policy,
    parse_rule,
)
from atroposlib.testing.mock_inference import MockInferenceServer, in_thread

BODY = {"token_ids": [5, 6], "model": "m", "sampling_params": {"n": 1, "logprobs": 0}}


async def generate(server: MockInferenceServer, **body: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=server.root_url, timeout=60) as http:
        return await http.post("/inference/v1/generate", json={**BODY, **body})


async def leave_what_hangs(server: MockInferenceServer) -> None:
    """Ask what will never be answered, and go as soon as that is so."""
    request = asyncio.create_task(generate(server))
    async with asyncio.timeout(5):
        while server.faults.hang:  # noqa: ASYNC110 - the mock has no event to wait for
            await asyncio.sleep(0.005)
    assert not request.done()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request


async def texts(server: MockInferenceServer, prompts: list[list[int]], **sampling: Any) -> list[str]:
    answers = [await generate(server, token_ids=prompt, sampling_params={"n": 1, **sampling}) for prompt in prompts]
    return [server.codec.decode(answer.json()["choices"][0]["token_ids"]) for answer in answers]


def prompt_of(text: str, **changes: Any) -> Prompt:
    codec = ByteCodec()
    return Prompt(codec.encode(text), 0, codec, lambda: "key", **changes)


# Latency


def test_a_constant_latency_needs_no_chance() -> None:
    assert Latency(base_s=0.5, per_token_s=0.01).draw(None, 10) == pytest.approx(0.6)
    assert not Latency(base_s=0.5).is_random


def test_a_lognormal_latency_has_base_s_as_its_median() -> None:
    rng = random.Random(0)
    drawn = sorted(Latency(base_s=2.0, sigma=0.5).draw(rng, 0) for _ in range(2001))

    assert drawn[1000] == pytest.approx(2.0, rel=0.05)
    assert drawn[-1] > 2 * drawn[1000]


def test_stragglers_are_the_share_that_was_asked_for() -> None:
    rng = random.Random(0)
    drawn = [Latency(base_s=1.0, straggler_share=0.1, straggler_factor=7).draw(rng, 0) for _ in range(2000)]

    assert set(drawn) == {1.0, 7.0}
    assert drawn.count(7.0) == pytest.approx(200, abs=50)


@pytest.mark.parametrize("wrong", [{"base_s": -1.0}, {"straggler_share": 2.0}])
def test_an_impossible_latency_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Latency(**wrong)


# Faults


@pytest.mark.parametrize("kind", FAULT_KINDS)
async def test_each_fault_strikes_once_and_is_over(kind: str) -> None:
    async with MockInferenceServer("yes") as server:
        setattr(server.faults, kind, 1)
        match kind:
            case "refuse":
                assert (await generate(server)).status_code == 500
            case "drop" | "truncate":
                with pytest.raises(httpx.TransportError):
                    await generate(server)
            case "hang":
                await leave_what_hangs(server)
            case "abort":
                assert (await generate(server)).json()["choices"][0]["finish_reason"] == "abort"
            case "misalign":
                [choice] = (await generate(server)).json()["choices"]
                assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) - 1

        assert (await generate(server)).json()["choices"][0]["finish_reason"] == "stop"


async def test_a_dropped_connection_is_reset_not_closed() -> None:
    async with MockInferenceServer("yes") as server:
        server.faults.drop = 1
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 15\r\n\r\n" + b'{"prompt": "a"}')
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()


def test_fault_rates_hold_on_average() -> None:
    rates, rng = FaultRates(refuse=0.2, hang=0.1), random.Random(0)
    drawn = [rates.draw(rng) for _ in range(3000)]

    assert drawn.count("refuse") == pytest.approx(600, abs=80)
    assert drawn.count("hang") == pytest.approx(300, abs=60)
    assert drawn.count(None) + drawn.count("refuse") + drawn.count("hang") == 3000


def test_rates_above_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 1"):
        FaultRates(refuse=0.7, drop=0.7)


async def test_a_retry_of_the_same_request_may_succeed() -> None:
    async with MockInferenceServer("yes", fault_rates=FaultRates(refuse=0.5)) as server:
        greedy = {"n": 1, "temperature": 0}
        seen = {(await generate(server, sampling_params=greedy)).status_code for _ in range(20)}

    assert seen == {200, 500}


def test_faults_are_used_up_in_order() -> None:
    faults = Faults(refuse=1, drop=2)

    assert [faults.take() for _ in range(4)] == ["drop", "drop", "refuse", None]


# Concurrency


async def test_more_requests_than_max_running_queue() -> None:
    async with (
        MockInferenceServer("yes", max_running=2) as server,
        httpx.AsyncClient(base_url=server.root_url) as http,
        asyncio.timeout(60),
        asyncio.TaskGroup() as tasks,
    ):
        # Held until they are cancelled, however long the others take to arrive.
        server.faults.hang = 2
        running = [tasks.create_task(generate(server)) for _ in range(2)]
        while server.faults.hang:  # noqa: ASYNC110 - the mock has no event to wait for
            await asyncio.sleep(0.005)
        queued = [tasks.create_task(generate(server)) for _ in range(3)]
        while server.in_flight < 5:  # noqa: ASYNC110 - the mock has no event to wait for
            await asyncio.sleep(0.005)
        metrics = (await http.get("/metrics")).text
        for task in running:
            task.cancel()
        await asyncio.wait(queued)
        while server.in_flight:  # noqa: ASYNC110 - the mock has no event to wait for
            await asyncio.sleep(0.005)

    assert 'vllm:num_requests_running{model_name="mock"} 2' in metrics
    assert 'vllm:num_requests_waiting{model_name="mock"} 3' in metrics
    assert [task.result().status_code for task in queued] == [200] * 3


async def test_hundreds_of_requests_are_in_flight_at_once() -> None:
    n = 300
    body = b'{"token_ids": [7], "sampling_params": {"n": 1}}'
    request = b"POST /inference/v1/generate HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    async def ask(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        return head[:12]

    async with MockInferenceServer("yes", latency_s=3.0) as server:
        answers = await asyncio.gather(*(ask(server.port) for _ in range(n)))

    assert set(answers) == {b"HTTP/1.1 200"}
    assert server.max_in_flight == n


async def test_a_client_that_leaves_frees_its_slot() -> None:
    async with MockInferenceServer("yes", max_running=1) as server:
        server.faults.hang = 1
        await leave_what_hangs(server)
        async with asyncio.timeout(5):
            answer = await generate(server)

    assert answer.status_code == 200


async def test_pipelined_requests_are_answered_in_order_and_large_bodies_arrive_whole() -> None:
    async with MockInferenceServer(lambda ids, index: [len(ids) % 200, 2]) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        for length in (1, 50_000, 2):
            body = b'{"token_ids": [%s], "sampling_params": {"n": 1}}' % b",".join([b"7"] * length)
            writer.write(b"POST /inference/v1/generate HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        seen = []
        for _ in range(3):
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
            seen.append((await reader.readexactly(size)).split(b'"token_ids":[')[1].split(b",")[0])
        writer.close()

    assert seen == [b"1", str(50_000 % 200).encode(), b"2"]


async def test_a_connection_ends_when_the_client_says_so() -> None:
    async with MockInferenceServer() as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(5):
            answer = await reader.read()
        writer.close()

    assert answer.endswith(b"{}")


@pytest.mark.parametrize(
    "request_line", [b"nonsense\r\n\r\n", b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"]
)
async def test_what_is_no_request_of_known_length_is_refused(request_line: bytes) -> None:
    async with MockInferenceServer() as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(request_line)
        async with asyncio.timeout(5):
            answer = await reader.read()
        writer.close()

    assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("turns", range(4))
async def test_a_connection_that_is_just_being_accepted_is_reset_too(turns: int) -> None:
    server = MockInferenceServer()
    await server.start()
    with socket.create_connection((server.host, server.port), timeout=5) as client:
        for _ in range(turns):
            await asyncio.sleep(0)
        await server.stop()
        await asyncio.sleep(0)
        with pytest.raises(ConnectionResetError):
            client.recv(1)


async def test_stop_frees_the_port_and_start_takes_it_again() -> None:
    server = MockInferenceServer("yes")
    await server.start()
    port = server.port
    await server.stop()
    with pytest.raises(httpx.ConnectError):
        await generate(server)

    async with server:
        assert server.port == port
        assert (await generate(server)).status_code == 200


def test_it_runs_on_a_thread_of_its_own() -> None:
    with in_thread(MockInferenceServer("yes")) as server:
        answer = httpx.get(f"{server.root_url}/health", timeout=5)

    assert answer.status_code == 200
    with socket.socket() as probe:
        assert probe.connect_ex((server.host, server.port)) != 0


# Versions


async def test_a_version_that_changes_in_flight_splits_the_tokens() -> None:
    async with MockInferenceServer("a long reply", weight_version="1", latency_s=0.15) as server:
        asked = asyncio.create_task(generate(server))
        while not server.in_flight:  # noqa: ASYNC110 - the mock has no event to wait for
            await asyncio.sleep(0.005)
        # In the middle of it, or at any rate not at its very start.
        await asyncio.sleep(0.05)
        server.weight_version = "2"
        spans = (await asked).json()["choices"][0]["weight_versions"]

    assert [span["version"] for span in spans] == ["1", "2"]
    assert spans[0]["end"] == spans[1]["start"]
    assert spans[1]["end"] == len("a long reply") + 1


@given(
    times=st.lists(st.floats(0, 10), max_size=6).map(sorted),
    n_tokens=st.integers(0, 20),
    started=st.floats(0, 10),
    took=st.floats(0, 5),
)
def test_spans_cover_the_tokens_in_order(times: list[float], n_tokens: int, started: float, took: float) -> None:
    changes = [(0.0, "v0"), *((at, f"v{i}") for i, at in enumerate(times, 1))]
    spans = version_spans(changes, n_tokens, started=started, ended=started + took)

    assert sum(span["end"] - span["start"] for span in spans) == n_tokens
    assert [span["start"] for span in spans] == [0, *(span["end"] for span in spans)][: len(spans)]
    names = [span["version"] for span in spans]
    assert names == sorted(set(names))
    # Whoever asks after a change gets the new version only.
    if n_tokens and not any(started < at <= started + took for at in times):
        assert names == [f"v{sum(at <= started for at in times)}"]


def test_logprobs_are_possible() -> None:
    assert max(mock_logprobs(100)) <= 0
    columns = prompt_logprobs(list(range(50)), 3, 259)
    assert columns[0] is None
    assert all(column and max(column.values()) < 0 and len(column) == 3 for column in columns[1:])


# Policies


async def test_the_same_seed_gives_the_same_replies_whatever_the_order() -> None:
    prompts = [[i, i + 1] for i in range(8)]
    async with (
        MockInferenceServer(seed=1) as one,
        MockInferenceServer(seed=1) as two,
        MockInferenceServer(seed=2) as other,
    ):
        first, second = await texts(one, prompts), await texts(two, prompts[::-1])
        third = await texts(other, prompts)

    assert first == second[::-1]
    assert first != third


async def test_a_repeated_prompt_gets_other_replies_unless_it_is_greedy() -> None:
    async with MockInferenceServer() as server:
        sampled = await texts(server, [[5]] * 8)
        greedy = await texts(server, [[5]] * 4, temperature=0)

    assert len(set(sampled)) > 1
    assert len(set(greedy)) == 1


def test_dice_count_how_often_a_prompt_was_asked() -> None:
    dice = Dice(0)

    assert dice.key([1]) != dice.key([1])
    assert dice.key([1], is_greedy=True) == dice.key([1], is_greedy=True)
    assert Dice(0).key([1], salt=1) != Dice(0).key([1], salt=2)


@pytest.mark.parametrize("known", [True, False])
def test_a_script_goes_by_turns_with_and_without_the_chat(known: bool) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    codec = ByteCodec()
    prompts = [
        Prompt(codec.render(turns), 0, codec, lambda: "", turns if known else None) for turns in (chat[:1], chat)
    ]
    script = Script(("first", "second"))

    assert [script.reply(prompt) for prompt in prompts] == ["first", "second"]
    assert [Echo().reply(prompt) for prompt in prompts] == ["a", "c"]


def test_rules_use_what_they_found() -> None:
    rules = Rules((parse_rule(r"(\d+) \+ 0=>\1"), parse_rule("weather=>fine")), otherwise="?")

    assert rules.reply(prompt_of("say 7 + 0")) == "7"
    assert rules.reply(prompt_of("the weather")) == "fine"
    assert rules.reply(prompt_of("else")) == "?"


@pytest.mark.parametrize("text", ["no arrow", "(=>x"])
def test_a_bad_rule_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="rule"):
        parse_rule(text)


def test_one_of_uses_each_text() -> None:
    policy = OneOf(("a", "b"))
    codec = ByteCodec()

    assert {policy.reply(Prompt([], index, codec, lambda: "k")) for index in range(20)} == {"a", "b"}


def test_a_policy_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "policy.py"
    file.write_text(
        "def reply(prompt):\n    return prompt.text.upper()\n\n\ndef other(prompt):\n    return [prompt.index]\n"
    )

    assert load_policy(str(file)).reply(prompt_of("hi")) == "HI"
    assert load_policy(f"{file}:other").reply(prompt_of("hi")) == [0]
    with pytest.raises(ConfigError, match="no function missing"):
        load_policy(f"{file}:missing")
    with pytest.raises(ConfigError, match="no Python file"):
        load_policy(str(tmp_path / "nowhere.py"))


def test_what_may_be_given_as_a_reply() -> None:
    assert as_policy("a") == as_policy(["a"]) == Script(("a",))
    function = PromptFunction(lambda prompt: "x")
    assert as_policy(function) is function
    with pytest.raises(ConfigError):
        as_policy([])


async def test_a_policy_that_fails_is_an_error_500_that_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def broken(prompt: Prompt) -> str:
        raise KeyError("oops")

    async with MockInferenceServer(PromptFunction(broken)) as server:
        answer = await generate(server)

    assert answer.status_code == 500
    assert "oops" in answer.json()["error"]["message"]
    assert "the policy failed" in caplog.text
