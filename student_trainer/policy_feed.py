"""The newest policy, on its way to every rollout server, and again to one that was restarted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from opd_mesh.clients.rollout import RolloutClient
from opd_mesh.errors import OpdError
from student_trainer.rollouts import Rollouts
from student_trainer.run_state import RunState

log = logging.getLogger("student_trainer")
WATCH_INTERVAL_S = 1.0
WATCH_BACKOFF_S = 30.0  # at most, between attempts to give the policy again that keep failing

# Sends the present weights to these servers (None: to all) and returns the seconds that decoding stood still.
Push = Callable[[Sequence[RolloutClient] | None], Awaitable[float]]


class PolicyFeed:
    """Between the weights, which it sends as they lie, without a copy, and the servers. For one event loop.

    A copy would cost the student's size in memory and buy nothing: the next update waits for its samples and computes
    its gradients, which only reads, for longer than a policy takes to arrive.

    Args:
        push: sets ``state.policy`` where it sends to all.
        on_failure: told when the watch over the servers ends for a reason that is none of theirs.

    Attributes:
        weights_are_whole: False while, and for ever if, a change of the weights is not complete: what they are then
            must become neither a policy nor a checkpoint.
        swap_s: that decoding stood still for the policy that was given to all last.
    """

    def __init__(
        self, push: Push, rollouts: Rollouts, state: RunState, *, on_failure: Callable[[Exception], None]
    ) -> None:
        self._push = push
        self._rollouts = rollouts
        self._state = state
        self._on_failure = on_failure
        self._weights = asyncio.Lock()  # held by who sends them, and by who changes them
        self.weights_are_whole = True
        self._giving: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self.dropped = False
        self.swap_s = 0.0

    @property
    def served_version(self) -> int:
        """That every server has been given."""
        assert self._state.policy is not None  # given before the first step
        return self._state.policy.version

    async def give(self) -> None:
        """To every server, while nobody changes the weights; to none once it does not matter any more."""
        async with self._weights:
            if self.weights_are_whole and not self.dropped:
                self.swap_s = await self._push(None)

    def give_ahead(self, then: Callable[[], None]) -> None:
        """The same while the caller goes on; ``then`` is called when every server has it."""

        async def give() -> None:
            await self.give()
            then()

        if not self.dropped:
            self._giving = asyncio.create_task(give())

    async def given(self) -> None:
        """Every server holds the newest policy, or it was dropped. Raises what kept it back."""
        if self._giving is None:
            return
        giving = self._giving
        try:
            await giving
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not (self.dropped and giving.cancelled()) or (task is not None and task.cancelling()):
                raise
        if self._giving is giving:
            self._giving = None

    def drop(self) -> None:
        """Whatever is on its way, or would be sent later, does not matter any more: :meth:`close` awaits its end."""
        self.dropped = True
        for task in (self._watching, self._giving):
            if task is not None:
                task.cancel()

    async def close(self) -> None:
        """Stop giving and watching."""
        self.drop()
        tasks = [task for task in (self._watching, self._giving) if task is not None]
        self._watching = self._giving = None
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(error, Exception):  # the run has ended for another reason, or did not need it
                log.warning("while the policy was given away: %s", error)

    @asynccontextmanager
    async def changing_weights(self) -> AsyncIterator[None]:
        """Nobody sends the weights meanwhile, nor ever again if this fails. Begins when what is on its way is there."""
        await self.given()
        async with self._weights:
            self.weights_are_whole = False
            yield
            self.weights_are_whole = True

    # --- servers that were restarted ---------------------------------------------------------------------------
    def watch(self) -> None:
        """From now on a server that loses the policy while requests wait is given it again."""

        def ended(watching: asyncio.Task[None]) -> None:
            if not watching.cancelled() and isinstance(error := watching.exception(), Exception):
                self._on_failure(error)

        if not self.dropped:
            self._watching = asyncio.create_task(self._watch())
            self._watching.add_done_callback(ended)

    async def _watch(self) -> None:
        wait_s = WATCH_INTERVAL_S
        while True:
            await asyncio.sleep(wait_s)
            try:
                if self._rollouts.outstanding:
                    await self._give_again()
            except OpdError as error:  # that server's requests have time-outs of their own
                wait_s = min(2 * wait_s, WATCH_BACKOFF_S)
                log.warning("giving the policy again: %s; once more in %g s", error, wait_s)
            else:
                wait_s = WATCH_INTERVAL_S

    async def _give_again(self) -> None:
        assert self._state.policy is not None  # given before the watch began
        if not (lost := await self._rollouts.watch.lacking(self._state.policy)):
            return
        async with self._weights:
            # A policy that was on its way may have reached them.
            if self.weights_are_whole and (lost := await self._rollouts.watch.lacking(self._state.policy, lost)):
                names = ", ".join(client.address for client in lost)
                log.warning("rollout server %s has lost the policy and is given it again", names)
                await self._push(lost)
