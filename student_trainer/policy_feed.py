"""The newest policy, on its way to every rollout server, and again to one that was restarted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from student_trainer.rollouts import Rollouts
from student_trainer.run_state import RunState

log = logging.getLogger("student_trainer")


class PolicyFeed:
    """Between the weights, which it sends as they lie, without a copy, and the servers. For one event loop.

    A copy would cost the student's size in memory and buy nothing: the next update waits for its samples and computes
    its gradients, which only reads, for longer than a policy takes to arrive.

    Args:
        push: sends the present weights to every server, sets ``state.policy``, and returns the seconds that decoding
            stood still.
    """

    def __init__(self, push: Callable[[], Awaitable[float]], rollouts: Rollouts, state: RunState) -> None:
        self._push = push
        self._rollouts = rollouts
        self._state = state
        self._weights = asyncio.Lock()  # held by who sends them, and by who changes them
        self._changed_by_halves = False
        self._giving: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self.swap_s = 0.0  # that decoding stood still for the policy given last

    @property
    def served_version(self) -> int:
        """That every server has been given."""
        assert self._state.policy is not None  # given before the first step
        return self._state.policy.version

    async def give(self) -> None:
        """To every server, while nobody changes the weights."""
        async with self._weights:
            self.swap_s = await self._push()

    def give_ahead(self, then: Callable[[], None]) -> None:
        """The same while the caller goes on; ``then`` is called when every server has it."""

        async def give() -> None:
            await self.give()
            then()

        self._giving = asyncio.create_task(give())

    async def given(self) -> None:
        """Every server holds the newest policy. Raises what kept it back."""
        if self._giving is not None:
            await self._giving
            self._giving = None

    def drop(self) -> None:
        """Whatever is on its way does not matter any more."""
        if self._giving is not None:
            self._giving.cancel()
            self._giving = None

    @asynccontextmanager
    async def changing_weights(self) -> AsyncIterator[None]:
        """Nobody sends the weights meanwhile, nor ever again if this fails: they may be between two versions."""
        async with self._weights:
            self._changed_by_halves = True
            yield
            self._changed_by_halves = False

    # --- servers that were restarted ---------------------------------------------------------------------------
    def watch(self) -> None:
        """From now on a server that loses the policy while requests wait is given it again."""
        self._watching = asyncio.create_task(
            self._rollouts.watch.give_again(
                is_needed=lambda: self._rollouts.outstanding > 0,
                current=lambda: self._state.policy,
                give=self._give_again,
            )
        )

    async def _give_again(self) -> None:
        async with self._weights:
            policy = self._state.policy
            # A policy that was on its way may have reached them.
            if not self._changed_by_halves and policy is not None and await self._rollouts.watch.lacking(policy):
                await self._push()

    async def close(self) -> None:
        """Stop giving and watching."""
        for task in (self._watching, self._giving):
            if task is not None:
                task.cancel()
                (error,) = await asyncio.gather(task, return_exceptions=True)
                if isinstance(error, Exception):  # the run has ended for another reason, or did not need it
                    log.warning("while the policy was given away: %s", error)
