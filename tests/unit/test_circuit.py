"""The circuit breaker, on a clock that the tests turn."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from opd_mesh.clients.circuit import Circuit, CircuitState


def opened(at: float = 0.0, **fields: float) -> Circuit:
    circuit = Circuit(**{"failures_to_open": 3, "cool_down_s": 1.0, "max_cool_down_s": 5.0, **fields})  # type: ignore[arg-type]
    circuit.trip(at)
    return circuit


def test_failures_in_a_row_open_it_and_a_success_between_does_not() -> None:
    circuit = Circuit(failures_to_open=3)
    for _ in range(2):
        circuit.fail(0.0)
    circuit.succeed()
    for _ in range(2):
        circuit.fail(0.0)
    assert circuit.state(0.0) is CircuitState.CLOSED
    circuit.fail(0.0)
    assert circuit.state(0.0) is CircuitState.OPEN
    assert not circuit.admits(0.999)
    assert circuit.wait_s(0.25) == 0.75


def test_half_open_admits_one_trial_and_closes_on_its_success() -> None:
    circuit = opened()
    assert circuit.state(1.0) is CircuitState.HALF_OPEN
    assert circuit.begin(1.0)
    assert not circuit.admits(1.0)
    assert not circuit.begin(1.0)
    circuit.succeed()
    assert circuit.state(1.0) is CircuitState.CLOSED
    assert circuit.admits(1.0)
    assert not circuit.begin(1.0)  # nothing to try


@pytest.mark.parametrize("how", ["fail", "trip"])
def test_a_failed_trial_doubles_the_wait_up_to_a_bound(how: str) -> None:
    circuit, now, waits = opened(), 0.0, []
    for _ in range(5):
        waits.append(circuit.wait_s(now))
        now += waits[-1]
        assert circuit.begin(now)
        getattr(circuit, how)(now)
    assert waits == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert circuit.begin(now + 5.0)
    circuit.succeed()
    circuit.trip(now)
    assert circuit.wait_s(now) == 1.0  # it was well again: from the beginning


def test_a_trial_without_a_verdict_leaves_room_for_another() -> None:
    circuit = opened()
    assert circuit.begin(1.0)
    circuit.withdraw()
    assert circuit.admits(1.0)
    assert circuit.state(1.0) is CircuitState.HALF_OPEN


def test_what_was_in_flight_before_it_opened_proves_nothing() -> None:
    circuit = opened()
    for _ in range(9):
        circuit.fail(0.5)
        circuit.trip(0.5)
    circuit.succeed()
    assert circuit.state(0.5) is CircuitState.OPEN
    assert circuit.wait_s(0.5) == 0.5
    assert circuit.times_opened == 1


def test_found_dead_again_before_a_trial_it_waits_again() -> None:
    circuit = opened()
    circuit.trip(1.5)
    assert circuit.wait_s(1.5) == 1.0


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 5))
def test_closed_means_fewer_failures_in_a_row_than_the_threshold(answers: list[bool], threshold: int) -> None:
    circuit, in_a_row = Circuit(failures_to_open=threshold), 0
    for good in answers:
        if good:
            circuit.succeed()
        else:
            circuit.fail(0.0)
        in_a_row = 0 if good else in_a_row + 1
        if in_a_row == threshold:
            assert circuit.state(0.0) is CircuitState.OPEN
            return
        assert circuit.state(0.0) is CircuitState.CLOSED


class CircuitMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order: never two trials, never an endless wait."""

    def __init__(self) -> None:
        super().__init__()
        self.circuit = Circuit(failures_to_open=2, cool_down_s=1.0, max_cool_down_s=8.0)
        self.now = 0.0
        self.trials = 0

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def fail(self) -> None:
        self.circuit.fail(self.now)
        self.trials = 0

    @rule()
    def trip(self) -> None:
        self.circuit.trip(self.now)
        self.trials = 0

    @rule()
    def succeed(self) -> None:
        self.circuit.succeed()
        self.trials = 0

    @precondition(lambda self: self.circuit.admits(self.now))
    @rule()
    def begin(self) -> None:
        self.trials += self.circuit.begin(self.now)
        assert self.trials <= 1

    @invariant()
    def waits_are_bounded(self) -> None:
        assert 0.0 <= self.circuit.wait_s(self.now) <= 8.0
        if self.circuit.state(self.now) is CircuitState.OPEN:
            assert not self.circuit.admits(self.now)
        if self.circuit.state(self.now) is CircuitState.CLOSED:
            assert self.circuit.admits(self.now)


TestCircuitMachine = CircuitMachine.TestCase
