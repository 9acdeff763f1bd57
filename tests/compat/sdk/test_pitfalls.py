"""What users of Atropos 0.4.0 struggled with, and the test that keeps each of the 46 pitfalls closed.

The tests are called `test_pitfall_<number>_...`: those of the rollout server in test_pitfalls_rollout_server.py, of
inference servers and sessions in test_pitfalls_servers.py, of environments and trainer in test_pitfalls_environment.py.
`pytest -k pitfall_07` runs those of one row.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from types import ModuleType

import pytest

from tests.compat.sdk import test_pitfalls_environment as environment
from tests.compat.sdk import test_pitfalls_rollout_server as rollout_server
from tests.compat.sdk import test_pitfalls_servers as servers

PITFALLS: dict[int, tuple[str, tuple[ModuleType, ...]]] = {
    1: ("a bare server config loses its address and key", (servers,)),
    2: ("options of the servers are ignored without a word", (environment,)),
    3: ("negative numbers and lists on the command line change their meaning", (environment,)),
    4: ("tokenize_for_trainer returns no ids on newer transformers", (environment,)),
    5: ("an environment without wandb_name cannot register", (environment,)),
    6: ("a restart of the server or the trainer ends every environment", (environment,)),
    7: ("data that comes before the trainer blocks registration for ever", (rollout_server,)),
    8: ("a second registration changes nothing", (rollout_server,)),
    9: ("a restart of the server loses the queue", (rollout_server,)),
    10: ("a batch whose receiver died is gone", (rollout_server,)),
    11: ("one NaN loses a whole batch", (rollout_server,)),
    12: ("one odd-sized group blocks packing for ever", (rollout_server,)),
    13: ("groups of nobody starve, a silent environment stalls all", (rollout_server,)),
    14: ("groups of another size wait unseen and without a bound", (rollout_server,)),
    15: (
        "the newest batch comes first; steps, evaluations and checkpoints are jumped over",
        (rollout_server, environment),
    ),
    16: ("no weight, or nobody connected, divides by zero", (rollout_server,)),
    17: ("the status needs a GET with a body", (rollout_server,)),
    18: ("anybody may reset; looking wipes the run", (rollout_server,)),
    19: ("each poll scans the queue", (rollout_server,)),
    20: ("a batch with minimums costs the square of the queue", (rollout_server,)),
    21: ("groups travel as text, at great cost", (rollout_server,)),
    22: ("a failed send drops data, and counts it", (environment,)),
    23: ("rollouts in flight are cancelled", (environment,)),
    24: ("exceptions of workers and evaluations are swallowed, items lost", (environment,)),
    25: ("evaluation requests all hit one server, on the slots of training", (servers,)),
    26: ("waiting means sleeping", (servers,)),
    27: ("asking for health spends completions", (servers,)),
    28: ("nested retries hide the cause", (servers,)),
    29: ("dedicated servers deadlock under small weights", (servers,)),
    30: ("the end of a turn is doubled; text completions train the last turn only", (servers,)),
    31: ("the first matching sequence is extended; equal ones are mixed up", (servers,)),
    32: ("think blocks are not as documented; a cut reply says stop", (servers,)),
    33: ("a proxied session has no tool calls, no nodes, no options, and stays", (servers,)),
    34: ("testing, INFER_TP and TRL logprobs do not work", (servers,)),
    35: ("the default merge drops logprobs; one None drops the group", (environment,)),
    36: ("group_overrides of null ends the sender", (environment,)),
    37: ("the groups file is opened by every construction and never flushed", (environment,)),
    38: ("metrics are of the last server, are no percentile, and grow for ever", (environment,)),
    39: ("the registry picks the wrong reward; combinations ignore weights", (environment,)),
    40: ("checkpoints of environments are not found after a restart", (environment,)),
    41: ("environments never say goodbye", (environment,)),
    42: ("environments with a teacher cannot start, and the teacher's columns go nowhere", (environment,)),
    43: ("the trainer needs logprobs, ignores advantages, trains on padding", (environment,)),
    44: ("supervised data fails in four ways", (environment,)),
    45: ("reading tool calls needs vLLM", (servers,)),
    46: ("a grader that blocks stops all rollouts", (environment,)),
}
"""By number: what went wrong, and where its tests are."""

TESTS: dict[tuple[int, ModuleType], list[str]] = defaultdict(list)
for module in (environment, rollout_server, servers):
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("test_pitfall_") and function.__module__ == module.__name__:
            TESTS[int(name.split("_")[2]), module].append(name)


def test_there_are_46_rows() -> None:
    assert list(PITFALLS) == list(range(1, 47))


@pytest.mark.parametrize("number", PITFALLS, ids=lambda number: f"pitfall_{number:02}")
def test_a_row_has_a_test_where_it_says(number: int) -> None:
    statement, modules = PITFALLS[number]

    assert [module.__name__ for module in modules if not TESTS[number, module]] == [], statement


def test_every_test_of_a_pitfall_stands_in_the_table() -> None:
    stray = [names for (number, module), names in TESTS.items() if names and module not in PITFALLS[number][1]]

    assert stray == []
