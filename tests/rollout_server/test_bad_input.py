"""Hostile and broken requests: each is a 4xx that names the field, the value and what was expected, and costs nothing."""

from __future__ import annotations

import gzip
import json
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from atroposlib.wire.columns import Group, encode_group
from rollout_server.config import ServerConfig
from tests.builders import a_group
from tests.processes import rollout_server_on_a_thread

TOKENS = {"env": ["env-token-000000000"], "trainer": ["trainer-token-00000"], "admin": ["admin-token-0000000"]}
GROUPS = "application/vnd.atropos.groups"
SOCKET_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Desk:
    """A server with a run and an environment, and one HTTP client for each role."""

    url: str
    trainer: httpx.Client
    env: httpx.Client
    stranger: httpx.Client
    run_session: int
    env_session: int

    def post_group(self, body: bytes, **headers: str) -> httpx.Response:
        return self.env.post("/v1/groups", content=body, headers={"Content-Type": GROUPS, **headers})

    def post_text(self, path: str, body: bytes, content_type: str = "application/json") -> httpx.Response:
        return self.trainer.post(path, content=body, headers={"Content-Type": content_type})

    def raw(self, head: str, body: bytes, *, role: str = "env") -> tuple[int, str]:
        """Send bytes as they are; returns status and everything that was answered."""
        address = urlsplit(self.url)
        assert address.hostname is not None
        with socket.create_connection((address.hostname, address.port), timeout=SOCKET_TIMEOUT_S) as connection:
            lines = f"{head}\r\nHost: localhost\r\nAuthorization: Bearer {TOKENS[role][0]}\r\n\r\n"
            connection.sendall(lines.encode() + body)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        return int(answer.split()[1]), answer.decode()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    config = ServerConfig.model_validate(
        {
            "port": 0, "data_dir": tmp_path_factory.mktemp("data"), "synchronous": "normal", "tokens": TOKENS,
            "max_body_bytes": 1 << 20, "max_decompressed_bytes": 1 << 20, "max_inflight_bytes": 2 << 20,
            "max_group_sequences": 8, "max_sequence_tokens": 64, "vocab_size": 1000, "body_timeout_s": 0.5,
            "max_header_bytes": 4096, "header_timeout_s": 0.5,
        }
    )  # fmt: skip
    with rollout_server_on_a_thread(config) as url:
        roles = {
            role: httpx.Client(base_url=url, headers={"Authorization": f"Bearer {tokens[0]}"})
            for role, tokens in TOKENS.items()
        }
        run = {"run_name": "run", "batch_size": 4, "num_steps": 100, "max_staleness": 100}
        run_session = roles["trainer"].post("/v1/run", json=run).json()["session"]
        env = roles["env"].post("/v1/envs", json={"name": "env", "group_size": 2}).json()
        roles["trainer"].post("/v1/policy", json={"session": run_session, "policy_version": 0})
        stranger = httpx.Client(base_url=url)
        yield Desk(url, roles["trainer"], roles["env"], stranger, run_session, env["session"])
        for client in (*roles.values(), stranger):
            client.close()


