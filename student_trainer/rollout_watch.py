"""An eye on the rollout servers: who has lost the policy, and how long they stood idle."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from opd.v1 import rollout_service_pb2

from opd_mesh.clients.rollout import RolloutClient
from opd_mesh.convert import policy_from_proto
from opd_mesh.errors import OpdError
from opd_mesh.policy import PolicyId

LOOK_TIMEOUT_S = 5.0  # a server that is busy or gone must not hold up who only looks


def lacks_policy(served: PolicyId | None, current: PolicyId) -> bool:
    """Whether a server must be given the current policy again.

    One that another run has taken over is left alone: two trainers would take it from each other for ever.
    """
    if served is None:
        return True
    return served.run_id == current.run_id and (served.lineage, served.version) < (current.lineage, current.version)


class RolloutWatch:
    """Of all rollout servers of a run. For one event loop."""

    def __init__(self, clients: Sequence[RolloutClient]) -> None:
        self._clients = clients
        self._told_s: dict[str, float] = {}  # by address, the idle time that a server told last
        self._idle_s = 0.0
        self._looks: dict[str, asyncio.Task[None]] = {}

    async def _look(self, client: RolloutClient) -> rollout_service_pb2.GetPolicyResponse | None:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                return await client.get_policy()
        except (OpdError, TimeoutError):
            return None  # being restarted, or out of reach: its requests' own time-outs decide

    async def lacking(self, current: PolicyId, clients: Sequence[RolloutClient] | None = None) -> list[RolloutClient]:
        """The servers (of these) that answer, and do not hold the policy that they were given."""
        asked = self._clients if clients is None else clients
        answers = await asyncio.gather(*map(self._look, asked))
        return [
            client
            for client, answer in zip(asked, answers, strict=True)
            if answer is not None
            and lacks_policy(policy_from_proto(answer.policy) if answer.HasField("policy") else None, current)
        ]

    # --- idle time ---------------------------------------------------------------------------------------------
    def look(self) -> None:
        """Ask every server how long it has stood idle, unless an answer to that is still due; nobody waits for it."""
        for client in self._clients:
            last = self._looks.get(client.address)
            if last is None or last.done():
                self._looks[client.address] = asyncio.create_task(self._add_idle_s(client))

    async def _add_idle_s(self, client: RolloutClient) -> None:
        if (answer := await self._look(client)) is None:
            return
        now, before = answer.load.idle_s, self._told_s.get(client.address)
        self._told_s[client.address] = now
        if before is not None:
            self._idle_s += now - before if now >= before else now  # a server that was restarted counts from 0

    async def start_over(self) -> None:
        """What the servers were idle up to now is of no account."""
        self.look()
        if self._looks:  # a run whose student does not write has no servers
            await asyncio.wait(self._looks.values())
        self._idle_s = 0.0

    def take_idle_s(self) -> float:
        """Seconds that the engines had nothing to do, summed over the servers, as told since the last call."""
        taken, self._idle_s = self._idle_s, 0.0
        return taken

    async def close(self) -> None:
        """Ask no more."""
        for look in self._looks.values():
            look.cancel()
        await asyncio.gather(*self._looks.values(), return_exceptions=True)
