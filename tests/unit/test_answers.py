"""Answers: what is graded, what is counted, how they are drawn, and whose weights write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from task_cases import SPELL, recipe_of
from tiny_models import tiny_model

from opd_mesh.errors import ConfigError, VerifierError
from opd_mesh.trajectory import FinishReason, SamplingParams, Trajectory
from student_trainer.accuracy import AccuracyEvaluator
from student_trainer.answering import Answering
from student_trainer.answers import CANCELLED, Answer, drawn_at, figures, read_answers
from student_trainer.tasks import Grade, Prompt

RIGHT, HALF, UNPARSED = Grade(1.0, parsed=True), Grade(0.5, parsed=True), Grade(0.0, parsed=False)
FAILED, OTHER = Grade(None, parsed=False, failure="the verifier raised"), Grade(None, parsed=False)


class FakeDomain:
    """Of the prompts 0, 1, …; a response's text is its ids."""

    name = "d"

    def __init__(self, *, has_verifier: bool = True) -> None:
        self.has_verifier = has_verifier

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def held_out(self, split: str, count: int) -> list[Prompt]:
        assert split == "validation"
        return [Prompt("d", index, (1,), split="validation") for index in range(count)]


class FakeGrader:
    """By text."""

    def __init__(self, known: dict[str, Grade]) -> None:
        self.known = known
        self.asked: list[str] = []

    async def grade(self, domain: str, entries: Sequence[tuple[Prompt, str]]) -> list[Grade]:
        self.asked += [text for _, text in entries]
        return [self.known[text] for _, text in entries]


def response(*ids: int, reason: FinishReason = FinishReason.STOP) -> tuple[Prompt, Trajectory]:
    span = ((1, 1 + len(ids)),) if ids else ()
    return Prompt("d", 0, (1,)), Trajectory("x", "d", (1, *ids), span, finish_reason=reason)


def answer(grade: Grade | None, *, length: int = 2, reason: FinishReason = FinishReason.STOP) -> Answer:
    prompt, trajectory = response(*range(length), reason=reason)
    return Answer(prompt, trajectory, "", grade)


async def test_what_was_cancelled_is_never_graded() -> None:
    grader: Any = FakeGrader({"7": RIGHT, "8": UNPARSED})
    domain: Any = FakeDomain()
    cut, gone = (response(*ids, reason=FinishReason.CANCELLED) for ids in ((7,), ()))
    answers = await read_answers(domain, grader, [response(7), cut, gone, response(8)])
    assert [one.grade for one in answers] == [RIGHT, CANCELLED, CANCELLED, UNPARSED]
    assert [one.text for one in answers] == ["7", "7", "", "8"]
    assert grader.asked == ["7", "8"]
    line = answers[1].to_json("f")
    assert (line["score"], line["failure"], line["finish_reason"]) == (None, "it was cancelled", "cancelled")
    domain = FakeDomain(has_verifier=False)
    assert [one.grade for one in await read_answers(domain, grader, [response(7), cut])] == [None, None]


def test_figures_count_each_answer_where_it_belongs() -> None:
    cancelled = answer(CANCELLED, length=9, reason=FinishReason.CANCELLED)
    grades = [RIGHT, HALF, UNPARSED, FAILED, OTHER]
    assert figures([*map(answer, grades), cancelled]) == {
        "accuracy": pytest.approx(1 / 3), "score": pytest.approx(0.5), "answers": 6, "graded": 3, "unparsed": 1,
        "ungraded": 2, "mean_length": 2.0,
    }  # fmt: skip
    nothing = figures([answer(None)])
    assert (nothing["accuracy"], nothing["score"], nothing["ungraded"], nothing["unparsed"]) == (None, None, 0, 0)


def test_answers_are_drawn_from_the_whole_distribution() -> None:
    training = SamplingParams(seed=3, temperature=1.0, top_p=0.9, top_k=5, max_new_tokens=7, keep_mask=True)
    assert drawn_at(training, 0.5) == SamplingParams(seed=3, temperature=0.5, max_new_tokens=7)


# --- accuracy ---------------------------------------------------------------------------------------------------
class FakeRollouts:
    """Answers prompt n with the token n; those from ``cancelled`` on are cut short."""

    def __init__(self, cancelled: int) -> None:
        self.cancelled = cancelled

    def sampling(self, *key: Any) -> SamplingParams:
        return SamplingParams(top_p=0.9)

    def spec(self, request_id: str, prompt: Prompt, sampling: SamplingParams, *, publish: bool) -> Any:
        assert not publish
        assert (sampling.temperature, sampling.top_p) == (0.0, 1.0)
        return prompt.index

    async def write_unpublished(self, specs: Sequence[int]) -> list[Trajectory]:
        cut = FinishReason.CANCELLED
        return [response(n, reason=cut if n >= self.cancelled else FinishReason.STOP)[1] for n in specs]


