"""The reward model's judging where a judge is slow, gone, new, or of another kind; and items that are given up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from opd.v1 import generative_reward_service_pb2 as pb
from opd.v1 import rollout_service_pb2
from tiny_models import EOS_ID, tiny_tokenizer

import grm_server.judging as judging_module
from grm_server.ballots import Texts
from grm_server.batch_call import BatchCall
from grm_server.items import CheckedItem, check_item
from grm_server.judges import Judge, Judges
from grm_server.judging import Judging
from opd_mesh.clients.replica_choice import rendezvous_ranking
from opd_mesh.clients.rollout import GenerateSpec
from opd_mesh.config.base import parse_config
from opd_mesh.config.rubrics import Criterion, Rubric, RubricLibrary, Scale
from opd_mesh.config.services import ChannelConfig, GrmServerConfig
from opd_mesh.convert import policy_to_proto
from opd_mesh.errors import (
    DeadlineError,
    OpdError,
    PreconditionError,
    RolloutUnavailableError,
    TokenizerMismatchError,
    UnavailableError,
)
from opd_mesh.policy import PolicyId
from opd_mesh.trajectory import FinishReason, Trajectory

RUBRIC = Rubric(
    name="r",
    criteria=[Criterion(name="right", scale=Scale(min=0, max=1))],
    reasons="none",
    form="score",
    template="{{ prompt.split('+')[1] }} {{ answer }}",  # not of the texts that beginnings are made of
)
POLICY = PolicyId("run", 1, 4, "d" * 64)
Answer = Callable[[GenerateSpec], Any]


class Client:
    """A rollout server's, which answers what it is told to; an exception is raised.

    Attributes:
        generated, cancelled: request ids.
    """

    def __init__(self, address: str, fingerprint: str) -> None:
        self.address = address
        self.fingerprint = fingerprint
        self.policy: OpdError | Exception | PolicyId = POLICY
        self.generated: list[str] = []
        self.cancelled: list[str] = []
        self.ends: list[FinishReason | OpdError] = []  # of the next generations; then they stop
        self.lasts_s = 0.0

    async def get_policy(self) -> rollout_service_pb2.GetPolicyResponse:
        if isinstance(self.policy, Exception):
            raise self.policy
        limits = rollout_service_pb2.RolloutLimits(max_slots=4, grammars=True)
        return rollout_service_pb2.GetPolicyResponse(
            policy=policy_to_proto(self.policy), tokenizer_fingerprint=self.fingerprint, limits=limits
        )

    async def generate(self, spec: GenerateSpec, *, timeout_s: float) -> Trajectory:
        self.generated.append(spec.request_id)
        await asyncio.sleep(self.lasts_s)
        end = self.ends.pop(0) if self.ends else FinishReason.STOP
        if isinstance(end, OpdError):
            raise end
        ids = (*tiny_tokenizer().encode("1", add_special_tokens=False), EOS_ID)
        start = len(spec.prompt_token_ids)
        return Trajectory(
            spec.request_id,
            "judge",
            (*spec.prompt_token_ids, *ids),
            ((start, start + len(ids)),),
            policy_versions=(POLICY.version,) * len(ids),
            finish_reason=end,
            lineage=POLICY.lineage,
        )

    async def cancel(self, request_id: str, *, run_id: str = "") -> None:
        self.cancelled.append(request_id)

    async def close(self) -> None: ...


class House:
    """Judging with judges whose servers are :class:`Client`."""

    def __init__(self, addresses: Sequence[str], *, patience_s: float = 30.0) -> None:
        channel = ChannelConfig(connect_timeout_s=patience_s)
        config = {"model": "m", "judge": {"addresses": addresses, "channel": channel}}
        self.config = parse_config(GrmServerConfig, config, source="test")
        self.texts = Texts(tiny_tokenizer(), None)
        self.members = [Judge(address, channel, self.texts.fingerprint) for address in addresses]
        self.clients = {judge.address: Client(judge.address, self.texts.fingerprint) for judge in self.members}
        for judge in self.members:
            judge.client = self.clients[judge.address]  # type: ignore[assignment]

        async def nothing(serving: bool) -> None: ...

        self.judges = Judges(self.members, nothing)
        self.judging = Judging(self.config, self.judges, self.texts)

    def item(self, prompt: str = "1+1") -> CheckedItem:
        message = pb.JudgeItem(prompt=prompt, answers=["2"], rubric_name="r")
        return check_item(message, self.config, RubricLibrary([RUBRIC]))

    def in_order(self, item: CheckedItem) -> list[Client]:
        return [self.clients[address] for address in rendezvous_ranking(item.digest, self.clients)]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging_module, "RETRY_S", 0.0)


# --- who judges ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("problem", ["slow", "another tokenizer"])
async def test_the_next_judge_is_asked_where_the_first_cannot(problem: str) -> None:
    house = House(["a:1", "b:1"])
    item = house.item()
    first, second = house.in_order(item)
    if problem == "slow":
        first.policy = DeadlineError("a:1: DEADLINE_EXCEEDED")
    else:
        first.fingerprint = "other"
    async with asyncio.timeout(20):
        judged = await house.judging.judge(item)
    assert judged.verdicts[0].score == 1.0
    assert (len(first.generated), len(second.generated)) == (0, 1)


async def test_a_tokenizer_that_no_judge_has_is_told() -> None:
    house = House(["a:1", "b:1"])
    for client in house.clients.values():
        client.fingerprint = "other"
    async with asyncio.timeout(20):
        with pytest.raises(TokenizerMismatchError, match="has tokenizer other"):
            await house.judging.judge(house.item())


async def test_a_slow_answer_to_a_question_is_of_no_item() -> None:
    (judge,) = (house := House(["a:1"])).members
    house.clients["a:1"].policy = DeadlineError("DEADLINE_EXCEEDED")
    with pytest.raises(UnavailableError, match="a:1 does not answer"):
        await judge.policy_now()


async def test_who_was_not_asked_yet_keeps_his_place() -> None:
    house = House(["a:1", "b:1", "c:1"])
    item = house.item()
    expected = [client.address for client in house.in_order(item)]
    last = next(judge for judge in house.members if judge.address == expected[2])
    await last.policy_now()
    assert [judge.address for judge in house.judges.ranked(item.digest)] == expected
    first = next(judge for judge in house.members if judge.address == expected[0])
    house.clients[first.address].policy = UnavailableError("gone")
    with pytest.raises(UnavailableError):
        await first.policy_now()
    assert [judge.address for judge in house.judges.ranked(item.digest)] == [*expected[1:], expected[0]]
    house.clients[first.address].policy = POLICY
    await first.policy_now()
    assert [judge.address for judge in house.judges.ranked(item.digest)] == expected


async def test_a_defect_in_asking_one_judge_ends_no_watch(caplog: pytest.LogCaptureFixture) -> None:
    house = House(["a:1", "b:1"])
    house.clients["a:1"].policy = ValueError("not ours")
    house.judges.start()
    watching = house.judges._watching
    assert watching is not None
    async with asyncio.timeout(20):
        while not (watching.done() or (house.judges.ready and caplog.records)):
            await asyncio.sleep(0)
    assert not watching.done()
    assert [judge.failed for judge in house.members] == [True, False]
    assert any(record.exc_info and "a:1 cannot be asked" in record.message for record in caplog.records)
    await house.judges.close()


async def test_a_judge_that_breaks_off_now_and_then_is_not_gone() -> None:
    house = House(["a:1"], patience_s=0.001)
    (client,) = house.clients.values()
    client.lasts_s = 0.005  # longer than the patience with who is not there
    client.ends = [RolloutUnavailableError("broken")] * 4
    async with asyncio.timeout(20):
        judged = await house.judging.judge(house.item())
    assert judged.verdicts[0].score == 1.0
    assert len(client.generated) == 5
    client.policy = UnavailableError("gone")
    async with asyncio.timeout(20):
        with pytest.raises(UnavailableError, match="gone"):
            await house.judging.judge(house.item("2+2"))


# --- templates -------------------------------------------------------------------------------------------------
async def test_a_template_that_asks_more_of_a_text_than_ours_have_still_judges() -> None:
    house = House(["a:1"])
    (ballot,) = await house.texts.ballots(house.item())
    assert ballot.shared_tokens == 0
    assert tiny_tokenizer().decode(ballot.prompt_ids).startswith("<s>user: 1 2")


def test_templates_of_requests_are_refused_unless_they_are_wanted() -> None:
    config = parse_config(GrmServerConfig, {"model": "m"}, source="test")
    inline = pb.Rubric(name="r", template="{{ answer }}", criteria=[pb.Criterion(name="a", scale_max=1, weight=1)])
    with pytest.raises(PreconditionError, match="inline_templates"):
        check_item(pb.JudgeItem(prompt="p", answers=["a"], rubric_inline=inline), config, RubricLibrary([]))


# --- given up --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("unwanted", [True, False])
async def test_votes_are_cancelled_only_where_nobody_will_ask_again(unwanted: bool) -> None:
    house = House(["a:1"])
    (client,) = house.clients.values()
    client.lasts_s = 3600.0
    given_up = asyncio.Event()
    judging = asyncio.create_task(house.judging.judge(house.item(), given_up))
    async with asyncio.timeout(20):
        while not client.generated:
            await asyncio.sleep(0)
        if unwanted:
            given_up.set()
        judging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await judging
        await asyncio.gather(*house.judging._cancelling)
    assert client.cancelled == (client.generated if unwanted else [])


async def test_a_vote_that_was_given_up_is_written_anew() -> None:
    house = House(["a:1"])
    (client,) = house.clients.values()
    client.ends = [FinishReason.CANCELLED]
    judged = await house.judging.judge(house.item())
    assert judged.verdicts[0].samples_parsed == 1
    assert len(set(client.generated)) == 2
    assert judged.votes[0].request_id == client.generated[1]
    client.ends = [FinishReason.CANCELLED] * 9  # somebody insists
    judged = await house.judging.judge(house.item("2+2"))
    assert "cancelled on the rollout server" in judged.verdicts[0].failure
    assert len(client.generated) == 5


async def test_only_what_the_client_gives_up_by_name_is_unwanted() -> None:
    unwanted: dict[str, asyncio.Event] = {}

    async def judge(item: pb.JudgeItem, given_up: asyncio.Event) -> pb.JudgeResponse:
        unwanted[item.prompt] = given_up
        await asyncio.Event().wait()
        raise AssertionError

    async def messages() -> Any:
        for name in ("a", "b"):
            yield pb.JudgeBatchRequest(item=pb.JudgeBatchItem(item_id=name, item=pb.JudgeItem(prompt=name)))
        while len(unwanted) < 2:
            await asyncio.sleep(0)
        yield pb.JudgeBatchRequest(cancel_item_id="a")
        await asyncio.Event().wait()

    call = BatchCall(judge, credits=4, idle_timeout_s=60.0, max_message_bytes=1 << 20)
    answers = call.answers(messages())
    async with asyncio.timeout(20):
        assert (await anext(answers)).credits == 4
        assert (await anext(answers)).item_id == "a"
        await answers.aclose()  # the connection breaks
    assert {name: event.is_set() for name, event in unwanted.items()} == {"a": True, "b": False}
