"""metrics.jsonl after an interruption, and what watchers see."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from student_trainer.run_state import MetricsLog, Phase, RunState


def refuse_constant(word: str) -> float:
    raise AssertionError(f"{word} is not JSON")


def steps_in(path: Path) -> list[float]:
    return [json.loads(line, parse_constant=refuse_constant)["step"] for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of five steps."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / step})
    return log.path


def test_every_line_is_on_disk_when_write_returns(path: Path) -> None:
    assert steps_in(path) == [1, 2, 3, 4, 5]
    assert json.loads(path.read_text().splitlines()[2])["loss"] == 1 / 3  # no digit lost


def test_a_resumed_log_forgets_the_steps_done_again(path: Path) -> None:
    log = MetricsLog(path)
    log.resume(3)
    assert [line["step"] for line in log.lines] == [1, 2, 3]
    assert steps_in(path) == [1, 2, 3]
    log.write({"step": 4, "loss": 9.0})
    assert steps_in(path) == [1, 2, 3, 4]
    assert [path.name for path in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_line_at_the_end_is_dropped(path: Path, cut: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    log = MetricsLog(path)
    log.resume(5)
    kept = 5 if cut == 1 else 4  # without its newline alone the line is still whole
    assert steps_in(path) == list(range(1, kept + 1))
    log.write({"step": 6})
    assert steps_in(path) == [*range(1, kept + 1), 6]


def test_nothing_to_resume(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.resume(0)
    assert log.lines == []
    assert not log.path.exists()


def test_values_that_json_has_not_are_left_out(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "loss": 0.5})
    assert steps_in(log.path) == [1]
    assert json.loads(log.path.read_text()) == {"step": 1, "loss": 0.5}
    assert log.lines == [{"step": 1, "loss": 0.5}]


@pytest.fixture
def state(tmp_path: Path) -> RunState:
    return RunState("r", 3, MetricsLog(tmp_path / "metrics.jsonl"))


async def test_a_watcher_sees_every_state_it_has_time_for_and_the_last(state: RunState) -> None:
    seen: list[tuple[Phase, str]] = []

    async def watch() -> None:
        async for _ in state.watch():
            seen.append((state.phase, state.activity))

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    assert seen == [(Phase.STARTING, "starting")]  # at once
    for phase, activity in ((Phase.RUNNING, "rollout"), (None, "update"), (Phase.FAILED, "ended early")):
        state.set(phase, activity)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.wait_for(watcher, 5)
    assert seen[1:] == [(Phase.RUNNING, "rollout"), (Phase.RUNNING, "update"), (Phase.FAILED, "ended early")]


async def test_a_change_between_two_looks_is_not_lost(state: RunState) -> None:
    watching = state.watch()
    await anext(watching)
    state.set(Phase.RUNNING)  # while the watcher is busy with what it saw
    state.set(Phase.FINISHED)
    await asyncio.wait_for(anext(watching), 5)
    assert state.ended
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(anext(watching), 5)


async def test_all_watchers_wake(state: RunState) -> None:
    async def count() -> int:
        return len([None async for _ in state.watch()])

    watchers = [asyncio.create_task(count()) for _ in range(3)]
    await asyncio.sleep(0)
    state.set(Phase.FINISHED)
    assert await asyncio.wait_for(asyncio.gather(*watchers), 5) == [2, 2, 2]


async def test_a_run_that_has_ended_is_told_once(state: RunState) -> None:
    state.set(Phase.FINISHED)
    assert len([None async for _ in state.watch()]) == 1


def test_pause_and_resume(state: RunState) -> None:
    state.pause()  # before the first step: it will stop there, but it is still starting
    assert (state.phase, state.not_paused.is_set()) == (Phase.STARTING, False)
    state.resume()
    state.set(Phase.RUNNING)
    for _ in range(2):  # idempotent
        state.pause()
        assert (state.phase, state.not_paused.is_set()) == (Phase.PAUSED, False)
    for _ in range(2):
        state.resume()
        assert (state.phase, state.not_paused.is_set()) == (Phase.RUNNING, True)
    state.set(Phase.FAILED, error="teacher gone")
    state.pause()
    state.resume()
    assert (state.phase, state.error, state.ended) == (Phase.FAILED, "teacher gone", True)
