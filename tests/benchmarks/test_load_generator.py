"""The benchmark's own books: what it reports went through the server once and unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.rollout_server.contenders import contender
from benchmarks.rollout_server.exchanges import ColumnsExchange, Exchange, JsonExchange
from benchmarks.rollout_server.ledger import AccountingError, Ledger
from benchmarks.rollout_server.load import LoadOptions, LoadResult, run_load
from benchmarks.rollout_server.payloads import Payload
from benchmarks.rollout_server.shapes import Shape
from benchmarks.rollout_server.throughput import report, summarize

TINY = Shape.parse("2x16")


def blobs(payload: Payload, numbers: Sequence[int]) -> bytes:
    return b"".join(payload.original(number) for number in numbers)


def a_ledger(exchange: Exchange, *, requests: int) -> Ledger:
    ledger = Ledger(exchange, compare_every=1)
    for _ in range(requests):
        ledger.reserve()
    return ledger


@pytest.mark.parametrize("name", ["ours-normal", "ours-json"])
def test_every_group_that_went_into_the_server_comes_out_once_and_unchanged(name: str) -> None:
    chosen = contender(name)
    options = LoadOptions(seconds=0.5, posters=2, compare_every=1)

    with chosen.serve() as server:
        result = run_load(chosen.exchange(TINY), [server.port], options, server_cpu_s=server.cpu_s)

    assert result.groups > 0
    assert result.total_in == result.total_out == result.total_compared
    assert result.server_cpu_s > 0


def test_a_tampered_byte_is_noticed() -> None:
    exchange = ColumnsExchange(TINY)
    ledger = a_ledger(exchange, requests=1)
    batch = bytearray(blobs(exchange.payload, range(len(exchange.payload.groups))))
    batch[-1] ^= 1

    with pytest.raises(AccountingError, match=f"group {len(exchange.payload.groups) - 1} came back altered"):
        ledger.settle(bytes(batch))


def test_a_group_that_comes_back_twice_is_noticed() -> None:
    exchange = ColumnsExchange(TINY)
    ledger = a_ledger(exchange, requests=2)
    batch = blobs(exchange.payload, range(len(exchange.payload.groups)))
    ledger.settle(batch)

    with pytest.raises(AccountingError, match="group 0 came back, but is not inside"):
        ledger.settle(batch)


def test_a_batch_of_too_few_groups_is_noticed() -> None:
    exchange = ColumnsExchange(TINY)
    ledger = a_ledger(exchange, requests=1)

    with pytest.raises(AccountingError, match="a batch holds 1 groups"):
        ledger.settle(blobs(exchange.payload, [0]))


def test_json_groups_are_compared_by_their_fields() -> None:
    exchange = JsonExchange(TINY)
    ledger = a_ledger(exchange, requests=1)
    body = exchange.payload.body()
    exchange.payload.stamp(body, 0)
    batch = b'{"batch":' + bytes(body) + b"}"

    groups = ledger.settle(batch)

    assert ledger.groups_compared == groups == len(exchange.payload.groups)


def test_a_stamped_body_holds_the_groups_it_says() -> None:
    payload = ColumnsExchange(TINY).payload
    body = payload.body()

    numbers = payload.stamp(body, 7 * len(payload.groups))

    assert bytes(body) == blobs(payload, numbers)


@pytest.mark.parametrize(("text", "groups"), [("8x512", 64), ("8x2048", 16), ("16x8192", 2), ("64x32768", 1)])
def test_a_request_holds_about_the_same_bytes_at_every_shape(text: str, groups: int) -> None:
    assert Shape.parse(text).groups_per_batch == groups


@pytest.mark.parametrize("text", ["8", "8x", "x512", "0x512", "8x-1", "8x512x2"])
def test_a_malformed_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="for example 8x512"):
        Shape.parse(text)


def test_the_table_states_ratios_to_upstream_and_to_the_limits() -> None:
    slow, fast = a_result(groups=10), a_result(groups=40)

    figures = [
        summarize("ours-normal", TINY, [fast]),
        summarize("upstream", TINY, [slow]),
        summarize("mover", TINY, [fast]),
    ]

    assert report(figures).splitlines()[2].endswith("| 4 | 1 |")


def a_result(*, groups: int) -> LoadResult:
    return LoadResult(1.0, groups, 0.5, 0.1, groups, groups, groups)
