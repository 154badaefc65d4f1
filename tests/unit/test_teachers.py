"""How long the trainer waits for a teacher: its own queue is no silence, and a lost connection is asked again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mesh import tiny_recipe
from opd.v1 import common_pb2, teacher_service_pb2

from opd_mesh.clients.teacher import ScoreRequest, ScoreResult
from opd_mesh.errors import OpdError, TeacherUnavailableError, UnavailableError
from opd_mesh.signals import SignalKind
from opd_mesh.trajectory import Trajectory
from student_trainer.teachers import Teachers

TRAJECTORY = Trajectory("t", "domain_0", token_ids=tuple(range(10)), scored_spans=((4, 10),))


class Client:
    """Answers as ``behaviour`` says, by the number of the call; its address changes with every call, as records do."""

    def __init__(self, behaviour: Callable[[int], float | OpdError]) -> None:
        self.behaviour = behaviour
        self.calls = 0

    @property
    def target(self) -> str:
        return f"replica-{self.calls}:1"

    def troubles(self) -> str:
        return ""

    async def score(self, request: ScoreRequest) -> ScoreResult:
        self.calls += 1
        outcome = self.behaviour(self.calls)
        if isinstance(outcome, OpdError):
            await asyncio.sleep(0.15)
            raise outcome
        await asyncio.sleep(outcome)
        return ScoreResult("one", "", "", {"hidden_states": np.zeros((6, 4), np.float32)}, 0)


def teachers_with(client: Client, *, timeout_s: float, per_token_s: float) -> Teachers:
    recipe = tiny_recipe(
        Path("student"),
        {"one": Path("one")},
        teacher_timeout_s=timeout_s,
        teacher_channel={"channel": {"item_timeout_per_token_s": per_token_s}},
    )
    teachers = Teachers(recipe, "f" * 64)
    teachers._clients["one"] = client  # type: ignore[assignment]
    teachers.cards["one"] = teacher_service_pb2.TeacherCard(dtype=common_pb2.D_TYPE_FLOAT32, hidden_size=4)
    return teachers


async def ask(teachers: Teachers) -> Any:
    return await teachers.tensors(TRAJECTORY, "one", SignalKind.HIDDEN_STATES)


@pytest.mark.asyncio
async def test_a_queue_of_our_own_making_is_no_silence() -> None:
    """Thirty items that a slow teacher answers at last, after the time that it may be silent."""
    teachers = teachers_with(Client(lambda call: 0.4), timeout_s=0.1, per_token_s=0.01)
    answers = await asyncio.gather(*(ask(teachers) for _ in range(30)), return_exceptions=True)
    # The first ones were asked when little else was; the later ones had the patience of all before them.
    assert isinstance(answers[0], TeacherUnavailableError)
    assert all(not isinstance(answer, BaseException) for answer in answers[10:])
    # Whatever the addresses were meanwhile, nothing is left on the account.
    assert not any(teachers._asked_tokens.values())


@pytest.mark.asyncio
async def test_a_connection_lost_after_a_long_wait_is_tried_again() -> None:
    def behaviour(call: int) -> float | OpdError:
        return UnavailableError("the stream broke", retry_delay_s=0.01) if call == 1 else 0.0

    client = Client(behaviour)
    teachers = teachers_with(client, timeout_s=0.1, per_token_s=1.0)
    await ask(teachers)
    assert client.calls == 2


@pytest.mark.asyncio
async def test_out_of_reach_is_not_waited_for_by_the_token() -> None:
    client = Client(lambda call: UnavailableError("connection refused", retry_delay_s=0.01))
    teachers = teachers_with(client, timeout_s=0.3, per_token_s=100.0)
    with pytest.raises(TeacherUnavailableError, match=r"'one' at \S+ gave no answer for 0.3 s \(last: connection"):
        await asyncio.wait_for(ask(teachers), 30)
    assert client.calls >= 2
