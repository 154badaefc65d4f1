"""Steps of a policy gradient in the pipeline, with fakes for all that writes, marks and grades.

The prompt with index n has the rewards that the test says; what it does not name is half right.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mesh import tiny_recipe

from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import VerifierError
from opd_mesh.signals import SignalKind
from opd_mesh.trajectory import SamplingParams, Trajectory
from student_trainer.batch import HeldAnswer, Mark, Sample
from student_trainer.checkpoint import TrainerState
from student_trainer.pipeline import Pipeline
from student_trainer.supply import Gathered
from student_trainer.tasks import Grade, Prompt
from student_trainer.writing import Arrival, Writing

RESPONSES = 2
Rewards = tuple[float | None, ...]
EQUAL, HALF, UNGRADED = (1.0, 1.0), (1.0, 0.0), (None, None)


class FakeDomain:
    name = "d"
    has_verifier = True
    config = SimpleNamespace(share=1.0)

    def after(self, cursor: int, count: int) -> tuple[list[Prompt], int]:
        return [Prompt("d", index, (1, index)) for index in range(cursor, cursor + count)], cursor + count

    def text(self, ids: Sequence[int]) -> str:
        return str(ids[0])

    def length_penalty(self, num_tokens: int) -> float:
        return 0.0


class FakeGrader:
    def __init__(self, rewards: dict[int, Rewards]) -> None:
        self.rewards = rewards

    async def grade(self, domain: str, entries: Sequence[tuple[Prompt, str]]) -> list[Grade]:
        await asyncio.sleep(0)
        grades = []
        for prompt, text in entries:
            score = self.rewards.get(prompt.index, HALF)[int(text)]
            failure = f"the verifier raised on {prompt.index}" if score is None else None
            grades.append(Grade(score, parsed=score is not None, failure=failure))
        return grades


class Answer(HeldAnswer):
    """What the reference says of one response."""

    def __init__(self, name: str, released: list[str]) -> None:
        super().__init__({})
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "told", released)

    def release(self) -> None:
        self.told.append(self.name)  # type: ignore[attr-defined]


class FakeRollouts:
    """Writes at once. A response's one token says which answer to its prompt it is."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.cancelled: set[int] = set()  # of these prompts nothing comes but the first answer
        self.discarded: list[str] = []

    def sampling(self, domain: str, split: str, index: int, answer: int) -> SamplingParams:
        return SamplingParams(seed=10 * index + answer)

    def spec(self, request_id: str, prompt: Prompt, sampling: SamplingParams, *, publish: bool) -> Trajectory:
        assert publish
        answer = sampling.seed % 10
        return Trajectory(request_id, "d", (*prompt.token_ids, answer), ((2, 3),), (-1.0,), (-1.0,), (0,))

    def write(self, specs: Sequence[Trajectory], on_arrival: Any) -> Writing:
        writing = Writing(on_arrival)
        self.asked.append([f"{one.token_ids[1]}.{one.token_ids[2]}" for one in specs])
        for one in specs:
            gone = one.token_ids[1] in self.cancelled and one.token_ids[2] > 0
            writing.ask(one.trajectory_id, None, self._answer(replace(one, scored_spans=()) if gone else one))  # type: ignore[arg-type]
            if not gone:
                asyncio.get_running_loop().call_soon(self._arrive, writing, one)
        return writing

    def _arrive(self, writing: Writing, one: Trajectory) -> None:
        writing.take(Arrival(one, f"entry of {one.trajectory_id}"))

    async def _answer(self, one: Trajectory) -> Trajectory:
        return one

    async def abandon(self, writings: Sequence[Writing]) -> None:
        for writing in writings:
            await writing.close()