def header_and_payload(group: Group) -> tuple[dict[str, Any], bytes]:
    blob = encode_group(group)
    (length,) = struct.unpack("<Q", blob[:8])
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def blob_of(header: object, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def column(name: str, **changes: Any) -> bytes:
    """A blob in whose header one column says something else."""
    header, payload = header_and_payload(a_group())
    header[name] = {**header[name], **changes}
    return blob_of(header, payload)


def metadata(**changes: Any) -> bytes:
    """A blob in whose group facts something else is said; None takes a fact out."""
    header, payload = header_and_payload(a_group())
    facts = {**json.loads(header["__metadata__"]["group"]), **changes}
    header["__metadata__"]["group"] = json.dumps({key: value for key, value in facts.items() if value is not None})
    return blob_of(header, payload)


def with_column(name: str, index: int, value: float) -> bytes:
    """A blob that holds one other number."""
    group = a_group()
    values = getattr(group, name)
    array = np.zeros(group.n_tokens, dtype=np.float32) if values is None else values.copy()
    array[index] = value
    changed: dict[str, Any] = {name: array}
    return encode_group(replace(group, **changed))


def overlapping() -> bytes:
    header, payload = header_and_payload(a_group())
    header["inference_logprobs"]["data_offsets"] = header["tokens"]["data_offsets"]
    return blob_of(header, payload)


def with_gap() -> bytes:
    header, payload = header_and_payload(a_group())
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    begin, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [begin + 8, end + 8]
    return blob_of(header, payload[:begin] + bytes(8) + payload[begin:])


def header_text(change: Callable[[str], str]) -> bytes:
    header, payload = header_and_payload(a_group())
    return blob_of(change(json.dumps(header)).encode(), payload)


def unknown_column() -> bytes:
    header, payload = header_and_payload(a_group())
    header["toknes"] = header.pop("tokens")
    return blob_of(header, payload)


def ragged() -> bytes:
    group = a_group()
    return encode_group(replace(group, loss_mask=group.loss_mask[:-1]))


def empty_sequence() -> bytes:
    group = a_group()
    return encode_group(replace(group, cu_seqlens=np.array([0, 0, group.n_tokens], dtype=np.int32)))


def no_sequence() -> bytes:
    group = a_group()
    nothing: dict[str, Any] = {
        name: getattr(group, name)[:0] for name in ("tokens", "loss_mask", "scores", "inference_logprobs")
    }
    return encode_group(
        replace(
            group, **nothing, cu_seqlens=np.zeros(1, np.int32), policy_versions=np.zeros((0, 2), np.int32),
            finish_reasons=(),
        )
    )  # fmt: skip


BAD_GROUPS: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "ragged lengths": (ragged, ("loss_mask", "13", "14")),
    "NaN score": (lambda: with_column("scores", 0, float("nan")), ("scores", "nan")),
    "infinite score": (lambda: with_column("scores", 1, float("inf")), ("scores", "inf")),
    "NaN logprob": (lambda: with_column("inference_logprobs", 5, float("nan")), ("inference_logprobs", "nan")),
    "infinite logprob": (lambda: with_column("inference_logprobs", 5, -float("inf")), ("inference_logprobs", "-inf")),
    "NaN advantage": (lambda: with_column("advantages", 0, float("nan")), ("advantages", "nan")),
    "NaN reference logprob": (lambda: with_column("ref_logprobs", 0, float("nan")), ("ref_logprobs", "nan")),
    "empty group": (no_sequence, ("sequence",)),
    "empty sequence": (empty_sequence, ("cu_seqlens", "empty sequence")),
    "too many sequences": (lambda: encode_group(a_group(n=9)), ("9 sequences", "max_group_sequences=8")),
    "sequence too long": (lambda: encode_group(a_group(completion=70)), ("73 tokens", "max_sequence_tokens=64")),
    "negative token": (lambda: with_column("tokens", 0, -5), ("tokens", "-5")),
    "token outside the vocabulary": (lambda: with_column("tokens", 0, 1000), ("tokens", "1000", "vocab_size=1000")),
    "mask that is no mask": (lambda: with_column("loss_mask", 0, 7), ("loss_mask", "7")),
    "unknown environment": (lambda: encode_group(a_group(env_id=77)), ("77",)),
    "empty body": (lambda: b"", ("empty body",)),
    "noise": (lambda: b"\xff" * 5000, ("header length",)),
    "shorter than a header length": (lambda: b"abc", ("8 bytes", "3")),
    "truncated payload": (lambda: encode_group(a_group())[:-3], ("promises",)),
    "truncated header": (lambda: encode_group(a_group())[:40], ("promises",)),
    "second blob truncated": (lambda: encode_group(a_group()) * 2 + b"\x10", ("8 bytes", "1")),
    "offset beyond the body": (lambda: column("tokens", data_offsets=[0, 1 << 40]), ("tokens", str(1 << 40))),
    "huge shape": (lambda: column("tokens", shape=[1 << 62]), ("tokens", "shape")),
    "overlapping columns": (overlapping, ("data_offsets", "start at")),
    "gap between columns": (with_gap, ("8",)),
    "negative offsets": (lambda: column("tokens", data_offsets=[-56, 0]), ("tokens", "-56")),
    "huge header length": (lambda: struct.pack("<Q", 1 << 60) + b"{}", ("header length", str(1 << 60))),
    "header is not JSON": (lambda: blob_of(b"tokens=1;", b""), ("header",)),
    "header is not UTF-8": (lambda: blob_of(b'{"\xff": {}}', b""), ("header",)),
    "header nested deeply": (lambda: blob_of(b'{"a":' * 5000 + b"1" + b"}" * 5000, b""), ("header",)),
    "header key twice": (
        lambda: header_text(lambda text: text[:-1] + ', "tokens": {"dtype":"I32","shape":[0],"data_offsets":[0,0]}}'),
        ("tensors", "twice"),
    ),
    "unknown column": (unknown_column, ("toknes",)),
    "wrong dtype": (lambda: column("tokens", dtype="F32"), ("tokens", "F32", "I32")),
    "wrong rank": (lambda: column("tokens", shape=[7, 2]), ("tokens", "[7, 2]")),
    "unknown tensor field": (lambda: column("tokens", strides=[1]), ("strides",)),
    "version range that lies": (lambda: metadata(oldest_version=3, newest_version=9), ("(3, 9)", "(0, 0)")),
    "group facts are not JSON": (
        lambda: blob_of({**header_and_payload(a_group())[0], "__metadata__": {"group": "{"}}, header_and_payload(a_group())[1]),
        ("group metadata",),
    ),
    "no group facts": (lambda: blob_of({"__metadata__": {}}, b""), ("group",)),
    "missing group_id": (lambda: metadata(group_id=None), ("group_id",)),
    "empty group_id": (lambda: metadata(group_id=""), ("group_id", "0")),
    "huge group_id": (lambda: metadata(group_id="x" * 100_000), ("group_id", "100000")),
    "group_id is a number": (lambda: metadata(group_id=5), ("group_id", "int")),
    "version of the wire from the future": (lambda: metadata(wire_version=99), ("wire_version", "99")),
    "too few finish reasons": (lambda: metadata(finish_reasons=["stop"]), ("finish_reasons", "1", "2")),
}  # fmt: skip


