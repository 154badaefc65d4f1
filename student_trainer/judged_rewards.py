"""Rewards that a generative reward model gives: the responses of a group are judged together, by one judge version."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from opd.v1 import generative_reward_service_pb2 as pb

from opd_mesh.clients.reward import RewardClient
from opd_mesh.config.judging import GrmReward
from opd_mesh.config.recipe import Recipe
from opd_mesh.convert import policy_from_proto
from opd_mesh.errors import ConfigError, OpdError, UnavailableError, VerifierError
from opd_mesh.judging.messages import rubric_to_proto
from opd_mesh.rendering import split_reasoning
from opd_mesh.trajectory import FinishReason, Trajectory
from student_trainer.answers import CANCELLED
from student_trainer.rewards import Judged, Reward, reward_of
from student_trainer.tasks import Domain, Grade, Prompt
from student_trainer.tasks.judging import open_rubric
from student_trainer.tasks.verifiers import MAX_REASON, ROUNDING

log = logging.getLogger("student_trainer")
NO_ANSWER = Grade(0.0, parsed=False)
# For the way there and back: the server's time for an item ends first, and it says what kept it.
ANSWER_S = 10.0


class JudgeClient(Protocol):
    """What is needed of :class:`~opd_mesh.clients.reward.RewardClient`."""

    async def wait_ready(self) -> None:
        """Raises :class:`UnavailableError`."""
        ...

    async def get_judge(self) -> pb.GetJudgeResponse:
        """By which rubrics it judges."""
        ...

    async def judge_many(self, items: Sequence[pb.JudgeItem], *, timeout_s: float) -> list[pb.JudgeResponse | OpdError]:
        """In the order of the items."""
        ...

    async def close(self) -> None:
        """Nothing more is judged."""
        ...


@dataclass(frozen=True, slots=True)
class JudgedDomain:
    """How the responses of a domain are rewarded; ``rubric`` None: by the name that the server knows."""

    domain: Domain
    reward: GrmReward
    rubric: pb.Rubric | None


@dataclass(slots=True, eq=False)
class _Group:
    prompt: Prompt
    responses: list[Trajectory] = field(default_factory=list)
    judging: asyncio.Task[dict[str, Reward]] | None = None


def open_judge(recipe: Recipe, domains: Iterable[Domain]) -> GroupJudge | None:
    """The judge of a recipe; None where it rewards nothing by one.

    Raises:
        ConfigError: there is no server to ask, or a rubric cannot be read.
    """
    wanted = recipe.judged_domains
    if not wanted:
        return None
    peers = recipe.grm.peers
    if not peers.addresses:
        raise ConfigError("names no reward model", field="grm.peers.addresses")
    judged = []
    for domain in domains:
        if domain.name not in wanted or (reward := domain.config.reward) is None:
            continue
        rubric = None
        if not isinstance(reward.rubric, str):
            rubric = rubric_to_proto(open_rubric(reward.rubric, f"domains.{domain.name}.reward.rubric"))
        judged.append(JudgedDomain(domain, reward, rubric))
    return GroupJudge(
        judged,
        [RewardClient(address, peers.channel) for address in peers.addresses],
        group_size=recipe.batch.responses_per_prompt,
        # As for a response: what is asked for ahead queues behind what was asked for before.
        timeout_s=recipe.rollout.timeout_s * (1 + recipe.max_staleness),
    )


class GroupJudge:
    """Sends every group as one item as soon as it is whole, or when its rewards are wanted. For one event loop.

    Args:
        group_size: responses of a whole group.
        timeout_s: for the judgement of a group.
    """

    def __init__(
        self, domains: Iterable[JudgedDomain], clients: Sequence[JudgeClient], *, group_size: int, timeout_s: float
    ) -> None:
        self._domains = {one.domain.name: one for one in domains}
        self._clients = list(clients)
        self._ready = [asyncio.Lock() for _ in self._clients]
        self._checked: set[int] = set()  # clients that answer and have the rubrics
        self._group_size = group_size
        self._timeout_s = timeout_s
        self._open: dict[tuple[str, int], _Group] = {}  # that are not sent
        self._group_of: dict[str, _Group] = {}
        self._told: set[str] = set()  # domains of which something was not judged

    def judges(self, domain: str) -> bool:
        """Whether a domain's responses are judged here."""
        return domain in self._domains

    def ask(self, prompt: Prompt, trajectory: Trajectory) -> None:
        """Have a response judged with the others of its prompt."""
        group = self._open.setdefault((prompt.domain, prompt.index), _Group(prompt))
        group.responses.append(trajectory)
        self._group_of[trajectory.trajectory_id] = group
        if len(group.responses) == self._group_size:
            self._send(group)

    def _send(self, group: _Group) -> asyncio.Task[dict[str, Reward]]:
        del self._open[group.prompt.domain, group.prompt.index]
        group.judging = asyncio.create_task(self._judged(group))
        return group.judging

    async def take(self, trajectory_ids: Sequence[str]) -> list[Reward]:
        """Rewards of one group's responses, each once; a group that is not whole is judged as it is.

        Raises:
            VerifierError: the server is out of reach for as long as its channel allows.
            ConfigError: a server does not know the rubric.
        """
        (group,) = {self._group_of.pop(name) for name in trajectory_ids}
        rewards = await (group.judging or self._send(group))
        return [rewards[name] for name in trajectory_ids]

    # --- one group ---------------------------------------------------------------------------------------------
    async def _judged(self, group: _Group) -> dict[str, Reward]:
        of = self._domains[group.prompt.domain]
        # Not in the order of arrival, on which nothing may depend.
        responses = sorted(group.responses, key=lambda one: one.trajectory_id)
        answers = await asyncio.to_thread(lambda: [_answer(of.domain, response) for response in responses])
        shown = [answer for answer in answers if isinstance(answer, str)]
        found: list[tuple[Grade, Judged | None]] = []
        if shown:
            item = await asyncio.to_thread(_item, of, group.prompt, shown)
            item.timeout.FromMilliseconds(round(self._timeout_s * 1000))
            found = _read(await self._ask(item, group.prompt.index % len(self._clients)), len(shown))
        rewards = {}
        for response, answer in zip(responses, answers, strict=True):
            grade, judged = (answer, None) if isinstance(answer, Grade) else found.pop(0)
            rewards[response.trajectory_id] = replace(reward_of(of.domain, response, grade), judged=judged)
            if grade.failure is not None and grade is not CANCELLED:
                self._tell(of.domain.name, grade.failure)
        return rewards

    def _tell(self, domain: str, failure: str) -> None:
        if domain not in self._told:
            self._told.add(domain)
            log.warning("domain %s: a response has no score, for %s (told once, then only counted)", domain, failure)

    async def _ask(self, item: pb.JudgeItem, place: int) -> pb.JudgeResponse | OpdError:
        try:
            await self._check(place)
            (response,) = await self._clients[place].judge_many([item], timeout_s=self._timeout_s + ANSWER_S)
            if isinstance(response, UnavailableError) and not await self._is_there(place):
                raise response
        except UnavailableError as error:
            raise VerifierError(
                f"{error.message}. Without the reward model there are no rewards, so there is nothing to learn from; "
                "start it, then `opd run --resume`",
                field="grm",
            ) from error
        return response

    async def _is_there(self, place: int) -> bool:
        """Whether a server answers though it has not judged an item, so that others may fare better."""
        try:
            await self._clients[place].get_judge()
        except OpdError:
            return False
        return True

    async def _check(self, place: int) -> None:
        """Once for each server: it is there, knows the rubrics that are named, and takes those that are brought."""
        async with self._ready[place]:
            if place in self._checked:
                return
            await self._clients[place].wait_ready()
            judge = await self._clients[place].get_judge()
            versions = [rubric.name for rubric in judge.rubrics]
            known = {*versions, *(version.partition("@")[0] for version in versions)}
            for name, one in self._domains.items():
                field = f"domains.{name}.reward.rubric"
                if one.rubric is None and one.reward.rubric not in known:
                    listed = ", ".join(versions) or "none"
                    raise ConfigError(
                        f"{field}: the GRM has no rubric {one.reward.rubric!r}; it has {listed}", field=field
                    )
                if one.rubric is not None and not judge.inline_templates and _has_template(one.rubric):
                    raise ConfigError(
                        f"{field}: the rubric has a template of its own, and the GRM takes none from requests; put its "
                        "file among those of the server and name it here, or set inline_templates there",
                        field=field,
                    )
            self._checked.add(place)

    async def close(self) -> None:
        """Let go of what nobody waits for."""
        tasks = {group.judging for group in self._group_of.values() if group.judging is not None}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._open.clear()
        self._group_of.clear()
        for client in self._clients:
            await client.close()