async def measured(grades: Sequence[Grade], cancelled: int) -> dict[str, float]:
    verifier = {"verifier": {"name": "reasoning_gym"}}
    recipe = recipe_of({**SPELL, **verifier}, evaluation={"accuracy": {"prompts_per_domain": len(grades)}})
    evaluator = AccuracyEvaluator(recipe, FakeRollouts(cancelled))  # type: ignore[arg-type]
    grader: Any = FakeGrader({str(index): grade for index, grade in enumerate(grades)})
    domains: Any = [FakeDomain(has_verifier=False), FakeDomain()]
    return await evaluator.evaluate(domains, grader, lineage=1, step=0)


async def test_accuracy_is_of_what_was_graded() -> None:
    assert await measured([RIGHT, UNPARSED, FAILED, RIGHT], cancelled=3) == {
        "accuracy/d": 0.5, "score/d": 0.5, "unparsed/d": 0.5, "graded/d": 2, "ungraded/d": 2, "answer_length/d": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(("cancelled", "reason"), [(9, "the verifier raised"), (0, "it was cancelled")])
async def test_a_domain_of_which_nothing_is_graded_is_an_error(cancelled: int, reason: str) -> None:
    with pytest.raises(VerifierError, match=f"not one answer could be graded: {reason}") as error:
        await measured([FAILED, FAILED], cancelled)
    assert error.value.field == "domains.d.verifier"


def test_accuracy_without_a_verifier_is_refused() -> None:
    recipe = recipe_of(SPELL, evaluation={"accuracy": {}})
    with pytest.raises(ConfigError, match="no domain has a verifier") as error:
        AccuracyEvaluator(recipe, FakeRollouts(9))  # type: ignore[arg-type]
    assert error.value.field == "evaluation.accuracy"


def verdict(said: float | None, gold: float) -> Grade:
    return Grade(0.0 if said is None else 1 - abs(said - gold), parsed=said is not None, said=said, gold=gold)


async def test_verdicts_have_kappa_beside_their_accuracy() -> None:
    """Of eight that parsed six are right, half of them by chance."""
    right = [verdict(1.0, 1.0)] * 3 + [verdict(0.0, 0.0)] * 3
    line = await measured([*right, verdict(0.0, 1.0), verdict(1.0, 0.0), verdict(None, 1.0), FAILED], cancelled=99)
    assert (line["accuracy/d"], line["kappa/d"]) == (pytest.approx(6 / 9), pytest.approx(0.5))
    assert (line["unparsed/d"], line["graded/d"]) == (pytest.approx(1 / 9), 9)
    near = await measured([verdict(0.75, 1.0), verdict(0.1 + 0.2, 0.3)], cancelled=99)
    assert near["accuracy/d"] == 0.5  # only what says exactly what gold does is right
    assert near["score/d"] == pytest.approx(0.875)
    assert near["kappa/d"] == pytest.approx((1 / 2 - 1 / 4) / (3 / 4))
    assert "kappa/d" not in await measured([verdict(1.0, 1.0)] * 2, cancelled=99)  # one class: it is not defined


# --- weights ----------------------------------------------------------------------------------------------------
def test_an_adapters_weights_are_those_of_the_merged_model(tmp_path: Path) -> None:
    base = tiny_model("llama", 0)
    base.save_pretrained(tmp_path / "base")
    adapted: Any = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # it begins as 0, which changes nothing
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path / "adapter")
    student = SimpleNamespace(path=tmp_path / "base", dtype="float32")
    answering: Any = SimpleNamespace(
        _config=SimpleNamespace(recipe=SimpleNamespace(student=student)), _device=torch.device("cpu")
    )
    plain = Answering._weights(answering, tmp_path / "base")
    found = Answering._weights(answering, tmp_path / "adapter")
    assert found.adapter is None
    assert found.tensors.keys() == plain.tensors.keys()
    merged = adapted.merge_and_unload().state_dict()
    changed = 0
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(torch.from_numpy(tensor), merged[name])
        changed += not (tensor == plain.tensors[name]).all()
    assert changed >= 7  # every projection of a layer