class Run:
    """A pipeline of two prompts a step, two answers each."""

    def __init__(self, folder: Path, rewards: dict[int, Rewards], *, rounds: int | None = 3, prompts: int = 2) -> None:
        sampling = None if rounds is None else {"max_rounds": rounds}
        self.recipe = self._recipe(folder, sampling, prompts)
        self.rollouts, self.released = FakeRollouts(), list[str]()
        self.pipeline = Pipeline(
            self.recipe,
            self.rollouts,  # type: ignore[arg-type]
            SimpleNamespace(ask=self._ask),  # type: ignore[arg-type]
            SimpleNamespace(is_full=False, when_all_admitted=lambda tell: None),  # type: ignore[arg-type]
        )
        self._grader: Any = FakeGrader(rewards)
        self._domains: Any = [FakeDomain()]

    @staticmethod
    def _recipe(folder: Path, sampling: Any, prompts: int) -> Recipe:
        domain = {"reasoning_gym": {"task": "chain_sum"}, "verifier": {"name": "reasoning_gym"}}
        return tiny_recipe(
            folder,
            {},
            domains={"d": domain},
            objective={"name": "dapo", "advantage_scale": "none", "dynamic_sampling": sampling},
            batch={"prompts_per_step": prompts, "responses_per_prompt": RESPONSES},
            run={"steps": 9},
        )

    def _ask(self, trajectory: Trajectory, marks: Any) -> Sample:
        answer = Answer(trajectory.trajectory_id, self.released)
        return Sample(trajectory, reference=Mark("base", 0.0, SignalKind.TOKEN_LOGPROBS, None, answer))

    def start(self, progress: TrainerState | None = None) -> None:
        self.pipeline.start(self._domains, progress or TrainerState(lineage=1), self._grader)

    async def take(self, number: int) -> Gathered:
        self.pipeline.submit(number - 1)
        return await asyncio.wait_for(self.pipeline.take(number), 10)


def advantages(gathered: Gathered) -> dict[str, float | None]:
    """By prompt and answer."""
    return {
        f"{sample.trajectory.token_ids[1]}.{sample.trajectory.token_ids[2]}": sample.advantage
        for sample in gathered.samples
    }


def counts(gathered: Gathered) -> dict[str, float]:
    return {key: value for key, value in gathered.counted.items() if "/" not in key and value}


async def test_a_step_that_learns_from_every_group_asks_once(tmp_path: Path) -> None:
    run = Run(tmp_path, {})
    run.start()
    gathered = await run.take(1)
    assert run.rollouts.asked == [["0.0", "0.1", "1.0", "1.1"]]
    assert advantages(gathered) == {"0.0": 0.5, "0.1": -0.5, "1.0": 0.5, "1.1": -0.5}
    assert counts(gathered) == {"groups_taught": 2}
    assert gathered.counted["reward/d"] == 0.5
    assert (gathered.cursors, gathered.drawn) == ({"d": 2}, {"d": 2})
    assert len(gathered.arrivals) == 4
    assert run.released == []


async def test_groups_of_equal_rewards_are_replaced_and_dropped(tmp_path: Path) -> None:
    """Prompt 1 is all right; so is 2, asked for in its place; 3 is not."""
    run = Run(tmp_path, {1: EQUAL, 2: EQUAL})
    run.start()
    gathered = await run.take(1)
    assert run.rollouts.asked == [["0.0", "0.1", "1.0", "1.1"], ["2.0", "2.1"], ["3.0", "3.1"]]
    assert advantages(gathered) == {"0.0": 0.5, "0.1": -0.5, "3.0": 0.5, "3.1": -0.5}
    assert counts(gathered) == {"groups_taught": 2, "groups_equal": 2, "samples_dropped": 4}
    assert gathered.counted["reward/d"] == 0.75  # of all that was written
    # The place in the data is behind all that was asked for, and every entry is acknowledged with the step.
    assert (gathered.cursors, gathered.drawn) == ({"d": 4}, {"d": 4})
    assert len(gathered.arrivals) == 8
    # Ids go on counting, and what the reference said of the dropped is let go of, once.
    assert sorted(arrival.trajectory.trajectory_id for arrival in gathered.arrivals) == [
        f"l0001-s000001-p000{place}" for place in range(8)
    ]
    assert sorted(run.released) == [f"l0001-s000001-p000{place}" for place in (2, 3, 4, 5)]
    again = await run.take(2)
    assert advantages(again).keys() == {"4.0", "4.1", "5.0", "5.1"}
    assert counts(again) == {"groups_taught": 2}


