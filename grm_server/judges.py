"""Who judges: rollout servers, what each serves at the moment, and which of them gets an item."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from opd_mesh.clients.replica_choice import rendezvous_ranking
from opd_mesh.clients.rollout import RolloutClient
from opd_mesh.config.services import ChannelConfig
from opd_mesh.convert import policy_from_proto
from opd_mesh.errors import DeadlineError, NoPolicyError, OpdError, TokenizerMismatchError, UnavailableError
from opd_mesh.policy import PolicyId

log = logging.getLogger("grm_server")
WATCH_S = 0.5
# Between two questions for the policy, which all items that begin or end meanwhile share.
ASK_EVERY_S = 0.01
# Votes that are asked for at once, over slots of the engine: enough to fill it, and the queue is left to others.
VOTES_PER_SLOT = 2


class Judge:
    """One rollout server. For one event loop.

    Attributes:
        policy: what it served when it was asked last; None where it serves none, does not answer, or was never asked.
        failed: when it was asked last it could not judge.
        constrained: whether verdicts are decoded under a grammar: as it is wanted, where the server's engine can.
    """

    def __init__(
        self, address: str, channel: ChannelConfig, tokenizer_fingerprint: str, *, constrained: bool = True
    ) -> None:
        self.client = RolloutClient(address, channel)
        self.policy: PolicyId | None = None
        self.failed = False
        self.constrained = constrained
        self._wanted = constrained
        self._fingerprint = tokenizer_fingerprint
        self._places = asyncio.Semaphore(1)
        self._num_places = 0
        self._asking: asyncio.Task[PolicyId] | None = None
        self._next: asyncio.Task[PolicyId] | None = None

    @property
    def address(self) -> str:
        """Of the server."""
        return self.client.address

    @property
    def places(self) -> asyncio.Semaphore:
        """One for each vote that may be asked for at once."""
        return self._places

    async def policy_now(self) -> PolicyId:
        """What is served; asked of the server after this call began, by one question for all who want to know.

        Raises:
            NoPolicyError, UnavailableError: it serves none, or does not answer.
            TokenizerMismatchError: it has another tokenizer than ours.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._ask_behind(self._asking))
            self._next.add_done_callback(_retrieve)
        return await asyncio.shield(self._next)

    async def _ask_behind(self, earlier: asyncio.Task[PolicyId] | None) -> PolicyId:
        if earlier is not None and not earlier.done():
            await asyncio.wait({earlier})
            await asyncio.sleep(ASK_EVERY_S)
        self._asking, self._next = self._next, None  # who comes now is too late for this one
        try:
            self.policy = await self._ask()
        except Exception:
            self.policy, self.failed = None, True
            raise
        self.failed = False
        return self.policy

    async def _ask(self) -> PolicyId:
        try:
            response = await self.client.get_policy()
        except DeadlineError as error:  # of this question, and not of the items that wait for it
            raise UnavailableError(f"the rollout server {self.address} does not answer: {error}") from error
        if response.tokenizer_fingerprint != self._fingerprint:
            raise TokenizerMismatchError(
                f"the rollout server {self.address} has tokenizer {response.tokenizer_fingerprint[:16]}…, the "
                f"judge's model here has {self._fingerprint[:16]}…: give `model` the folder that it serves",
                field="model",
            )
        constrained = self._wanted and response.limits.grammars
        if self.constrained and not constrained:
            log.warning(
                "the engine of the rollout server %s takes no grammars: verdicts are written freely, and those that do "
                "not parse are refused",
                self.address,
            )
        self.constrained = constrained
        if not self._num_places:
            self._num_places = VOTES_PER_SLOT * max(1, response.limits.max_slots)
            self._places = asyncio.Semaphore(self._num_places)
        if not response.HasField("policy"):
            raise NoPolicyError(f"the rollout server {self.address} holds no policy yet", retry_delay_s=1.0)
        return policy_from_proto(response.policy)


class Judges:
    """All of them.

    Args:
        on_change: called, at first and whenever it changes, with whether anybody can judge.
    """

    def __init__(self, judges: Sequence[Judge], on_change: Callable[[bool], Awaitable[None]]) -> None:
        self._judges = {judge.address: judge for judge in judges}
        self._on_change = on_change
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch them."""
        self._watching = asyncio.create_task(self._watch())

    @property
    def ready(self) -> Judge | None:
        """The first that can judge."""
        return next((judge for judge in self._judges.values() if judge.policy is not None), None)

    def ranked(self, item_digest: str) -> list[Judge]:
        """In the order in which they are asked for an item: those that failed when they were asked come last.

        Who was not asked yet keeps his place: the votes that an earlier process asked of him are there.
        """
        ranking = [self._judges[address] for address in rendezvous_ranking(item_digest, self._judges)]
        return sorted(ranking, key=lambda judge: judge.failed)

    async def _watch(self) -> None:
        told: bool | None = None
        problems: dict[str, str] = {}
        while True:
            await asyncio.gather(*(self._look(judge, problems) for judge in self._judges.values()))
            ready = self.ready is not None
            if ready != told:
                told = ready
                await self._on_change(ready)
            await asyncio.sleep(WATCH_S)

    async def _look(self, judge: Judge, problems: dict[str, str]) -> None:
        problem = ""
        try:
            policy = await judge.policy_now()
        except OpdError as error:
            problem = str(error)
        except Exception as error:  # a defect of ours must not end the watch over all of them
            problem = f"{judge.address}: {type(error).__name__}: {error}"
            if problem != problems.get(judge.address):
                log.exception("the rollout server %s cannot be asked", judge.address)
        if problem != problems.get(judge.address):
            if problem:
                log.warning("cannot judge: %s", problem)
            else:
                log.info("%s judges with policy %s", judge.address, policy)
            problems[judge.address] = problem

    async def close(self) -> None:
        """Let go of them."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        for judge in self._judges.values():
            await judge.client.close()


def _retrieve(task: asyncio.Task[PolicyId]) -> None:
    """Who asked may have gone; the error is nobody's then."""
    if not task.cancelled():
        task.exception()
