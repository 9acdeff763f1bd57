"""The old import paths of the rollout server: its application under any ASGI runner, and its packing functions."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import atroposlib.api
import atroposlib.envs
from atroposlib.api.application import load_app
from atroposlib.api.utils import (
    find_groups_summing_to_target,
    grab_batch_with_minimum_allocations,
    grab_exact_from_heterogeneous_queue,
)
from atroposlib.errors import ConfigError
from tests.processes import free_port

# The application


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """The application is made anew; undone by the test's end."""
    monkeypatch.setenv("ATROPOS_SERVER_DATA_DIR", str(tmp_path / "data"))
    load_app.cache_clear()
    yield monkeypatch
    load_app.cache_clear()


def test_an_asgi_runner_serves_it(tmp_path: Path) -> None:
    port = free_port()
    path = "atroposlib.api.server:app"
    command = [sys.executable, "-m", "uvicorn", path, "--port", str(port), "--log-level", "warning"]
    environ = {"PATH": "/usr/bin", "ATROPOS_SERVER_DATA_DIR": str(tmp_path / "data")}
    server = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        answer = wait_for(f"http://127.0.0.1:{port}/")
    finally:
        server.terminate()
        _, said = server.communicate(timeout=15)

    assert answer.json() == {"message": "AtroposLib API"}
    assert (tmp_path / "data").is_dir(), f"the variables configure it; it said {said}"


def wait_for(url: str) -> httpx.Response:
    end = time.monotonic() + 15
    while True:
        try:
            return httpx.get(url, timeout=5)
        except httpx.TransportError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@pytest.mark.usefixtures("fresh")
def test_both_paths_are_the_same_application() -> None:
    from atroposlib.api import app
    from atroposlib.api.server import app as other

    assert app is other
    assert app.title == "AtroposLib API"


def test_the_packages_themselves_load_no_server() -> None:
    code = "import sys, atroposlib.api.server, atroposlib.api.utils; print('fastapi' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("module", ["rollout_server.app", "rollout_server.config_sources"])
def test_a_missing_server_names_the_extra(module: str, fresh: pytest.MonkeyPatch) -> None:
    fresh.setitem(sys.modules, module, None)

    with pytest.raises(ConfigError, match=rf"needs the module {module}.*pip install 'atroposlib\[server\]'"):
        _ = atroposlib.api.app


def test_a_variable_that_does_not_exist_is_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("ATROPOS_SERVER_PROT", "1")

    with pytest.raises(ConfigError, match="unknown environment variable ATROPOS_SERVER_PROT"):
        _ = atroposlib.api.app


def test_every_name_of_the_environments_package_is_there() -> None:
    for name in atroposlib.envs.__all__:
        assert getattr(atroposlib.envs, name).__name__ == name
    with pytest.raises(AttributeError, match="'Nothing'"):
        _ = atroposlib.envs.Nothing


# Packing


def groups(*sizes: int, env_id: Any = 0) -> list[dict[str, Any]]:
    return [{"tokens": [[1]] * size, "env_id": env_id} for size in sizes]


def sizes_of(batch: list[dict[str, Any]] | None) -> list[int] | None:
    return None if batch is None else [len(group["tokens"]) for group in batch]


SIZES = st.lists(st.integers(1, 6), max_size=7)


@given(sizes=SIZES, batch_size=st.integers(1, 12))
def test_a_batch_is_found_whenever_groups_add_up(sizes: list[int], batch_size: int) -> None:
    queue = groups(*sizes)
    adds_up = any(sum(some) == batch_size for n in range(1, len(sizes) + 1) for some in combinations(sizes, n))

    batch, rest = grab_exact_from_heterogeneous_queue(queue, batch_size)

    assert (batch is not None) == adds_up
    if batch is None:
        assert rest is queue
        return
    assert sum(sizes_of(batch) or []) == batch_size
    ids = [id(group) for group in queue]
    assert sorted(map(id, [*batch, *rest]), key=ids.index) == ids, "nothing is lost and nothing is doubled"
    for part in (batch, rest):
        places = [ids.index(id(group)) for group in part]
        assert places == sorted(places), "order is kept"


@given(n=st.integers(1, 6), size=st.sampled_from([1, 2, 4]), batch_size=st.sampled_from([4, 8]))
def test_groups_of_one_size_leave_in_the_order_they_came(n: int, size: int, batch_size: int) -> None:
    queue = groups(*[size] * n)

    batch, rest = grab_exact_from_heterogeneous_queue(queue, batch_size)

    if n * size >= batch_size:
        assert batch is not None
        assert [id(group) for group in [*batch, *rest]] == [id(group) for group in queue]
    else:
        assert batch is None


