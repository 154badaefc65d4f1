"""The life of every request of a server: admitted, written, logged, delivered, and found again after a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from opd.v1 import rollout_service_pb2
from torch import Tensor

from opd_mesh.errors import (
    BeyondLogError,
    InternalError,
    LogFullError,
    NoPolicyError,
    OpdError,
    OverloadedError,
    PreconditionError,
    TokenizerMismatchError,
    UnavailableError,
)
from opd_mesh.policy import PolicyId
from opd_mesh.stream import TrajectoryStream
from opd_mesh.trajectory import FinishReason
from rollout_server.delivery import Delivery
from rollout_server.driver import EngineDriver
from rollout_server.engine import GenerationRequest, RolloutEngine, TokenEvent
from rollout_server.request_log import RequestLog, generation_request
from rollout_server.requests import RequestParams, RequestState, RequestTable
from rollout_server.token_log import TokenLog

log = logging.getLogger("rollout_server")
ResultT = TypeVar("ResultT")
RETRY_DELAY_S = 2.0


class Generations:
    """All requests of one engine.

    Args:
        token_log: None: requests do not survive the process.
        max_slots, max_waiting: requests that decode at once, and that may wait behind them.
        stream_of: the Redis stream of a run.
        on_failure: called when the decode loop has ended by itself; the process should follow.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        *,
        token_log: TokenLog | None,
        tokenizer_fingerprint: str,
        finished_kept: int,
        max_slots: int,
        max_waiting: int,
        stream_of: Callable[[str], TrajectoryStream],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.engine = engine
        self.log = RequestLog(token_log)
        self.table = RequestTable(finished_kept=finished_kept, on_forgotten=self.log.forgotten)
        self._fingerprint = tokenizer_fingerprint
        self._max_slots = max_slots
        self._max_waiting = max_waiting
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[Any]] = set()
        self._delivery = Delivery(stream_of, delivered=self._delivered, fail=self._fail, keep=self._keep)
        self._recovered: list[RequestState] = []  # unfinished, until there is a policy to go on with
        self.driver = EngineDriver(
            engine,
            record=lambda events: self.log.record(events, self.table.lookup),
            on_events=self._on_events,
            on_failure=self._on_engine_failure,
        )

    # --- before the first policy -------------------------------------------------------------------------------
    def recover(self, states: Iterable[RequestState]) -> None:
        """Take over what a log holds. What is finished can be read at once, the rest goes on with the next policy."""
        finished = []
        for state in states:
            earlier = self.table.lookup(state.params.key)
            if earlier is not None:  # forgotten, but that could not be logged, and then asked for anew
                self._recovered = [other for other in self._recovered if other is not earlier]
                self.table.drop(earlier)
            self.table.add(state)
            if state.ended:
                self.table.mark_ended(state)
            elif state.finish_reason is not None:
                finished.append(state)
            elif state.params.tokenizer_fingerprint != self._fingerprint:
                self._fail(state, TokenizerMismatchError("the log was written with another tokenizer"))
            else:
                self._recovered.append(state)
        self._end(finished)
        if self._recovered:
            tokens = sum(len(state.tokens) for state in self._recovered)
            log.info("%d unfinished requests with %d tokens recovered", len(self._recovered), tokens)

    @property
    def recovered_unfinished(self) -> bool:
        """Requests wait for the first policy."""
        return bool(self._recovered)

    def submit_recovered(self, kv: Mapping[int, Mapping[str, Tensor]]) -> list[tuple[RequestState, OpdError]]:
        """In the engine's thread, with the first policy: all go on, in the order in which they came.

        Args:
            kv: keys and values by the log's handle, for those that have some.

        Returns:
            What the engine refuses.
        """
        waiting, self._recovered = self._recovered, []
        refused = []
        for state in waiting:
            if state.finish_reason is not None or state.error is not None:
                continue  # cancelled meanwhile
            try:
                self.engine.submit(generation_request(state), kv.get(state.handle))
            except OpdError as error:
                refused.append((state, error))
            except Exception as error:  # of this one; the policy is in place, and the others go on
                log.exception("request %s cannot go on", state.params.request_id)
                refused.append((state, InternalError(f"cannot go on: {error}")))
        return refused

    def outdated(self, policy: PolicyId) -> list[RequestState]:
        """What an earlier lineage of the policy's run, or another run, asked for to train on: nobody reads it."""
        return [
            state
            for state in self.table.undelivered()
            if state.params.publish and (state.params.run_id != policy.run_id or state.lineage < policy.lineage)
        ]

    async def end_outdated(self, policy: PolicyId) -> None:
        """The policy is served: let go of them."""
        outdated = self.outdated(policy)
        if not outdated:
            return
        for state in outdated:
            self._fail(state, PreconditionError(f"its run was superseded by policy {policy}"))
            state.hurry()
        keys = [state.params.key for state in outdated]
        with suppress(UnavailableError):  # the loop has ended, and with it the requests
            await self.driver.call(lambda: [self.engine.cancel(key) for key in keys])

    def refuse(self, refused: Iterable[tuple[RequestState, OpdError]]) -> None:
        """End what :meth:`submit_recovered` gave back."""
        for state, error in refused:
            self._fail(state, error)

    # --- a request ---------------------------------------------------------------------------------------------
    async def attach(
        self,
        params: RequestParams,
        from_index: int,
        policy: PolicyId | None,
    ) -> tuple[RequestState, bool]:
        """(the request, whether it was known), begun where it is new.

        Raises:
            BeyondLogError: the client has seen more than is known here; a deterministic engine writes it again.
            RequestConflictError: the id is known with other parameters.
            NoPolicyError, OverloadedError, InvalidInputError: it cannot be begun.
        """
        state = self.table.find(params)
        attached = state is not None
        if state is None and policy is None:
            raise NoPolicyError("no policy has been given to this server yet", retry_delay_s=1.0)
        written = len(state.tokens) if state else 0
        if from_index > written and not self._writes_again(state, policy):
            # Of a request that was taken over only what was found is sure to be what the client has.
            raise _beyond(from_index, (state.recovered if state else 0) or written)
        if state is None:
            assert policy is not None  # refused above
            state = await self._begin(params, policy)
        elif state.error is not None:
            self._try_again(state)
        return state, attached

    def _writes_again(self, state: RequestState | None, policy: PolicyId | None) -> bool:
        """Whether the tokens that a client saw, and the log lost, will come out the same: a deterministic engine, and
        the weights that drew the last one that was found, for versions never fall and so drew the lost ones, too. They
        may be exchanged before it is there: :func:`check_seen`."""
        if not self.engine.deterministic or state is None or state.ended or not state.recovered:
            return False
        if policy is None:
            raise NoPolicyError("no policy has been given to this server yet", retry_delay_s=1.0)
        same_run = state.params.run_id == policy.run_id and state.lineage == policy.lineage
        return same_run and state.policy_versions[state.recovered - 1] == policy.version

    async def _begin(self, params: RequestParams, policy: PolicyId) -> RequestState:
        state = RequestState(params, lineage=policy.lineage)
        self.table.add(state)  # before the engine sees it: its first token may come at once
        # A client that goes away now must leave the whole request behind, or nothing of it.
        refusal = (await self.to_the_end(self._submit([state])))[0]
        if refusal is not None:
            raise refusal
        return state

    async def begin_many(
        self, items: Sequence[tuple[RequestParams, Callable[[RequestState | OpdError], None]]], policy: PolicyId | None
    ) -> None:
        """Attach to each request, or begin it: all new ones together, between two steps of the engine.

        Args:
            items: each with what is called, soon or later, with the request once it has ended, or with the reason why
                it has no request: RequestConflictError or NoPolicyError.
        """
        new: list[RequestState] = []
        for params, tell in items:
            try:
                state = self.table.find(params)
                if state is None and policy is None:
                    raise NoPolicyError("no policy has been given to this server yet", retry_delay_s=1.0)
            except OpdError as error:
                tell(error)
                continue
            if state is None:
                assert policy is not None  # refused above
                state = RequestState(params, lineage=policy.lineage)
                self.table.add(state)
                new.append(state)
            elif state.error is not None:
                self._try_again(state)
            state.when_ended(tell)
        if new:
            await self.to_the_end(self._submit(new))

    async def _submit(self, states: Sequence[RequestState]) -> list[BaseException | None]:
        """Log them and give them to the engine; those that are refused, and why, are forgotten."""
        try:
            refusals = await self.driver.call(lambda: self._admit(states))
        except BaseException as error:  # noqa: BLE001 - handed to each
            refusals = [error] * len(states)
        for state, refusal in zip(states, refusals, strict=True):
            if refusal is not None:
                self.table.forget(state.params.key)
                # For whoever has attached meanwhile.
                known = isinstance(refusal, OpdError)
                state.error = refusal if known else InternalError(f"not admitted: {refusal!r}")  # type: ignore[assignment]
                state.notify()
        return refusals

    def _admit(self, states: Sequence[RequestState]) -> list[BaseException | None]:
        """In the engine's thread, where the count cannot change meanwhile."""
        refusals: list[BaseException | None] = [None] * len(states)
        requests: dict[int, GenerationRequest] = {}
        free = max(0, self._max_slots - self.engine.running)  # who gets a slot in the next step does not wait
        room = free + self._max_waiting - self.engine.waiting
        for index, state in enumerate(states):
            if len(requests) >= room:
                waiting = self.engine.waiting + len(requests)
                refusals[index] = OverloadedError(f"{waiting} requests wait already", retry_delay_s=RETRY_DELAY_S)
                continue
            request = generation_request(state)
            try:
                self.engine.check_request(request)
            except OpdError as error:
                refusals[index] = error
            else:
                requests[index] = request
        begun = [states[index] for index in requests]
        try:
            if begun and self.log.full:
                raise LogFullError("the token log's disk is full; make room for it", retry_delay_s=RETRY_DELAY_S)
            self.log.begin(begun)
        except OpdError as error:
            return [refusal or error for refusal in refusals]
        for index, request in requests.items():
            try:
                self.engine.submit(request)
            except BaseException as error:  # noqa: BLE001 - handed to who asked
                self.log.forgotten([states[index]])
                refusals[index] = error
        return refusals

    def _try_again(self, state: RequestState) -> None:
        """A finished response that could not be published is published now; what failed otherwise stays failed."""
        if state.finish_reason is not None and not state.failed:
            state.error = None
            state.hurry()

    async def cancel(self, state: RequestState) -> bool:
        """Free the slot; False where it has ended already."""
        # A client that goes away now must not leave a request behind that nobody writes and nobody ends.
        return await self.to_the_end(self._cancel(state))

    async def _cancel(self, state: RequestState) -> bool:
        if state.ended or state.finish_reason is not None:
            return False
        await self.driver.call(lambda: self.engine.cancel(state.params.key))
        if state.finish_reason is not None or state.error is not None:
            return False
        state.finish_reason = FinishReason.CANCELLED
        self.log.cancelled(state)
        log.info("request %s cancelled after %d tokens", state.params.request_id, len(state.tokens))
        self._end([state])
        return True

    async def to_the_end(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Wait for ``work``, which goes on where the caller is cancelled."""
        return await asyncio.shield(self._keep(work))

    def _keep(self, work: Coroutine[Any, Any, ResultT]) -> asyncio.Task[ResultT]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- what the engine says ----------------------------------------------------------------------------------
    def _on_events(self, events: Sequence[TokenEvent]) -> None:
        finished = []
        for event in events:
            state = self.table.lookup(event.request_id)
            if state is None or state.finish_reason is not None or state.error is not None:
                continue  # cancelled meanwhile
            if event.error is not None:
                self._fail(state, event.error)
                continue
            state.append(event)
            if event.finish_reason is None:
                state.notify()
            else:
                finished.append(state)
        self._end(finished)

    def _on_engine_failure(self, error: BaseException) -> None:
        why = error if isinstance(error, OpdError) else InternalError(f"the decode loop failed: {error!r}")
        # With a log the next owner goes on with them; without one they are lost, which is not to be tried again.
        self._let_go(UnavailableError(f"the server ends: {why}") if self.log.kept else why)
        self._on_failure(error)

    def _fail(self, state: RequestState, error: OpdError) -> None:
        self.log.failed(state, error)
        state.error, state.failed = error, True
        self.table.mark_ended(state)
        state.notify()

    def _end(self, states: Sequence[RequestState]) -> None:
        """Deliver, then tell the listeners."""
        self._delivery.deliver([state for state in states if state.params.publish and state.tokens])
        self._delivered([state for state in states if not (state.params.publish and state.tokens)])

    def _delivered(self, states: Sequence[RequestState]) -> None:
        """They are where they belong."""
        if not states:
            return
        for state in states:
            state.error = None
            state.delivered = True
        self.log.delivered(states)
        self.table.mark_ended(*states)
        for state in states:
            state.notify()

    # --- the end -----------------------------------------------------------------------------------------------
    def _let_go(self, error: OpdError) -> list[RequestState]:
        """Tell listeners of unfinished requests; the log hears nothing of it."""
        unfinished = [state for state in self.table.undelivered() if state.finish_reason is None]
        for state in unfinished:
            state.error = error
            state.notify()
        return unfinished

    async def stop(self) -> list[RequestState]:
        """Stop between two tokens. Unfinished requests, which are returned, stay in the log, and their clients are told
        to ask again."""
        await self.driver.close()
        unfinished = self._let_go(UnavailableError("the rollout server is stopping"))
        self._delivery.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.log.close)
        return unfinished


def check_seen(state: RequestState, from_index: int, last_seen: rollout_service_pb2.SeenToken) -> None:
    """A client's last token against ours at its place, which is written.

    Raises:
        BeyondLogError: they differ: what the client has was lost, and written again otherwise.
    """
    columns = state.tokens, state.policy_logprobs, state.policy_versions
    seen = last_seen.token_id, last_seen.policy_logprob, last_seen.policy_version
    if tuple(column[from_index - 1] for column in columns) != seen:
        raise _beyond(from_index, min(state.recovered, from_index - 1))


def _beyond(from_index: int, written: int) -> BeyondLogError:
    return BeyondLogError(
        f"{from_index} is beyond the {written} tokens that are kept; ask again from {written} at most, and let go of "
        "what was seen beyond it",
        field="from_index",
        metadata={"written": str(written)},
    )