async def test_rounds_are_bounded_and_what_is_missing_makes_the_step_smaller(tmp_path: Path) -> None:
    run = Run(tmp_path, dict.fromkeys(range(1, 9), EQUAL), rounds=2, prompts=3)
    run.start()
    gathered = await run.take(1)
    assert [len(asked) // RESPONSES for asked in run.rollouts.asked] == [3, 2, 2]
    assert advantages(gathered).keys() == {"0.0", "0.1"}
    assert counts(gathered) == {"groups_taught": 1, "groups_equal": 6, "samples_dropped": 12}


async def test_a_step_of_nothing_but_degenerate_groups_is_taken_as_it_is(tmp_path: Path) -> None:
    """A step must have samples. Their gradient is that of the KL alone; without one the optimizer's momentum still
    moves the weights."""
    run = Run(tmp_path, dict.fromkeys(range(9), EQUAL), rounds=1)
    run.start()
    gathered = await run.take(1)
    assert set(advantages(gathered).values()) == {0.0}
    assert len(gathered.samples) == 8
    assert counts(gathered) == {"groups_equal": 4}
    assert run.released == []  # the update asks the reference of them


async def test_without_dynamic_sampling_degenerate_groups_stay(tmp_path: Path) -> None:
    run = Run(tmp_path, {0: EQUAL}, rounds=None)
    run.start()
    gathered = await run.take(1)
    assert len(run.rollouts.asked) == 1
    assert advantages(gathered) == {"0.0": 0.0, "0.1": 0.0, "1.0": 0.5, "1.1": -0.5}
    assert counts(gathered) == {"groups_taught": 1, "groups_equal": 1}


@pytest.mark.parametrize("rounds", [None, 1])
async def test_what_could_not_be_graded_is_left_out_and_counted(tmp_path: Path, rounds: int | None) -> None:
    run = Run(tmp_path, {0: (None, 0.25)}, rounds=rounds)
    run.start()
    gathered = await run.take(1)
    replaced = rounds is not None  # a group of one has nothing to be compared with
    assert advantages(gathered).keys() == {"1.0", "1.1"} | ({"2.0", "2.1"} if replaced else {"0.1"})
    assert gathered.counted["ungraded"] == 1
    assert gathered.counted["groups_single"] == 1
    # Its reference's answer is let go of, and with it that of the lone one where it is dropped.
    assert len(run.released) == (2 if replaced else 1)
    mean = (0.25 + (2 if replaced else 1) * 1.0) / (5 if replaced else 3)
    assert gathered.counted["reward/d"] == pytest.approx(mean)


async def test_a_cancelled_response_leaves_its_group_smaller(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, rounds=None)
    run.rollouts.cancelled = {0}
    run.start()
    gathered = await run.take(1)
    assert advantages(gathered) == {"0.0": 0.0, "1.0": 0.5, "1.1": -0.5}
    assert counts(gathered) == {"groups_taught": 1, "groups_single": 1}


@pytest.mark.parametrize("rounds", [None, 2])
async def test_a_verifier_that_always_fails_ends_the_run(tmp_path: Path, rounds: int | None) -> None:
    run = Run(tmp_path, dict.fromkeys(range(2, 20), UNGRADED), rounds=rounds)
    run.start()
    await run.take(1)
    with pytest.raises(
        VerifierError, match=r"not one response of step 2 could be graded: the verifier raised on \d+\."
    ) as error:
        await run.take(2)
    assert error.value.field == "domains"
    assert "opd run --resume" in error.value.message
    await run.pipeline.close()
    # What had come is acknowledged with the next checkpoint, for a resumed run writes it anew.
    assert len(run.rollouts.discarded) == (4 if rounds is None else 12)


async def test_a_resumed_run_asks_for_the_same_prompts(tmp_path: Path) -> None:
    """From the place in the checkpoint, which is behind what was asked for in the place of others."""
    rewards: dict[int, Rewards] = {1: EQUAL, 3: EQUAL, 4: EQUAL}
    whole = Run(tmp_path, rewards)
    whole.start()
    steps = [await whole.take(number) for number in (1, 2, 3)]
    resumed = Run(tmp_path, rewards)
    first = steps[0]
    resumed.start(TrainerState(step=1, lineage=2, cursors=first.cursors, drawn=first.drawn))
    for number in (2, 3):
        again = await resumed.take(number)
        assert advantages(again) == advantages(steps[number - 1])
        assert (again.cursors, again.drawn) == (steps[number - 1].cursors, steps[number - 1].drawn)
    assert resumed.rollouts.asked == whole.rollouts.asked[2:]


async def test_groups_do_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    found = []
    for backwards in (False, True):
        run = Run(tmp_path, {0: (0.25, 0.5), 1: (1.0, 0.5)})
        if backwards:
            arrive = run.rollouts._arrive

            def later(writing: Writing, one: Trajectory, arrive: Any = arrive) -> None:
                delay_s = 0.001 * (10 - int(one.trajectory_id[-1]))
                asyncio.get_running_loop().call_later(delay_s, arrive, writing, one)

            run.rollouts._arrive = later  # type: ignore[method-assign]
        run.start()
        gathered = await run.take(1)
        order = [arrival.trajectory.trajectory_id[-1] for arrival in gathered.arrivals]
        assert order == (["3", "2", "1", "0"] if backwards else ["0", "1", "2", "3"])
        found.append((advantages(gathered), gathered.counted))
    assert found[0] == found[1]
