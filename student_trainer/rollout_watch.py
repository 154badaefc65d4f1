"""An eye on the rollout servers: who has lost the policy, and how long they stood idle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from opd.v1 import rollout_service_pb2

from opd_mesh.clients.rollout import RolloutClient
from opd_mesh.convert import policy_from_proto
from opd_mesh.errors import OpdError
from opd_mesh.policy import PolicyId

log = logging.getLogger("student_trainer")
WATCH_INTERVAL_S = 1.0
LOOK_TIMEOUT_S = 5.0  # a server that is busy or gone must not hold up who only looks


def lacks_policy(served: PolicyId | None, current: PolicyId) -> bool:
    """Whether a server must be given the current policy again.

    One that another run has taken over is left alone: two trainers would take it from each other for ever.
    """
    if served is None:
        return True
    return served.run_id == current.run_id and (served.lineage, served.version) < (current.lineage, current.version)


class RolloutWatch:
    """Of all rollout servers of a run."""

    def __init__(self, clients: Sequence[RolloutClient]) -> None:
        self._clients = clients
        self._idle_s: dict[str, float] = {}

    async def _look(self, client: RolloutClient) -> rollout_service_pb2.GetPolicyResponse | None:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                return await client.get_policy()
        except (OpdError, TimeoutError):
            return None  # being restarted, or out of reach: its requests' own time-outs decide

    async def lacking(self, current: PolicyId) -> list[str]:
        """Addresses of the servers that answer, and do not hold the policy that they were given."""
        answers = await asyncio.gather(*map(self._look, self._clients))
        return [
            client.address
            for client, answer in zip(self._clients, answers, strict=True)
            if answer is not None
            and lacks_policy(policy_from_proto(answer.policy) if answer.HasField("policy") else None, current)
        ]

    async def give_again(
        self,
        *,
        is_needed: Callable[[], bool],
        current: Callable[[], PolicyId | None],
        give: Callable[[], Awaitable[None]],
    ) -> None:
        """Until cancelled: while requests wait, see that no server is without the policy.

        Args:
            is_needed: whether requests wait.
            current: the policy that all servers were given last.
            give: gives it again.
        """
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            policy = current()
            if policy is None or not is_needed():
                continue
            if lost := await self.lacking(policy):
                log.warning("rollout server %s has lost the policy and is given it again", ", ".join(lost))
                try:
                    await give()
                except OpdError as error:
                    log.warning("giving the policy again: %s", error)

    async def take_idle_s(self) -> float:
        """Seconds that the engines had nothing to do since the last call, summed over the servers that answer."""
        total = 0.0
        answers = await asyncio.gather(*map(self._look, self._clients))
        for client, answer in zip(self._clients, answers, strict=True):
            if answer is None:
                continue
            now, before = answer.load.idle_s, self._idle_s.get(client.address)
            self._idle_s[client.address] = now
            if before is not None:
                total += now - before if now >= before else now  # a server that was restarted counts from 0
        return total
