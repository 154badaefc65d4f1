"""Teachers' answers between arrival and use: bounded, never lost, never a deadlock."""

from __future__ import annotations

import asyncio
import random
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mesh.errors import CancelledByCallerError, InternalError, TeacherUnavailableError
from student_trainer.mark_buffer import BufferedAnswer, MarkBuffer


class Teacher:
    """Answers ``[number] * size`` bytes, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def ask(self, buffer: MarkBuffer, number: int, size: int) -> BufferedAnswer:
        async def fetch() -> dict[str, np.ndarray]:
            self.asked.append(number)
            await asyncio.sleep(0)
            return {"hidden_states": np.full(size, number % 256, np.uint8)}

        return buffer.ask(size, fetch)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_asking_waits_for_room_and_goes_on_when_something_is_used_up() -> None:
    buffer, teacher = MarkBuffer(100), Teacher()
    answers = [teacher.ask(buffer, number, 40) for number in range(4)]
    await settle()
    assert teacher.asked == [0, 1]
    assert (await asyncio.to_thread(answers[0].tensors))["hidden_states"].tolist() == [0] * 40
    alive = weakref.ref((await asyncio.to_thread(answers[0].tensors))["hidden_states"])
    answers[0].release()
    await settle()
    assert alive() is None  # though the answer itself lives on
    with pytest.raises(InternalError, match="has been released"):
        answers[0].tensors()
    assert teacher.asked == [0, 1, 2]
    assert buffer.bytes_in_memory == 80
    assert buffer.take_counters().peak_bytes == 80
    await buffer.give_up()
    assert buffer.bytes_in_memory == 0


@pytest.mark.asyncio
async def test_what_is_released_while_it_waits_is_never_asked_for() -> None:
    buffer, teacher = MarkBuffer(50), Teacher()
    answers = [teacher.ask(buffer, number, 40) for number in range(3)]
    await settle()
    answers[1].release()
    await settle()
    assert len(buffer._tasks) == 1  # that of the one which still waits
    with pytest.raises(InternalError, match="has been released"):
        answers[1].tensors()
    answers[0].release()
    await settle()
    assert teacher.asked == [0, 2]
    assert buffer.bytes_in_memory == 40
    answers[2].release()
    await settle()
    assert (buffer.bytes_in_memory, buffer._tasks) == (0, set())


@pytest.mark.asyncio
async def test_what_is_waited_for_passes_the_bound_and_the_rest_comes_in_the_order_of_use() -> None:
    buffer, teacher = MarkBuffer(50), Teacher()
    answers = [teacher.ask(buffer, number, 40) for number in range(5)]
    await settle()
    assert teacher.asked == [0]
    buffer.expect([answers[number] for number in (4, 2, 0, 1, 3)])
    said = await asyncio.to_thread(answers[4].tensors)
    assert said["hidden_states"].tolist() == [4] * 40
    assert buffer.bytes_in_memory == 80
    assert buffer.take_counters().waited_s > 0
    answers[4].release()
    answers[0].release()
    await settle()
    assert teacher.asked == [0, 4, 2]
    await buffer.give_up()


@pytest.mark.asyncio
async def test_with_a_folder_what_is_needed_last_goes_to_the_disk(tmp_path: Path) -> None:
    buffer = MarkBuffer(100, tmp_path / "spill")
    arrays = {
        number: {
            "token_ids": np.arange(4, dtype=np.int64) + number,
            "logprobs": (np.arange(4) * 0.5 + number).astype(ml_dtypes.bfloat16),
        }
        for number in range(6)
    }

    async def fetch(number: int) -> dict[str, np.ndarray]:
        return arrays[number]

    answers = [buffer.ask(40, lambda number=number: fetch(number)) for number in range(6)]
    for _ in range(200):
        await asyncio.sleep(0.005)
        if all(answer.result.done() for answer in answers):
            break
    assert buffer.bytes_in_memory <= 100
    assert len(list((tmp_path / "spill").iterdir())) >= 3
    for number, answer in enumerate(answers):
        said = await asyncio.to_thread(answer.tensors)
        for name, array in arrays[number].items():
            assert said[name].dtype == array.dtype
            assert np.array_equal(said[name], array)
        answer.release()
    await settle()
    assert buffer.take_counters().spilled_bytes >= 120
    assert not list((tmp_path / "spill").iterdir())
    assert buffer.bytes_in_memory == 0


@pytest.mark.asyncio
async def test_it_tells_when_nobody_waits_for_room_any_more() -> None:
    buffer, teacher = MarkBuffer(100), Teacher()
    told: list[bool] = []
    buffer.when_all_admitted(lambda: told.append(buffer.is_full))
    answers = [teacher.ask(buffer, number, 40) for number in range(3)]
    await settle()
    assert buffer.is_full
    told.clear()  # of the first two
    answers[0].release()
    await settle()
    assert not buffer.is_full
    assert told == [False]
    teacher.ask(buffer, 3, 40)
    await settle()
    assert buffer.is_full
    await buffer.give_up()
    await settle()
    assert told == [False]  # whoever gives up asks for nothing more


@pytest.mark.asyncio
async def test_an_error_reaches_who_waits_and_frees_the_room() -> None:
    buffer, teacher = MarkBuffer(50), Teacher()

    async def fail() -> dict[str, np.ndarray]:
        raise TeacherUnavailableError("teacher 'math' is gone")

    bad = buffer.ask(40, fail)
    good = teacher.ask(buffer, 7, 40)
    with pytest.raises(TeacherUnavailableError, match="'math' is gone"):
        await asyncio.to_thread(bad.tensors)
    assert (await asyncio.to_thread(good.tensors))["hidden_states"][0] == 7
    await buffer.give_up()


@pytest.mark.asyncio
async def test_giving_up_ends_who_waits() -> None:
    buffer = MarkBuffer(50)

    async def never() -> dict[str, np.ndarray]:
        await asyncio.Event().wait()
        raise AssertionError

    answer = buffer.ask(40, never)
    waiting = asyncio.create_task(asyncio.to_thread(answer.tensors))
    await asyncio.sleep(0.01)
    await buffer.give_up()
    with pytest.raises(CancelledByCallerError, match="given up"):
        await waiting


async def spilled_some(folder: Path) -> tuple[MarkBuffer, list[BufferedAnswer]]:
    buffer, teacher = MarkBuffer(100, folder), Teacher()
    answers = [teacher.ask(buffer, number, 40) for number in range(6)]
    while not all(answer.result.done() for answer in answers):
        await asyncio.sleep(0.002)
    return buffer, answers


@pytest.mark.asyncio
async def test_giving_up_leaves_no_file_and_spilling_goes_on(tmp_path: Path) -> None:
    (tmp_path / "spill").mkdir()
    (tmp_path / "spill" / "of-a-killed-run.bin").write_bytes(b"x")
    buffer, _ = await spilled_some(tmp_path / "spill")
    assert len(list((tmp_path / "spill").iterdir())) >= 3
    await buffer.give_up()
    assert not list((tmp_path / "spill").iterdir())
    assert buffer.bytes_in_memory == 0
    # Given up in the middle of writing: the next step spills as before.
    teacher = Teacher()
    for number in range(6):
        teacher.ask(buffer, number, 40)
    await settle()
    await buffer.give_up()
    assert not list((tmp_path / "spill").iterdir())
    answers = [teacher.ask(buffer, number, 40) for number in range(6)]
    async with asyncio.timeout(20):
        while not all(answer.result.done() for answer in answers):
            await asyncio.sleep(0.002)
    await buffer.give_up()


@pytest.mark.asyncio
async def test_what_is_used_up_before_it_is_spilled_stops_nothing(tmp_path: Path) -> None:
    buffer, teacher = MarkBuffer(100, tmp_path / "spill"), Teacher()
    first = [teacher.ask(buffer, number, 40) for number in range(2)]
    await settle()
    third = teacher.ask(buffer, 2, 40)  # one of the two is to be spilled
    assert buffer._spilling is not None
    for answer in first:
        buffer._drop(answer)  # released before the spilling has begun
    await settle()
    assert buffer._spilling is None
    assert (await asyncio.to_thread(third.tensors))["hidden_states"][0] == 2
    await buffer.give_up()
    assert not list(tmp_path.glob("spill/*"))


@pytest.mark.asyncio
async def test_a_folder_that_cannot_be_written_is_told_once_and_answers_wait(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    buffer, teacher = MarkBuffer(100, tmp_path / "spill"), Teacher()
    (tmp_path / "spill").write_text("a file, where the folder should be")
    answers = [teacher.ask(buffer, number, 40 + number) for number in range(5)]
    await asyncio.sleep(0.1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert teacher.asked == [0, 1]
    for number, answer in enumerate(answers):
        assert (await asyncio.to_thread(answer.tensors))["hidden_states"].tolist() == [number] * (40 + number)
        answer.release()
    await settle()
    assert buffer.bytes_in_memory == 0


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12),
    st.integers(1, 100),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_every_answer_comes_whatever_the_sizes_and_the_order_of_use(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], bound: int, spill: bool, chance: random.Random
) -> None:
    async def use() -> None:
        buffer = MarkBuffer(bound, tmp_path_factory.mktemp("spill") if spill else None)
        teacher = Teacher()
        answers = [teacher.ask(buffer, number, size) for number, size in enumerate(sizes)]
        order = list(range(len(sizes)))
        chance.shuffle(order)
        buffer.expect([answers[number] for number in order])

        def consume() -> None:
            for number in order:
                said = answers[number].tensors()["hidden_states"]
                assert said.tolist() == [number] * sizes[number]
                answers[number].release()

        async with asyncio.timeout(30):
            await asyncio.to_thread(consume)
        await settle()
        # What is on its way to the disk is let go when it has arrived.
        await buffer.give_up()
        assert buffer.bytes_in_memory == 0
        assert buffer.take_counters().peak_bytes <= max(bound, *sizes) + max(sizes)
        assert sorted(teacher.asked) == sorted(order)

    asyncio.run(use())
