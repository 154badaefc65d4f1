"""A circuit breaker: whether a peer that failed may be asked again. Pure: no I/O, the clock is an argument.

    closed --failures in a row, or one trip--> open --cool-down--> half-open --success--> closed
                                                ^                      |
                                                +--failure, twice the cool-down

Half-open admits one trial at a time; everybody else goes elsewhere until it is decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class CircuitState(StrEnum):
    """See the module."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass
class Circuit:
    """One peer's breaker. Times are seconds of whatever clock the caller uses throughout.

    Args:
        failures_to_open: in a row, while closed.
        cool_down_s: from opening to the first trial.
        max_cool_down_s: what doubling stops at.
    """

    failures_to_open: int = 3
    cool_down_s: float = 1.0
    max_cool_down_s: float = 30.0

    def __post_init__(self) -> None:
        self._failures = 0
        self._opened_at: float | None = None
        self._wait_s = self.cool_down_s
        self._trial = False
        self.times_opened = 0

    def state(self, now: float) -> CircuitState:
        """At the time ``now``."""
        if self._opened_at is None:
            return CircuitState.CLOSED
        return CircuitState.OPEN if now < self._opened_at + self._wait_s else CircuitState.HALF_OPEN

    def admits(self, now: float) -> bool:
        """Whether a call may begin."""
        state = self.state(now)
        return state is CircuitState.CLOSED or (state is CircuitState.HALF_OPEN and not self._trial)

    def wait_s(self, now: float) -> float:
        """Seconds until a trial is admitted; 0 where a call may begin now or a trial is out."""
        return 0.0 if self._opened_at is None else max(0.0, self._opened_at + self._wait_s - now)

    def begin(self, now: float) -> bool:
        """A call begins; True where it is the trial, which :meth:`succeed`, a failure or :meth:`withdraw` must end."""
        if self.state(now) is CircuitState.HALF_OPEN and not self._trial:
            self._trial = True
            return True
        return False

    def withdraw(self) -> None:
        """The trial ended without a verdict (its caller gave up): another may be made."""
        self._trial = False

    def succeed(self) -> None:
        """An answer came. Late answers from before the circuit opened prove nothing: they leave it as it is."""
        if self._opened_at is not None and not self._trial:
            return
        self._failures = 0
        self._opened_at = None
        self._wait_s = self.cool_down_s
        self._trial = False

    def fail(self, now: float) -> None:
        """The peer failed a call; enough of these in a row open the circuit."""
        self._failures += 1
        if self._trial or self._failures >= self.failures_to_open:
            self.trip(now)

    def trip(self, now: float) -> None:
        """Open at once. While it is open, further failures (of calls from before) change nothing."""
        if self._opened_at is not None and not self._trial:
            if self.state(now) is CircuitState.HALF_OPEN:  # found dead by other means than a trial
                self._opened_at = now
            return
        if self._trial:
            self._wait_s = min(2 * self._wait_s, self.max_cool_down_s)
        self._opened_at = now
        self._failures = 0
        self._trial = False
        self.times_opened += 1
