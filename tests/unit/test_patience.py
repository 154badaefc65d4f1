"""How long somebody who is not reached is asked again."""

from __future__ import annotations

import asyncio

import pytest

from opd_mesh.clients.patience import Patience


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now[0])
    return now


async def test_failures_on_end_are_counted_from_the_first(clock: list[float]) -> None:
    patience = Patience(10.0)
    clock[0] = 500.0  # a call that lasts is no failure
    assert not patience.is_over()
    clock[0] = 510.0
    assert not patience.is_over()
    clock[0] = 510.5
    assert patience.is_over()


async def test_it_begins_anew_where_somebody_was_there(clock: list[float]) -> None:
    patience = Patience(10.0)
    patience.is_over()
    clock[0] = 109.0
    patience.reached()
    assert not patience.is_over()
    clock[0] = 118.0
    assert not patience.is_over()


async def test_the_time_of_a_call_may_count(clock: list[float]) -> None:
    patience = Patience(10.0)
    assert not patience.is_over(failing_since=95.0)
    clock[0] = 106.0
    assert patience.is_over(failing_since=105.9)  # it failed before