def test_one_odd_group_blocks_nothing() -> None:
    batch, rest = grab_exact_from_heterogeneous_queue(groups(3, 2, 2, 2), 4)

    assert (sizes_of(batch), sizes_of(rest)) == ([2, 2], [3, 2])


@pytest.mark.parametrize(
    ("sizes", "target", "indices"),
    [
        ([1, 2, 1, 4], 4, [0, 1, 2]),
        ([3, 2, 2], 4, [1, 2]),
        ([4], 4, [0]),
        ([8, 1], 4, []),
        ([], 4, []),
        ([0, 4], 4, [1]),
    ],
)
def test_buffered_groups_are_joined_to_the_expected_size(sizes: list[int], target: int, indices: list[int]) -> None:
    assert find_groups_summing_to_target(groups(*sizes), target) == indices


# Minimums


def an_env(registered_id: int, minimum: float | None, *, connected: bool = True) -> dict[str, Any]:
    return {"registered_id": registered_id, "min_batch_allocation": minimum, "connected": connected}


def by_env(batch: list[dict[str, Any]] | None) -> Counter[Any]:
    """Sequences of each environment."""
    assert batch is not None
    counts: Counter[Any] = Counter()
    for group in batch:
        counts[group["env_id"]] += len(group["tokens"])
    return counts


def test_an_environment_has_its_minimum_and_the_rest_is_first_come() -> None:
    queue = [*groups(2, 2, 2, 2, env_id=0), *groups(2, 2, env_id=1)]

    batch, rest = grab_batch_with_minimum_allocations(queue, 8, [an_env(0, None), an_env(1, 0.25)])

    assert by_env(batch) == {0: 6, 1: 2}
    assert rest == [queue[3], queue[5]]


def test_minimums_beyond_the_batch_are_scaled_down() -> None:
    queue = [*groups(*[2] * 8, env_id=0), *groups(*[2] * 8, env_id=1)]

    batch, _ = grab_batch_with_minimum_allocations(queue, 8, [an_env(0, 1.0), an_env(1, 1.0)])

    assert by_env(batch) == {0: 4, 1: 4}


def test_a_scaled_minimum_is_at_least_one_group() -> None:
    queue = [*groups(*[1] * 8, env_id=0), *groups(2, 2, env_id=1)]

    batch, _ = grab_batch_with_minimum_allocations(queue, 4, [an_env(0, 1.0), an_env(1, 0.25)])

    assert by_env(batch) == {0: 2, 1: 2}


def test_a_connected_environment_without_groups_is_waited_for_and_a_gone_one_is_not() -> None:
    queue = groups(2, 2, env_id=0)

    assert grab_batch_with_minimum_allocations(queue, 4, [an_env(0, 0.5), an_env(1, 0.5)]) == (None, queue)
    batch, _ = grab_batch_with_minimum_allocations(queue, 4, [an_env(0, 0.5), an_env(1, 0.5, connected=False)])
    assert by_env(batch) == {0: 4}


def test_a_minimum_below_one_sequence_waits_for_nobody() -> None:
    batch, _ = grab_batch_with_minimum_allocations(groups(2, 2), 4, [an_env(0, None), an_env(1, 0.1)])

    assert by_env(batch) == {0: 4}


def test_groups_of_no_environment_fill_the_batch() -> None:
    queue = [*groups(2, env_id=None), *groups(2, env_id=1)]

    batch, _ = grab_batch_with_minimum_allocations(queue, 4, [an_env(0, None), an_env(1, 0.5)])

    assert by_env(batch) == {None: 2, 1: 2}


def test_without_minimums_it_is_plain_packing() -> None:
    batch, rest = grab_batch_with_minimum_allocations(groups(2, 2, 2), 4, [an_env(0, None)])

    assert (sizes_of(batch), sizes_of(rest)) == ([2, 2], [2])


@given(
    first=SIZES, second=SIZES, batch_size=st.integers(1, 12), minimums=st.tuples(st.floats(0, 1.5), st.floats(0, 1.5))
)
def test_a_batch_with_minimums_is_exact_or_none(
    first: list[int], second: list[int], batch_size: int, minimums: tuple[float, float]
) -> None:
    queue = [*groups(*first, env_id=0), *groups(*second, env_id=1)]

    batch, rest = grab_batch_with_minimum_allocations(
        queue, batch_size, [an_env(0, minimums[0]), an_env(1, minimums[1])]
    )

    if batch is None:
        assert rest is queue
    else:
        assert sum(sizes_of(batch) or []) == batch_size
        assert len(batch) + len(rest) == len(queue)
