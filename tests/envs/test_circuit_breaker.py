"""When a server is left alone, and how it comes back; how often requests are tried again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from atroposlib.envs.server_handling.pool.circuit_breaker import (
    FAILURES_TO_OPEN,
    LONGEST_PAUSE_S,
    PROBATION_S,
    Circuit,
    CircuitBreaker,
    trial_slots,
)
from atroposlib.envs.server_handling.pool.retry_budget import RETRIES_PER_REQUEST, RETRIES_PER_S, RetryBudget


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def an_open_breaker(clock: Clock) -> CircuitBreaker:
    breaker = CircuitBreaker(clock)
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed(0, "boom")
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    breaker = CircuitBreaker(Clock())
    for _ in range(5):
        breaker.failed(0)
        breaker.failed(0)
        breaker.succeeded(0)
    assert breaker.circuit is Circuit.CLOSED

    breaker = an_open_breaker(Clock())
    assert breaker.circuit is Circuit.OPEN
    assert breaker.last_error == "boom"


def test_only_a_health_check_half_opens_it() -> None:
    clock = Clock()
    breaker = an_open_breaker(clock)
    clock.now += 1000
    breaker.succeeded(breaker.epoch)
    breaker.settle()
    assert breaker.circuit is Circuit.OPEN

    breaker.check_succeeded()
    assert breaker.circuit.value == "half_open"


def test_half_open_one_success_closes_and_one_failure_opens_again() -> None:
    closing, reopening = an_open_breaker(Clock()), an_open_breaker(Clock())
    closing.check_succeeded()
    reopening.check_succeeded()

    closing.succeeded(closing.epoch)
    reopening.failed(reopening.epoch)

    assert (closing.circuit, reopening.circuit) == (Circuit.CLOSED, Circuit.OPEN)


def test_outcomes_from_before_the_opening_say_nothing_about_the_server_of_today() -> None:
    breaker = an_open_breaker(Clock())
    breaker.check_succeeded()

    breaker.failed(epoch=0)
    breaker.succeeded(epoch=0)

    assert breaker.circuit is Circuit.HALF_OPEN


def test_probation_ends_without_an_answer_because_answers_may_take_minutes() -> None:
    clock = Clock()
    breaker = an_open_breaker(clock)
    breaker.check_succeeded()
    clock.now += PROBATION_S / 2
    breaker.settle()
    assert breaker.circuit.value == "half_open"

    clock.now += PROBATION_S / 2
    breaker.settle()
    assert breaker.circuit is Circuit.CLOSED


def test_pauses_double_up_to_a_limit_and_start_anew_after_a_recovery() -> None:
    clock = Clock()
    breaker = an_open_breaker(clock)
    pauses = []
    for _ in range(9):
        pauses.append(breaker.check_in_s())
        clock.now += breaker.check_in_s()
        breaker.check_failed("still down")
    assert pauses == [0.25, 0.5, 1, 2, 4, 8, 8, 8, 8]

    breaker.check_succeeded()
    breaker.succeeded(breaker.epoch)
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed(breaker.epoch)
    assert breaker.check_in_s() == 0.25


def test_a_server_that_joins_is_checked_at_once() -> None:
    breaker = CircuitBreaker(Clock())
    breaker.await_check()

    assert (breaker.circuit, breaker.check_in_s()) == (Circuit.OPEN, 0)


@given(slots=st.integers(1, 1000))
def test_a_trial_is_a_small_share_but_never_nothing(slots: int) -> None:
    assert 1 <= trial_slots(slots) <= max(1, slots // 8)


class BreakerMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order, the breaker is never stuck and never forgets that it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = CircuitBreaker(self.clock)
        self.was_open = False

    @rule(age=st.integers(0, 2))
    def fail(self, age: int) -> None:
        self.breaker.failed(max(0, self.breaker.epoch - age), "x")

    @rule(age=st.integers(0, 2))
    def succeed(self, age: int) -> None:
        was = self.breaker.circuit
        self.breaker.succeeded(max(0, self.breaker.epoch - age))
        assert (was is Circuit.OPEN) == (self.breaker.circuit is Circuit.OPEN)

    @rule(is_well=st.booleans())
    def check(self, is_well: bool) -> None:
        was = self.breaker.circuit
        if is_well:
            self.breaker.check_succeeded()
            assert self.breaker.circuit is not Circuit.OPEN
        else:
            self.breaker.check_failed("x")
            assert self.breaker.circuit is was

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        was = self.breaker.circuit
        self.clock.now += seconds
        self.breaker.settle()
        assert was is not Circuit.OPEN or self.breaker.circuit is Circuit.OPEN

    @invariant()
    def the_next_check_is_never_far(self) -> None:
        assert 0 <= self.breaker.check_in_s() <= LONGEST_PAUSE_S + 1e-6


TestBreaker = BreakerMachine.TestCase


def test_saved_retries_go_at_once_and_then_at_the_floor_rate() -> None:
    clock = Clock()
    budget = RetryBudget(burst=3, clock=clock)

    assert [budget.reserve() for _ in range(5)] == [0, 0, 0, 1 / RETRIES_PER_S, 2 / RETRIES_PER_S]
    clock.now += 10
    assert [budget.reserve() for _ in range(3)] == [0, 0, 0]


def test_requests_pay_for_a_share_of_retries() -> None:
    clock = Clock()
    budget = RetryBudget(burst=2, clock=clock)
    budget.reserve()
    budget.reserve()
    for _ in range(round(1 / RETRIES_PER_REQUEST)):
        budget.request_made()

    assert budget.reserve() < 1e-9
    assert budget.reserve() > 0


def test_a_retry_that_is_not_made_is_given_back() -> None:
    budget = RetryBudget(burst=1, clock=Clock())
    budget.reserve()
    budget.reserve()
    budget.give_back()
    budget.give_back()

    assert budget.reserve() == 0


@given(requests=st.integers(0, 200), retries=st.integers(0, 200), seconds=st.floats(0, 30))
def test_retries_without_a_wait_are_bounded(requests: int, retries: int, seconds: float) -> None:
    clock = Clock()
    budget = RetryBudget(burst=5, clock=clock)
    free = sum(budget.reserve() == 0 for _ in range(retries))
    clock.now += seconds
    for _ in range(requests):
        budget.request_made()
    free += sum(budget.reserve() == 0 for _ in range(retries))

    assert free <= 5 + RETRIES_PER_REQUEST * requests + RETRIES_PER_S * seconds + 1
