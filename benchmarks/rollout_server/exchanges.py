"""How groups go into each kind of server and come out again."""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec

from benchmarks.rollout_server.http_connection import COLUMNS_HEADER, JSON_HEADER, HttpConnection
from benchmarks.rollout_server.payloads import (
    ID_DIGITS,
    Payload,
    columns_payload,
    json_payload,
    single_json_payload,
    widened,
)
from benchmarks.rollout_server.shapes import Shape

COMMIT_PERIOD = 10
"""Steps between two commits, as between two checkpoints."""
BUSY_PAUSE_S = 0.02
NEVER = 1_000_000_000
JSON_ID = re.compile(rb'"group_overrides":\{"id":"(\d+)"')


class Poster(Protocol):
    """Sends request bodies over one connection."""

    def post(self, body: bytearray) -> None:
        """Send one body; raises unless every group of it was accepted."""

    def close(self) -> None:
        """Hang up."""


class Taker(Protocol):
    """Takes batches as a trainer does, over one connection."""

    def take(self) -> bytes | None:
        """The next batch, acknowledged; None when none is ready."""

    def close(self) -> None:
        """Hang up."""


class Exchange(Protocol):
    """One protocol, prepared for one shape."""

    payload: Payload

    def open(self, port: int) -> Taker:
        """Register a run and an environment; returns its trainer."""

    def poster(self, port: int) -> Poster:
        """One more sender."""

    def numbers(self, batch: bytes) -> Sequence[int]:
        """Numbers of the groups of a batch, read cheaply."""

    def groups(self, batch: bytes) -> Iterator[bytes]:
        """Bytes of each group of a batch, in the same order, encoded as they were sent."""


class _Connected:
    """Owns a connection."""

    def __init__(self, connection: HttpConnection) -> None:
        self._connection = connection

    def close(self) -> None:
        self._connection.close()


class ColumnsExchange:
    """The native routes."""

    def __init__(self, shape: Shape) -> None:
        self.payload = columns_payload(shape, shape.groups_per_batch)
        self._batch_size = shape.sequences * shape.groups_per_batch
        self._group_size = shape.sequences

    def open(self, port: int) -> Taker:
        """Open a run whose staleness bound never binds."""
        connection = HttpConnection(port)
        run = post_json(
            connection,
            "/v1/run",
            {"run_name": "benchmark", "batch_size": self._batch_size, "max_staleness": 10_000_000, "num_steps": NEVER},
        )
        post_json(connection, "/v1/envs", {"name": "benchmark", "group_size": self._group_size, "max_token_len": NEVER})
        policy = msgspec.json.encode({"session": run["session"], "policy_version": 0})
        connection.call(b"POST", "/v1/policy", policy, JSON_HEADER).expect(204)
        return _ColumnsTaker(connection, HttpConnection(port), run["session"])

    def poster(self, port: int) -> Poster:
        """A sender of blobs."""
        return _ColumnsPoster(HttpConnection(port))

    def numbers(self, batch: bytes) -> Sequence[int]:
        """All blobs are of one size, so the ids lie at equal distances."""
        size, at = len(self.payload.groups[0].data), self.payload.groups[0].id_at
        if len(batch) % size:
            raise ValueError(f"a batch of {len(batch)} bytes is no whole number of blobs of {size} bytes")
        return [int(batch[start + at : start + at + ID_DIGITS]) for start in range(0, len(batch), size)]

    def groups(self, batch: bytes) -> Iterator[bytes]:
        """The blobs."""
        size = len(self.payload.groups[0].data)
        return (batch[start : start + size] for start in range(0, len(batch), size))


class _ColumnsPoster(_Connected):
    def post(self, body: bytearray) -> None:
        while True:
            answer = self._connection.call(b"POST", "/v1/groups", body, COLUMNS_HEADER)
            if answer.status != 429:
                break
            time.sleep(BUSY_PAUSE_S)
        results = answer.expect()
        if results.count(b'"accepted"') != results.count(b'"status"'):
            raise RuntimeError(f"not every group was accepted: {results[:500]!r}")


class _ColumnsTaker(_Connected):
    """A trainer that prefetches: while it works on a batch, the next one is leased and the last acknowledgement travels."""

    def __init__(self, connection: HttpConnection, acks: HttpConnection, session: int) -> None:
        super().__init__(connection)
        self._acks = acks
        self._session = session
        self._lease = msgspec.json.encode({"session": session, "wait_s": 1.0})
        self._ack = msgspec.json.encode({"session": session})
        self._step = 0
        self._ask()

    def take(self) -> bytes | None:
        answer = self._connection.answer()
        if answer.status == 202:
            self._ask()
            return None
        batch = answer.expect()
        if self._step > 0:
            self._acks.answer().expect(204)
            if self._step % COMMIT_PERIOD == 0:
                commit = msgspec.json.encode({"session": self._session, "step": self._step})
                self._acks.call(b"POST", "/v1/commit", commit, JSON_HEADER).expect(204)
        self._acks.send(b"POST", f"/v1/batches/{self._step}/ack", self._ack, JSON_HEADER)
        self._step += 1
        self._ask()
        return batch

    def close(self) -> None:
        super().close()
        self._acks.close()

    def _ask(self) -> None:
        self._connection.send(b"POST", f"/v1/batches/{self._step}/lease", self._lease, JSON_HEADER)