def _has_template(rubric: pb.Rubric) -> bool:
    return bool(rubric.template or rubric.pairwise_template)


def _answer(domain: Domain, response: Trajectory) -> str | Grade:
    """What is judged of a response; or its grade, where there is nothing to judge."""
    if response.finish_reason is FinishReason.CANCELLED:
        return CANCELLED
    answer = split_reasoning(domain.text(response.scored_token_ids), domain.effort.closing).answer
    return (answer or "").strip() or NO_ANSWER


def _item(of: JudgedDomain, prompt: Prompt, answers: Sequence[str]) -> pb.JudgeItem:
    domain, reward = of.domain, of.reward
    item = domain.item(prompt)
    message = pb.JudgeItem(
        prompt=domain.question(item), answers=answers, samples=reward.samples, mode=pb.JUDGE_MODE_POINTWISE
    )
    if of.rubric is not None:
        message.rubric_inline.CopyFrom(of.rubric)
    else:
        message.rubric_name = str(reward.rubric)
    if reward.reference == "answer":
        reference = domain.gold_answer(item)
        if reference is None:
            raise ConfigError(
                f"item {prompt.index} has no gold answer to show the judge; set reference to none",
                field=f"domains.{domain.name}.reward.reference",
            )
        message.reference = reference
    return message


def _read(response: pb.JudgeResponse | OpdError, count: int) -> list[tuple[Grade, Judged | None]]:
    """A grade for each answer, and what is known of its judgement."""
    failed = partial(Grade, None, parsed=False)
    if isinstance(response, OpdError):
        return [(failed(failure=f"it was not judged: {response.message}"[:MAX_REASON]), None)] * count
    if len(response.verdicts) != count:
        return [(failed(failure=f"the judge gave {len(response.verdicts)} verdicts on {count} answers"), None)] * count
    if not response.HasField("judge"):
        return [(failed(failure="the judge is not named, so nobody knows whether one judged all"), None)] * count
    judge = policy_from_proto(response.judge)
    found: list[tuple[Grade, Judged | None]] = []
    for verdict in response.verdicts:
        judged = Judged(
            judge, verdict.score_variance, verdict.samples_asked, verdict.samples_asked - verdict.samples_parsed
        )
        if verdict.failure or not verdict.samples_parsed:
            grade = failed(failure=(verdict.failure or "no vote was a verdict")[:MAX_REASON])
        elif not (math.isfinite(verdict.score) and -ROUNDING <= verdict.score <= 1 + ROUNDING):
            grade = failed(failure=f"the judge gave {verdict.score}, outside [0, 1]")
        else:
            grade = Grade(min(1.0, max(0.0, verdict.score)), parsed=True)
        found.append((grade, judged))
    return found