def next_good_request_works(desk: Desk) -> None:
    answer = desk.post_group(encode_group(a_group(version=None)))
    assert answer.status_code == 200, answer.text
    assert answer.json()["results"][0]["status"] == "accepted"


def assert_refused(answer: httpx.Response, status: int, *named: str) -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"code", "detail"}
    missing = [text for text in named if text not in body["detail"]]
    assert missing == [], body["detail"]
    assert len(body["detail"]) < 2000


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_a_broken_group_is_refused_by_name_and_costs_nothing(desk: Desk, name: str) -> None:
    make, named = BAD_GROUPS[name]
    queued = desk.env.get("/v1/status").json()["queued_groups"]

    answer = desk.post_group(make())

    expected = 409 if name == "unknown environment" else 422
    assert_refused(answer, expected, *named)
    assert desk.env.get("/v1/status").json()["queued_groups"] == queued
    next_good_request_works(desk)


RUN = {"run_name": "run", "batch_size": 4, "num_steps": 100}
BAD_JSON: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "not JSON": ("/v1/run", b"{", ("JSON",)),
    "no body": ("/v1/run", b"", ("body", "required")),
    "not an object": ("/v1/run", b"[1]", ("body",)),
    "invalid UTF-8": ("/v1/run", b'{"run_name": "\xff\xfe"}', ("UTF-8", "0xff")),
    "half a surrogate pair": ("/v1/run", json.dumps({**RUN, "run_name": "\ud800"}).encode(), ("surrogate",)),
    "key given twice": ("/v1/run", b'{"run_name": "a", "run_name": "b"}', ("run_name", "twice")),
    "nested deeply": ("/v1/run", b"[" * 100_000, ("nested",)),
    "NaN": ("/v1/envs", b'{"name": "e", "group_size": 2, "weight": NaN}', ("NaN", "finite")),
    "infinite": ("/v1/envs", b'{"name": "e", "group_size": 2, "weight": 1e999}', ("1e999", "finite")),
    "beyond 64 bits": ("/v1/policy", b'{"session": 1, "policy_version": 99999999999999999999}', ("64 bits",)),
    "misspelt field": ("/v1/run", b'{"run_name": "a", "batchsize": 4, "num_steps": 1}', ("batchsize",)),
    "missing field": ("/v1/run", b'{"run_name": "a", "num_steps": 1}', ("batch_size", "required")),
    "negative batch size": ("/v1/run", json.dumps({**RUN, "batch_size": -4}).encode(), ("batch_size", "-4", "greater")),
    "negative staleness": ("/v1/run", json.dumps({**RUN, "max_staleness": -1}).encode(), ("max_staleness", "-1")),
    "negative version": ("/v1/policy", b'{"session": 1, "policy_version": -2}', ("policy_version", "-2")),
    "negative commit": ("/v1/commit", b'{"session": 1, "step": -1}', ("step", "-1")),
    "wait_s too long": ("/v1/batches/0/lease", b'{"session": 1, "wait_s": 61}', ("wait_s", "61", "60")),
    "wait_s negative": ("/v1/batches/0/lease", b'{"session": 1, "wait_s": -1}', ("wait_s", "-1", "0")),
    "step is no number": ("/v1/batches/first/lease", b'{"session": 1}', ("step", "first")),
    "wrong type": ("/v1/run", json.dumps({**RUN, "batch_size": "four"}).encode(), ("batch_size", "four", "integer")),
    "huge name": ("/v1/run", json.dumps({**RUN, "run_name": "x" * 5000}).encode(), ("run_name", "200")),
    "empty name": ("/v1/run", json.dumps({**RUN, "run_name": ""}).encode(), ("run_name", "1")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_broken_message_is_refused_by_name(desk: Desk, name: str) -> None:
    path, body, named = BAD_JSON[name]
    sender = desk.env if path == "/v1/envs" else desk.trainer

    answer = sender.post(path, content=body, headers={"Content-Type": "application/json"})

    assert_refused(answer, 422, *named)
    next_good_request_works(desk)


def test_a_wrong_content_type_is_refused(desk: Desk) -> None:
    run = json.dumps(RUN).encode()

    assert_refused(desk.post_text("/v1/run", run, "text/plain"), 415, "text/plain", "application/json")
    assert_refused(desk.post_text("/v1/run", run, "application/xml"), 415, "application/xml")
    answer = desk.env.post("/v1/groups", content=b"{}", headers={"Content-Type": "application/json"})
    assert_refused(answer, 415, "application/json", GROUPS)
    next_good_request_works(desk)


def test_a_session_that_was_never_given_is_fenced(desk: Desk) -> None:
    answer = desk.trainer.post("/v1/batches/0/lease", json={"session": desk.run_session + 7, "wait_s": 0})

    assert_refused(answer, 409, str(desk.run_session))
    next_good_request_works(desk)


def test_a_step_that_was_never_handed_out_cannot_be_acknowledged(desk: Desk) -> None:
    answer = desk.trainer.post("/v1/batches/99/ack", json={"session": desk.run_session})

    assert_refused(answer, 409, "99")
    next_good_request_works(desk)


def test_an_environment_session_that_was_never_given_gets_no_tickets(desk: Desk) -> None:
    request = {"env_id": 0, "session": desk.env_session + 7, "sequences": 2, "wait_s": 0}

    assert_refused(desk.env.post("/v1/tickets", json=request), 409, str(desk.env_session + 7))
    assert_refused(desk.env.post("/v1/tickets", json={**request, "env_id": 99}), 409, "99")
    next_good_request_works(desk)


def test_unknown_tickets_are_not_alive(desk: Desk) -> None:
    update = {"env_id": 0, "session": desk.env_session, "tickets": ["never-given"]}

    assert desk.env.post("/v1/tickets/renew", json=update).json() == {"alive": []}
    next_good_request_works(desk)


def test_too_many_tickets_at_once_are_refused(desk: Desk) -> None:
    request = {"env_id": 0, "session": desk.env_session, "sequences": 2, "count": 5000, "wait_s": 0}

    assert_refused(desk.env.post("/v1/tickets", json=request), 422, "count", "5000", "1024")
    next_good_request_works(desk)


def test_a_missing_or_unknown_token_is_a_401_and_a_wrong_role_a_403(desk: Desk) -> None:
    missing = desk.stranger.get("/v1/status")
    unknown = desk.stranger.get("/v1/status", headers={"Authorization": "Bearer given-up-long-ago"})
    wrong = desk.env.post("/v1/run", json=RUN)

    assert_refused(missing, 401, "Authorization: Bearer")
    assert_refused(unknown, 401, "not known")
    assert missing.headers["WWW-Authenticate"].startswith("Bearer")
    assert_refused(wrong, 403, "role env", "trainer")
    next_good_request_works(desk)


def test_a_body_over_the_limit_is_refused(desk: Desk) -> None:
    stated = desk.post_group(b"x" * ((1 << 20) + 1))
    chunked = desk.env.post("/v1/groups", content=(b"x" * 65536 for _ in range(40)), headers={"Content-Type": GROUPS})

    assert_refused(stated, 413, str((1 << 20) + 1), "max_body_bytes=1048576")
    assert_refused(chunked, 413, "max_body_bytes=1048576")
    next_good_request_works(desk)


def test_a_json_body_over_the_limit_is_refused(desk: Desk) -> None:
    answer = desk.post_text("/v1/run", b" " * ((1 << 20) + 1))

    assert_refused(answer, 413, "max_body_bytes")
    next_good_request_works(desk)


BAD_GZIP: dict[str, tuple[bytes, int, str]] = {
    "not gzip": (b"{}", 400, "not gzip"),
    "truncated": (gzip.compress(b"{}" * 100)[:-9], 400, "ends early"),
    "bad checksum": (gzip.compress(b"{}")[:-8] + bytes(8), 400, "not gzip"),
    "bomb": (gzip.compress(bytes(64 << 20), 1), 413, "max_decompressed_bytes=1048576"),
    "bomb of many members": (gzip.compress(bytes(1 << 19)) * 20, 413, "max_decompressed_bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_GZIP)
def test_broken_gzip_is_refused(desk: Desk, name: str) -> None:
    body, status, named = BAD_GZIP[name]

    native = desk.post_group(body, **{"Content-Encoding": "gzip"})
    old = desk.env.post("/scored_data", content=body, headers={"Content-Encoding": "GZip"})

    assert_refused(native, status, named)
    assert old.status_code == status
    if status == 400:
        assert old.text == "Invalid gzip payload"
    next_good_request_works(desk)


def test_an_encoding_that_is_not_understood_is_refused(desk: Desk) -> None:
    assert_refused(desk.post_group(b"x", **{"Content-Encoding": "deflate"}), 400, "deflate", "gzip")
    assert desk.env.post("/scored_data", content=b"{}", headers={"Content-Encoding": "br"}).status_code == 400
    next_good_request_works(desk)


def test_gzip_is_undone_whatever_the_case_of_its_name(desk: Desk) -> None:
    answer = desk.post_group(gzip.compress(encode_group(a_group(version=None))), **{"Content-Encoding": "GZIP"})

    assert answer.json()["results"][0]["status"] == "accepted"


def test_a_body_that_does_not_come_is_a_408_and_the_connection_closes(desk: Desk) -> None:
    status, answer = desk.raw(f"POST /v1/groups HTTP/1.1\r\nContent-Type: {GROUPS}\r\nContent-Length: 5000", b"slow")

    assert status == 408
    assert "body_timeout_s=0.5" in answer
    assert "4 bytes" in answer
    next_good_request_works(desk)


def test_headers_that_do_not_end_close_the_connection(desk: Desk) -> None:
    address = urlsplit(desk.url)
    assert address.hostname is not None
    with socket.create_connection((address.hostname, address.port), timeout=SOCKET_TIMEOUT_S) as connection:
        connection.sendall(b"GET /v1/status HTTP/1.1\r\nX-Slow: ")
        answer = connection.recv(65536)

    assert answer.startswith(b"HTTP/1.1 408")
    assert b"header_timeout_s=0.5" in answer
    next_good_request_works(desk)


@pytest.mark.parametrize("line", ["X-Long: " + "x" * 5000, "\r\n".join(f"X-{i}: {'y' * 90}" for i in range(50))])
def test_headers_over_the_limit_are_a_431(desk: Desk, line: str) -> None:
    status, answer = desk.raw(f"GET /v1/status HTTP/1.1\r\n{line}", b"")

    assert status == 431
    assert "max_header_bytes=4096" in answer
    next_good_request_works(desk)


@pytest.mark.parametrize(
    "head",
    [
        "POST /v1/run HTTP/1.1\r\nContent-Length: -5",
        "POST /v1/run HTTP/1.1\r\nContent-Length: many",
        "POST /v1/run HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3",
        "POST /v1/run HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked",
        "POST /v1/run HTTP/9",
        "\x00\x01\x02",
    ],
)
def test_what_is_no_http_is_a_400(desk: Desk, head: str) -> None:
    assert desk.raw(head, b"{}")[0] == 400
    next_good_request_works(desk)


def test_a_content_length_that_is_too_small_does_not_hide_a_second_request(desk: Desk) -> None:
    status, answer = desk.raw(
        "POST /v1/commit HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 2", b'{}{"smuggled": 1}\r\n'
    )

    assert status in (400, 422)  # 422 where the surplus comes so late that the first request has been answered
    assert "HTTP/1.1 400" in answer
    next_good_request_works(desk)


def test_a_sender_that_hangs_up_inside_its_body_costs_nothing(desk: Desk) -> None:
    queued = desk.env.get("/v1/status").json()["queued_groups"]
    address = urlsplit(desk.url)
    assert address.hostname is not None
    with socket.create_connection((address.hostname, address.port), timeout=SOCKET_TIMEOUT_S) as connection:
        head = f"POST /v1/groups HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKENS['env'][0]}\r\n"
        connection.sendall(f"{head}Content-Length: 5000\r\n\r\nhalf".encode())

    assert desk.env.get("/v1/status").json()["queued_groups"] == queued
    next_good_request_works(desk)


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/batches/1", "/v1/../etc/passwd", "/v1/%2e%2e/%2e%2e/etc/passwd"])
def test_an_unknown_path_is_a_404_in_the_form_of_v1(desk: Desk, path: str) -> None:
    with httpx.Client(base_url=desk.url, headers={"Authorization": f"Bearer {TOKENS['admin'][0]}"}) as admin:
        answer = admin.get(path)

    assert answer.status_code == 404
    next_good_request_works(desk)


def test_a_wrong_method_is_a_405(desk: Desk) -> None:
    with httpx.Client(base_url=desk.url, headers={"Authorization": f"Bearer {TOKENS['admin'][0]}"}) as admin:
        assert_refused(admin.delete("/v1/run"), 405, "Method Not Allowed")
        assert admin.delete("/register").json() == {"detail": "Method Not Allowed"}
    next_good_request_works(desk)


OLD_GROUP = {"tokens": [[1, 2, 3], [1, 2, 4]], "masks": [[-100, 2, 3], [-100, 2, 4]], "scores": [1.0, 0.0]}
BAD_OLD: dict[str, bytes] = {
    "ragged": json.dumps({**OLD_GROUP, "masks": [[1]]}).encode(),
    "missing scores": json.dumps({"tokens": [[1]], "masks": [[1]]}).encode(),
    "not JSON": b"{",
    "invalid UTF-8": b'{"tokens": "\xff"}',
    "NaN score": b'{"tokens": [[1]], "masks": [[1]], "scores": [NaN]}',
    "nested deeply": b"[" * 100_000,
    "token is text": json.dumps({**OLD_GROUP, "tokens": [["a"], ["b"]]}).encode(),
    "token beyond 32 bits": json.dumps({**OLD_GROUP, "tokens": [[1, 2, 1 << 40], [1, 2, 4]]}).encode(),
    "negative token": json.dumps({**OLD_GROUP, "tokens": [[1, 2, -3], [1, 2, 4]]}).encode(),
    "infinite score": b'{"tokens": [[1]], "masks": [[1]], "scores": [1e999]}',
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OLD)
def test_a_broken_group_of_an_old_client_is_a_422_with_a_detail(desk: Desk, name: str) -> None:
    answer = desk.env.post("/scored_data", content=BAD_OLD[name])

    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"]
    assert len(answer.text) < 5000
    next_good_request_works(desk)
