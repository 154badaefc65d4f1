"""Rewards by a reward model: a group is one item, and what goes wrong is no reward of 0. The server is a fake one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from opd.v1 import common_pb2
from opd.v1 import generative_reward_service_pb2 as pb

from opd_mesh.config.base import parse_config
from opd_mesh.config.judging import GrmReward
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.training import GrpoConfig
from opd_mesh.errors import (
    ConfigError,
    DeadlineError,
    JudgeUnavailableError,
    OpdError,
    TooLongError,
    UnavailableError,
    VerifierError,
)
from opd_mesh.trajectory import FinishReason, Trajectory
from student_trainer.batch import Sample
from student_trainer.groups import Groups
from student_trainer.judged_rewards import GroupJudge, JudgedDomain, open_judge
from student_trainer.rewards import Reward, Rewards
from student_trainer.tasks import Grade, Item, Prompt

RUBRIC = pb.Rubric(name="spelling", criteria=[pb.Criterion(name="correct", scale_max=1)])


class FakeDomain:
    """Text: the response's ids as characters; "!" ends the reasoning. Every token costs a hundredth."""

    has_verifier = False
    effort = SimpleNamespace(closing="!")

    def __init__(self, name: str) -> None:
        self.name = name

    def text(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def item(self, prompt: Prompt) -> Item:
        return Item([{"role": "user", "content": f"question {prompt.index}"}], f"gold {prompt.index}")

    def question(self, item: Item) -> str:
        return item.question

    def gold_answer(self, item: Item) -> str | None:
        return item.answer

    def length_penalty(self, num_tokens: int) -> float:
        return -0.01 * num_tokens


def verdict(answer: str, **fields: Any) -> pb.Verdict:
    """The score is the share of "a"."""
    score = answer.count("a") / len(answer)
    return pb.Verdict(**{"score": score, "score_variance": 0.125, "samples_parsed": 2, "samples_asked": 4} | fields)


def judgement(item: pb.JudgeItem) -> pb.JudgeResponse:
    judge = common_pb2.Policy(run_id="run", lineage=1, version=3, digest="d")
    return pb.JudgeResponse(judge=judge, verdicts=[verdict(answer) for answer in item.answers])


class FakeClient:
    """Answers by ``respond``; an item whose prompt is gated waits."""

    def __init__(self, respond: Callable[[pb.JudgeItem], pb.JudgeResponse | OpdError] = judgement) -> None:
        self.respond = respond
        self.asked: list[pb.JudgeItem] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.waited, self.closed = 0, False
        self.rubrics = [pb.RubricName(name="writing@2")]
        self.inline_templates = False

    async def wait_ready(self) -> None:
        self.waited += 1

    async def get_judge(self) -> pb.GetJudgeResponse:
        return pb.GetJudgeResponse(rubrics=self.rubrics, inline_templates=self.inline_templates)

    async def judge_many(self, items: Sequence[pb.JudgeItem], *, timeout_s: float) -> list[pb.JudgeResponse | OpdError]:
        assert timeout_s > 7.0
        self.asked += items
        for item in items:
            if item.prompt in self.gates:
                await self.gates[item.prompt].wait()
        return [self.respond(item) for item in items]

    async def close(self) -> None:
        self.closed = True


def new_judge(*clients: FakeClient, rubric: pb.Rubric | None = RUBRIC, size: int = 2, **reward: Any) -> GroupJudge:
    config = GrmReward(name="grm", rubric="writing" if rubric is None else Path("r.yaml"), samples=4, **reward)
    domain: Any = FakeDomain("d")
    return GroupJudge([JudgedDomain(domain, config, rubric)], clients, group_size=size, timeout_s=7.0)


def ask(judge: Any, name: str, text: str, index: int = 0, **fields: Any) -> None:
    ids = tuple(map(ord, text))
    trajectory = Trajectory(name, "d", (1, *ids), ((1, 1 + len(ids)),))
    judge.ask(Prompt("d", index, (1,)), replace(trajectory, **fields))


async def settled() -> None:
    """Until whatever can be sent is sent."""
    for _ in range(100):
        await asyncio.sleep(0.001)


# --- groups as items -------------------------------------------------------------------------------------------
async def test_a_whole_group_is_one_item_in_an_order_of_its_own() -> None:
    client = FakeClient()
    judge = new_judge(client, size=3, reference="answer")
    for name, text in (("c", "hm!aa"), ("a", "so! ab \n"), ("b", "!bb")):
        ask(judge, name, text, index=5)
    rewards = await judge.take(["b", "c", "a"])
    (item,) = client.asked
    assert (item.prompt, list(item.answers), item.reference) == ("question 5", ["ab", "bb", "aa"], "gold 5")
    assert item.timeout.ToMilliseconds() == 7000  # of the server, which says why before the client gives up
    assert (item.samples, item.mode, item.rubric_inline) == (4, pb.JUDGE_MODE_POINTWISE, RUBRIC)
    assert [reward.grade for reward in rewards] == [Grade(0.0, True), Grade(1.0, True), Grade(0.5, True)]
    assert [reward.total for reward in rewards] == pytest.approx([0.0 - 0.03, 1.0 - 0.05, 0.5 - 0.08])
    for reward in rewards:
        assert reward.judged is not None
        assert (reward.judged.judge.version, reward.judged.variance) == (3, 0.125)
        assert (reward.judged.votes, reward.judged.unparsed) == (4, 2)
    await judge.close()
    assert client.closed


async def test_groups_are_judged_while_others_are_written_and_whichever_is_answered_first() -> None:
    client = FakeClient()
    client.gates = {"question 0": asyncio.Event()}
    judge = new_judge(client)
    ask(judge, "x0", "!a", index=0)
    ask(judge, "y0", "!a", index=1)
    await settled()
    assert client.asked == []  # neither is whole
    ask(judge, "x1", "!b", index=0)
    ask(judge, "y1", "!b", index=1)
    await settled()
    assert [item.prompt for item in client.asked] == ["question 0", "question 1"]
    assert [reward.grade.score for reward in await judge.take(["y1", "y0"])] == [0.0, 1.0]
    client.gates["question 0"].set()
    assert [reward.grade.score for reward in await judge.take(["x0", "x1"])] == [1.0, 0.0]
    assert client.waited == 1
    await judge.close()


async def test_what_is_not_whole_when_it_is_wanted_is_judged_as_it_is() -> None:
    client = FakeClient()
    judge = new_judge(client, size=8)
    ask(judge, "x", "!a")
    ask(judge, "y", "!b")
    assert [reward.grade.score for reward in await judge.take(["x", "y"])] == [1.0, 0.0]
    assert [list(item.answers) for item in client.asked] == [["a", "b"]]
    await judge.close()


async def test_groups_go_to_servers_by_turns() -> None:
    clients = [FakeClient(), FakeClient()]
    judge = new_judge(*clients, size=1)
    for index in range(4):
        ask(judge, str(index), "!a", index=index)
    for index in range(4):
        await judge.take([str(index)])
    assert [[item.prompt for item in client.asked] for client in clients] == [
        ["question 0", "question 2"],
        ["question 1", "question 3"],
    ]
    await judge.close()


async def test_what_is_no_answer_is_not_judged() -> None:
    client = FakeClient()
    judge = new_judge(client, size=4)
    ask(judge, "endless", "hm, hm")
    ask(judge, "empty", "hm! ")
    ask(judge, "cut", "hm!a", finish_reason=FinishReason.CANCELLED)
    ask(judge, "whole", "hm!a")
    endless, empty, cut, whole = await judge.take(["endless", "empty", "cut", "whole"])
    assert endless.grade == empty.grade == Grade(0.0, parsed=False)
    assert (cut.total, cut.grade.failure) == (None, "it was cancelled")
    assert whole.grade.score == 1.0
    assert [list(item.answers) for item in client.asked] == [["a"]]
    ask(judge, "alone", "hm", index=1)
    assert (await judge.take(["alone"]))[0].grade == Grade(0.0, parsed=False)
    assert len(client.asked) == 1  # there was nothing to ask
    await judge.close()


# --- what goes wrong -------------------------------------------------------------------------------------------
async def failing(respond: Callable[[pb.JudgeItem], pb.JudgeResponse | OpdError]) -> list[Reward]:
    judge = new_judge(FakeClient(respond))
    ask(judge, "x", "!a")
    ask(judge, "y", "!b")
    rewards = await judge.take(["x", "y"])
    await judge.close()
    return rewards


def with_verdicts(*verdicts: pb.Verdict) -> Callable[[pb.JudgeItem], pb.JudgeResponse]:
    return lambda item: pb.JudgeResponse(judge=judgement(item).judge, verdicts=verdicts)


async def test_a_verdict_that_failed_leaves_its_response_out_and_no_other() -> None:
    refused, good = await failing(with_verdicts(verdict("a", failure="2 lines for 1 criteria"), verdict("b")))
    assert (refused.total, refused.grade) == (None, Grade(None, False, "2 lines for 1 criteria"))
    assert (good.total, good.grade.score) == (pytest.approx(-0.02), 0.0)
    silent, _ = await failing(with_verdicts(verdict("a", samples_parsed=0), verdict("b")))
    assert (silent.total, silent.grade.failure) == (None, "no vote was a verdict")
    for score in (1.5, -0.2, float("nan")):
        off, _ = await failing(with_verdicts(verdict("a", score=score), verdict("b")))
        assert off.total is None
        assert "outside [0, 1]" in (off.grade.failure or "")


async def test_an_item_that_is_refused_or_answered_in_part_gives_no_reward_at_all() -> None:
    for respond, failure in (
        (lambda _: TooLongError("too many characters", field="answers"), "it was not judged: too many characters"),
        (with_verdicts(verdict("a")), "the judge gave 1 verdicts on 2 answers"),
    ):
        rewards = await failing(respond)
        assert [(reward.total, reward.grade.failure) for reward in rewards] == [(None, failure)] * 2


async def test_a_judgement_of_nobody_in_particular_is_none() -> None:
    rewards = await failing(lambda item: pb.JudgeResponse(verdicts=judgement(item).verdicts))
    for reward in rewards:
        assert reward.total is None
        assert "the judge is not named" in (reward.grade.failure or "")


async def test_what_took_too_long_has_no_reward_while_the_server_answers() -> None:
    for error in (DeadlineError("not judged within 7 s"), JudgeUnavailableError("did not judge the item within 17 s")):
        rewards = await failing(lambda _, error=error: error)
        failure = f"it was not judged: {error.message}"
        assert [(reward.total, reward.grade.failure) for reward in rewards] == [(None, failure)] * 2


async def test_a_server_out_of_reach_ends_the_run_where_rewards_are_waited_for() -> None:
    class Gone(FakeClient):
        gone = False

        async def get_judge(self) -> pb.GetJudgeResponse:
            if self.gone:
                raise UnavailableError("nobody there")
            self.gone = True  # once it is asked to judge
            return await super().get_judge()

    judge = new_judge(Gone(lambda _: JudgeUnavailableError("the reward model at h:1 did not judge for 60 s")))
    ask(judge, "x", "!a")
    ask(judge, "y", "!a")
    with pytest.raises(VerifierError, match=r"did not judge for 60 s\. Without the reward model") as error:
        await judge.take(["x", "y"])
    assert error.value.field == "grm"
    await judge.close()

    class NeverReady(FakeClient):
        async def wait_ready(self) -> None:
            raise JudgeUnavailableError("nobody listens on h:1")

    judge = new_judge(NeverReady())
    ask(judge, "x", "!a")
    with pytest.raises(VerifierError, match="nobody listens"):
        await judge.take(["x"])
    await judge.close()


@pytest.mark.parametrize("name", ["writing", "writing@2"])
async def test_a_rubric_may_be_the_servers_own(name: str) -> None:
    client, domain = FakeClient(), FakeDomain("d")
    judged = JudgedDomain(domain, GrmReward(name="grm", rubric=name), None)  # type: ignore[arg-type]
    judge = GroupJudge([judged], [client], group_size=1, timeout_s=7.0)
    ask(judge, "x", "!a")
    await judge.take(["x"])
    assert client.asked[0].rubric_name == name
    assert not client.asked[0].HasField("rubric_inline")
    await judge.close()


@pytest.mark.parametrize("key", ["template", "pairwise_template"])
async def test_a_template_that_the_server_would_refuse_is_told_before_anything_is_judged(key: str) -> None:
    rubric = pb.Rubric()
    rubric.CopyFrom(RUBRIC)
    setattr(rubric, key, "{{ prompt }}")
    client = FakeClient()
    judge = new_judge(client, rubric=rubric, size=1)
    ask(judge, "x", "!a")
    with pytest.raises(ConfigError, match="or set inline_templates there") as error:
        await judge.take(["x"])
    assert error.value.field == "domains.d.reward.rubric"
    assert not client.asked
    await judge.close()
    client = FakeClient()
    client.inline_templates = True
    judge = new_judge(client, rubric=rubric, size=1)
    ask(judge, "x", "!a")
    assert (await judge.take(["x"]))[0].total is not None
    await judge.close()


async def test_a_rubric_that_the_server_does_not_have_is_told_with_those_it_has() -> None:
    client = FakeClient()
    client.rubrics = [pb.RubricName(name="poetry@1")]
    judge = new_judge(client, rubric=None)
    ask(judge, "x", "!a")
    with pytest.raises(ConfigError, match="has no rubric 'writing'; it has poetry@1") as error:
        await judge.take(["x"])
    assert error.value.field == "domains.d.reward.rubric"
    await judge.close()


async def test_closing_lets_go_of_what_is_being_judged() -> None:
    client = FakeClient()
    client.gates = {"question 0": asyncio.Event()}
    judge = new_judge(client)
    ask(judge, "x", "!a")
    ask(judge, "y", "!a")
    ask(judge, "half", "!a", index=1)
    await settled()
    await asyncio.wait_for(judge.close(), 5)
    assert len(asyncio.all_tasks()) == 1


# --- beside verifiers ------------------------------------------------------------------------------------------
class OnesGrader:
    """Whatever a verifier is asked is right."""

    async def grade(self, domain: str, entries: Sequence[Any]) -> list[Grade]:
        assert domain == "verified"
        return [Grade(1.0, parsed=True) for _ in entries]


async def test_domains_with_a_verifier_and_with_a_judge_stand_side_by_side_and_are_counted_by_name() -> None:
    verified: Any = FakeDomain("verified")
    verified.has_verifier = True
    client = FakeClient(with_verdicts(verdict("a"), verdict("b", failure="no verdict", samples_parsed=0)))
    rewards = Rewards([verified, FakeDomain("d")], OnesGrader(), new_judge(client))  # type: ignore[list-item, arg-type]
    groups = Groups(GrpoConfig(advantage_scale="none"), rewards)
    trajectories = {}
    for name, domain, text in (
        ("v0", "verified", "!a"),
        ("v1", "verified", "!bbb"),
        ("d0", "d", "!a"),
        ("d1", "d", "!b"),
    ):
        ids = tuple(map(ord, text))
        trajectories[name] = Trajectory(name, domain, (1, *ids), ((1, 1 + len(ids)),))
        groups.ask(Prompt(domain, 0, (1,)), trajectories[name])
    taught, idle = await groups.with_advantages([Sample(trajectories[name]) for name in ("v0", "v1")])
    assert ([one.advantage for one in taught], idle) == ([pytest.approx(0.01), pytest.approx(-0.01)], False)
    alone, idle = await groups.with_advantages([Sample(trajectories[name]) for name in ("d0", "d1")])
    assert ([one.advantage for one in alone], idle) == ([0.0], True)
    counted = groups.take_counted()
    assert groups.last_failure == "no verdict"
    assert (counted["ungraded"], counted["groups_single"], counted["groups_taught"]) == (1, 1, 1)
    assert {key: value for key, value in counted.items() if key.startswith("judge_")} == {
        "judge_version/d": 3.0,
        "judge_unparsed/d": 0.75,  # of eight votes two parsed
        "judge_variance/d": 0.125,
    }
    assert (counted["score/verified"], counted["score/d"], counted["ungraded/d"]) == (1.0, 1.0, 0.5)
    await groups.close()
    assert client.closed


# --- of a recipe -----------------------------------------------------------------------------------------------
def recipe_of(reward: Any, **sections: Any) -> Recipe:
    value = {
        "run": {"steps": 1},
        "student": {"path": "s"},
        "domains": {
            "d": {"reasoning_gym": {"task": "spell_backward"}, "reward": reward, "verifier": {"name": "reasoning_gym"}}
        },
        "objective": {"name": "grpo"},
        "batch": {"responses_per_prompt": 2},
        **sections,
    }
    return parse_config(Recipe, value, source="test")


async def test_a_recipe_says_whether_there_is_a_judge_and_where(tmp_path: Path) -> None:
    assert open_judge(recipe_of(None), []) is None
    reward = {"name": "grm", "rubric": str(tmp_path / "r.yaml")}
    with pytest.raises(ConfigError) as error:
        open_judge(recipe_of(reward), [])
    assert error.value.field == "grm.peers.addresses"
    recipe = recipe_of(reward, grm={"peers": {"addresses": ["127.0.0.1:1"]}})
    domain: Any = FakeDomain("d")
    domain.config = recipe.domains["d"]
    with pytest.raises(ConfigError, match=r"r\.yaml"):
        open_judge(recipe, [domain])
    (tmp_path / "r.yaml").write_text("name: r\ncriteria: [{name: good}]\n")
    judge = open_judge(recipe, [domain])
    assert judge is not None
    assert (judge.judges("d"), judge.judges("other")) == (True, False)
    await judge.close()