class JsonExchange:
    """The old routes, as ours and upstream serve them.

    Args:
        listed: several groups a request to /scored_data_list, else one to /scored_data.
    """

    def __init__(self, shape: Shape, *, listed: bool = True) -> None:
        self.payload = json_payload(shape, shape.groups_per_batch) if listed else single_json_payload(shape)
        self._path = "/scored_data_list" if listed else "/scored_data"
        self._batch_size = shape.sequences * (shape.groups_per_batch if listed else 1)
        self._group_size = shape.sequences

    def open(self, port: int) -> Taker:
        """Register trainer and environment in the order that upstream asks for."""
        connection = HttpConnection(port)
        register_json(connection, batch_size=self._batch_size, group_size=self._group_size)
        return _JsonTaker(connection)

    def poster(self, port: int) -> Poster:
        """A sender of JSON."""
        return _JsonPoster(HttpConnection(port), self._path)

    def numbers(self, batch: bytes) -> Sequence[int]:
        """Ids are found as text, which is much cheaper than decoding."""
        return [int(number) for number in JSON_ID.findall(batch)]

    def groups(self, batch: bytes) -> Iterator[bytes]:
        """The groups reduced to the fields that were sent and encoded the same way again."""
        sent = msgspec.json.decode(self.payload.groups[0].data)
        for group in msgspec.json.decode(batch)["batch"]:
            group["inference_logprobs"] = widened(group["inference_logprobs"])
            yield msgspec.json.encode({name: group[name] for name in sent})


class _JsonPoster(_Connected):
    def __init__(self, connection: HttpConnection, path: str) -> None:
        super().__init__(connection)
        self._path = path

    def post(self, body: bytearray) -> None:
        answer = self._connection.call(b"POST", self._path, body, JSON_HEADER).expect()
        if b'"received"' not in answer:
            raise RuntimeError(f"the groups were not queued: {answer[:500]!r}")


class _JsonTaker(_Connected):
    def take(self) -> bytes | None:
        batch = self._connection.call(b"GET", "/batch").expect()
        if batch == b'{"batch":null}':
            time.sleep(BUSY_PAUSE_S)
            return None
        return batch


class MoverExchange(ColumnsExchange):
    """The bare ASGI program (mover.py): the same bytes, no meaning."""

    def open(self, port: int) -> Taker:
        """Nothing to register."""
        return _MoverTaker(HttpConnection(port))

    def poster(self, port: int) -> Poster:
        """A sender of bodies."""
        return _MoverPoster(HttpConnection(port))


class _MoverPoster(_Connected):
    def post(self, body: bytearray) -> None:
        self._connection.call(b"POST", "/", body).expect()


class _MoverTaker(_Connected):
    def take(self) -> bytes | None:
        batch = self._connection.call(b"GET", "/").expect()
        if not batch:
            time.sleep(0.001)
        return batch or None


class LoopbackExchange(ColumnsExchange):
    """The bare socket relay (relay.py): 8 bytes of length, then the bytes, into one process and out of it."""

    def open(self, port: int) -> Taker:
        """Nothing to register."""
        return _Relay(port, b"T")

    def poster(self, port: int) -> Poster:
        """A sender of frames."""
        return _Relay(port, b"P")


class _Relay:
    def __init__(self, port: int, role: bytes) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30.0)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(role)

    def post(self, body: bytearray) -> None:
        self._socket.sendall(struct.pack("<Q", len(body)))
        self._socket.sendall(body)
        receive_exactly(self._socket, 1)

    def take(self) -> bytes | None:
        self._socket.sendall(b"?")
        (length,) = struct.unpack("<Q", receive_exactly(self._socket, 8))
        return bytes(receive_exactly(self._socket, length))

    def close(self) -> None:
        self._socket.close()


def receive_exactly(connection: socket.socket, size: int) -> bytearray:
    """So many bytes, in a new buffer."""
    buffer = bytearray(size)
    with memoryview(buffer) as view:
        filled = 0
        while filled < size:
            received = connection.recv_into(view[filled:])
            if received == 0:
                raise ConnectionError(f"the other side closed after {filled} of {size} bytes")
            filled += received
    return buffer


def post_json(connection: HttpConnection, path: str, message: dict[str, object]) -> Any:
    """POST a message, decode the answer."""
    return msgspec.json.decode(connection.call(b"POST", path, msgspec.json.encode(message), JSON_HEADER).expect())


def register_json(
    connection: HttpConnection, *, batch_size: int, group_size: int, envs: Sequence[str] = ("b",)
) -> None:
    """Trainer, first /batch, environments: the order in which upstream comes alive."""
    post_json(
        connection,
        "/register",
        {
            "wandb_group": "", "wandb_project": "", "batch_size": batch_size, "max_token_len": NEVER,
            "checkpoint_dir": "", "save_checkpoint_interval": -1, "starting_step": 0, "num_steps": NEVER,
        },
    )  # fmt: skip
    connection.call(b"GET", "/batch").expect()
    for name in envs:
        env = {"max_token_length": NEVER, "desired_name": name, "weight": 1.0, "group_size": group_size}
        if post_json(connection, "/register-env", env)["status"] != "success":
            raise RuntimeError(f"environment {name!r} could not register")
