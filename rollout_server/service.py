"""``opd.v1.RolloutService``: one method per RPC, and the life of a request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc
from opd.v1 import rollout_service_pb2, rollout_service_pb2_grpc

from opd_mesh import telemetry
from opd_mesh.config.services import RolloutServerConfig
from opd_mesh.convert import policy_from_proto, policy_to_proto, sampling_from_proto, trajectory_to_proto
from opd_mesh.errors import (
    CorruptWeightsError,
    InternalError,
    InvalidInputError,
    OpdError,
    OverloadedError,
    PreconditionError,
    TensorDecodeError,
    TokenizerMismatchError,
    UnavailableError,
)
from opd_mesh.policy import PolicyId, is_new_policy
from opd_mesh.rpc.server import with_idle_timeout
from opd_mesh.stream import TrajectoryStream
from opd_mesh.tensors import TensorAssembler
from opd_mesh.torch_tensors import from_numpy
from opd_mesh.trajectory import FinishReason
from rollout_server.decode_engine import DecodeEngine, GenerationRequest, TokenEvent
from rollout_server.driver import EngineDriver
from rollout_server.policy import check_manifest, verify_digest
from rollout_server.requests import RequestParams, RequestState, RequestTable

log = logging.getLogger("rollout_server")
ResultT = TypeVar("ResultT")


class RolloutServicer(rollout_service_pb2_grpc.RolloutServiceServicer):
    """Answers UNAVAILABLE until :meth:`install` has been given an engine, and generates once it holds a policy.

    Args:
        redis_url: where finished trajectories go; None: requests that ask for publication are refused.
        on_serving: called when the first policy is in place.
    """

    def __init__(
        self,
        config: RolloutServerConfig,
        *,
        redis_url: str | None,
        on_serving: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._config = config
        self._redis_url = redis_url
        self._on_serving = on_serving
        self._table = RequestTable(finished_kept=config.engine.finished_kept)
        self._streams: dict[str, TrajectoryStream] = {}
        self._deliveries: set[asyncio.Task[Any]] = set()
        self._installed: EngineDriver | None = None
        self._fingerprint = ""
        self._vocab_size = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._policy: PolicyId | None = None
        self._update_lock = asyncio.Lock()

    def install(self, engine: DecodeEngine, *, tokenizer_fingerprint: str, vocab_size: int) -> None:
        """Begin to accept policies."""
        self._fingerprint = tokenizer_fingerprint
        self._vocab_size = vocab_size
        self._shapes = engine.tensor_shapes
        self._installed = EngineDriver(engine, self._on_events, self._on_engine_failure)

    @property
    def _driver(self) -> EngineDriver:
        if self._installed is None:
            raise UnavailableError("the model is still being loaded", retry_delay_s=2.0)
        return self._installed

    # --- policy ------------------------------------------------------------------------------------------------
    async def GetPolicy(
        self, request: rollout_service_pb2.GetPolicyRequest, context: grpc.aio.ServicerContext
    ) -> rollout_service_pb2.GetPolicyResponse:
        """What is served, and how busy it is."""
        driver = self._driver
        engine = self._config.engine
        return rollout_service_pb2.GetPolicyResponse(
            policy=policy_to_proto(self._policy) if self._policy else None,
            tokenizer_fingerprint=self._fingerprint,
            load=self._load(),
            limits=rollout_service_pb2.RolloutLimits(
                max_context_tokens=engine.max_context_tokens,
                max_slots=engine.max_slots,
                max_waiting=engine.max_waiting,
            ),
            cache_mode=str(driver.engine.cache_mode),
        )

    async def UpdatePolicy(
        self,
        request_iterator: AsyncIterator[rollout_service_pb2.UpdatePolicyRequest],
        context: grpc.aio.ServicerContext,
    ) -> rollout_service_pb2.UpdatePolicyResponse:
        """Receive, verify, swap between two tokens. Whatever fails before the swap leaves the old policy serving."""
        driver = self._driver
        idle_s = self._config.server.stream_idle_timeout_s
        messages = with_idle_timeout(request_iterator, idle_s, "UpdatePolicy")
        first = await anext(messages, None)
        if first is None or first.WhichOneof("payload") != "manifest":
            raise InvalidInputError("the first message must be the manifest", field="manifest")
        manifest = first.manifest
        offered = policy_from_proto(manifest.policy)
        if not offered.run_id or not offered.digest:
            raise InvalidInputError("run_id and digest are required", field="manifest.policy")
        if manifest.tokenizer_fingerprint != self._fingerprint:
            raise TokenizerMismatchError(
                f"the policy's tokenizer is {manifest.tokenizer_fingerprint[:16]}…, but this server loaded "
                f"{self._fingerprint[:16]}… from {self._config.model}",
                field="manifest.tokenizer_fingerprint",
            )
        unchanged = rollout_service_pb2.UpdatePolicyResponse(policy=policy_to_proto(offered), swapped=False)
        if not is_new_policy(self._policy, offered):
            async for _ in messages:  # take what was sent, so that the client is not cut off in its stream
                pass
            return unchanged
        check_manifest(manifest.tensors, self._shapes)
        try:
            assembler = TensorAssembler(manifest.tensors)
            async for message in messages:
                assembler.add(message.chunk)
            arrays = assembler.finish()
        except TensorDecodeError as error:
            raise CorruptWeightsError(f"policy {offered}: {error}; the old policy stays") from error
        tensors = {name: from_numpy(array) for name, array in arrays.items()}
        engine = driver.engine
        # Each reads every byte once, and hashing leaves the other cores free.
        checks = asyncio.to_thread(verify_digest, arrays, offered), asyncio.to_thread(engine.check_policy, tensors)
        for failure in await asyncio.gather(*checks, return_exceptions=True):
            if isinstance(failure, BaseException):
                raise failure

        def swap() -> tuple[float, int]:
            running = engine.running
            started = time.perf_counter()
            engine.swap_policy(tensors, offered.version, checked=True)
            return time.perf_counter() - started, running

        async def install() -> rollout_service_pb2.UpdatePolicyResponse:
            # The lock is not held while weights arrive, for their sender may die; so ask again under it whether they
            # are still new.
            async with self._update_lock:
                if not is_new_policy(self._policy, offered):
                    return unchanged
                with telemetry.span("rollout.swap_policy"):
                    pause_s, prefilled_again = await driver.call(swap)
                self._policy = offered
                log.info("serving policy %s; decoding paused %.3f s", offered, pause_s)
                await self._on_serving(True)
            return rollout_service_pb2.UpdatePolicyResponse(
                policy=policy_to_proto(offered), swapped=True, pause_s=pause_s, prefilled_again=prefilled_again
            )

        # A client that goes away now must not leave new weights under the old policy's name.
        return await self._to_the_end(install())

    # --- generation --------------------------------------------------------------------------------------------
    async def Generate(
        self, request: rollout_service_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[rollout_service_pb2.GenerateResponse]:
        """Attach to the request, or begin it, and stream from ``from_index`` on."""
        params = self._checked_params(request)
        policy = self._policy
        if policy is None:
            raise UnavailableError("no policy has been given to this server yet", retry_delay_s=1.0)
        state = self._table.find(params)
        attached = state is not None
        # Before anything is begun: a client that was half-way with a server that has forgotten must ask from 0.
        if request.from_index > (len(state.tokens) if state else 0):
            written = len(state.tokens) if state else 0
            raise InvalidInputError(f"{request.from_index} is beyond the {written} tokens written", field="from_index")
        if state is None:
            state = await self._begin(params, policy)
        elif state.error is not None:
            await self._try_again(state)
        started = rollout_service_pb2.GenerationStarted(attached=attached, policy=policy_to_proto(policy))
        yield rollout_service_pb2.GenerateResponse(started=started)
        sent = request.from_index
        while True:
            written = len(state.tokens)
            if written > sent:
                yield rollout_service_pb2.GenerateResponse(tokens=_token_batch(state, sent, written))
                sent = written
            elif state.error is not None:
                raise state.error
            elif state.ended:
                break
            else:
                await state.wait_change()
        finished = rollout_service_pb2.GenerationFinished(
            trajectory=trajectory_to_proto(state.trajectory()), stream_entry_id=state.stream_entry_id
        )
        yield rollout_service_pb2.GenerateResponse(finished=finished)

    async def CancelGeneration(
        self, request: rollout_service_pb2.CancelGenerationRequest, context: grpc.aio.ServicerContext
    ) -> rollout_service_pb2.CancelGenerationResponse:
        """Free the slot."""
        state = self._table.get(request.request_id, request.run_id)
        cancelled = False
        if not state.ended and state.finish_reason is None:
            engine = self._driver.engine
            await self._driver.call(lambda: engine.cancel(state.params.key))
            if state.finish_reason is None and state.error is None:
                cancelled = True
                state.finish_reason = FinishReason.CANCELLED
                log.info("request %s cancelled after %d tokens", request.request_id, len(state.tokens))
                self._end(state)
        return rollout_service_pb2.CancelGenerationResponse(cancelled=cancelled, tokens_written=len(state.tokens))

    async def PauseGeneration(
        self, request: rollout_service_pb2.PauseGenerationRequest, context: grpc.aio.ServicerContext
    ) -> rollout_service_pb2.PauseGenerationResponse:
        """Stop between two tokens."""
        await self._driver.pause()
        log.info("generation paused: %s", request.reason or "no reason given")
        return rollout_service_pb2.PauseGenerationResponse(load=self._load())

    async def ResumeGeneration(
        self, request: rollout_service_pb2.ResumeGenerationRequest, context: grpc.aio.ServicerContext
    ) -> rollout_service_pb2.ResumeGenerationResponse:
        """Go on."""
        await self._driver.resume()
        return rollout_service_pb2.ResumeGenerationResponse(load=self._load())

    # --- the life of a request ---------------------------------------------------------------------------------
    def _checked_params(self, request: rollout_service_pb2.GenerateRequest) -> RequestParams:
        self._driver  # noqa: B018 - refuses while loading
        if not request.request_id:
            raise InvalidInputError("must not be empty", field="request_id")
        if request.tokenizer_fingerprint != self._fingerprint:
            raise TokenizerMismatchError(
                f"the prompt's ids come from tokenizer {request.tokenizer_fingerprint[:16] or '(none given)'}, "
                f"this server has {self._fingerprint[:16]}…",
                field="tokenizer_fingerprint",
            )
        prompt_ids = tuple(request.prompt_token_ids)
        if not prompt_ids:
            raise InvalidInputError("the prompt is empty", field="prompt_token_ids")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self._vocab_size:
            raise InvalidInputError(f"ids must lie in [0, {self._vocab_size})", field="prompt_token_ids")
        if request.publish and self._redis_url is None:
            raise PreconditionError(
                "this server has no Redis to publish to: set OPD_REDIS_URL or redis_url", field="publish"
            )
        return RequestParams(
            request_id=request.request_id,
            run_id=request.run_id,
            domain=request.domain,
            prompt_ids=prompt_ids,
            sampling=sampling_from_proto(request.sampling),
            publish=request.publish,
        )

    async def _begin(self, params: RequestParams, policy: PolicyId) -> RequestState:
        driver = self._driver
        state = RequestState(params, lineage=policy.lineage)
        self._table.add(state)  # before the engine sees it: its first token may come at once
        request = GenerationRequest(params.key, params.prompt_ids, params.sampling)

        def admit() -> None:  # in the engine's thread, where the count cannot change meanwhile
            if driver.engine.waiting >= self._config.engine.max_waiting:
                raise OverloadedError(f"{driver.engine.waiting} requests are waiting already", retry_delay_s=2.0)
            driver.engine.submit(request)

        async def submit() -> None:
            try:
                await driver.call(admit)
            except OpdError as error:
                self._table.forget(params.key)
                state.error = error  # for whoever has attached meanwhile
                state.notify()
                raise

        # A client that goes away now must leave the whole request behind, or nothing of it.
        await self._to_the_end(submit())
        return state

    async def _to_the_end(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Wait for ``work``, which goes on where the caller is cancelled."""
        task = asyncio.create_task(work)
        self._deliveries.add(task)
        task.add_done_callback(self._deliveries.discard)
        return await asyncio.shield(task)

    async def _try_again(self, state: RequestState) -> None:
        """A finished response that could not be published is published now; what failed otherwise stays failed."""
        if state.finish_reason is not None and isinstance(state.error, UnavailableError | OverloadedError):
            state.error = None
            self._end(state)

    def _on_events(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            state = self._table.lookup(event.request_id)
            if state is None or state.finish_reason is not None:
                continue  # cancelled meanwhile
            if event.error is not None:
                self._fail(state, event.error)
                continue
            state.append(event)
            if event.finish_reason is None:
                state.notify()
            else:
                self._end(state)

    def _on_engine_failure(self, error: BaseException) -> None:
        for state in self._table.unfinished():
            self._fail(state, InternalError(f"the decode loop failed: {type(error).__name__}: {error}"))
        task = asyncio.ensure_future(self._on_serving(False))
        self._deliveries.add(task)
        task.add_done_callback(self._deliveries.discard)

    def _fail(self, state: RequestState, error: OpdError) -> None:
        state.error = error
        self._table.mark_ended(state.params.key)
        state.notify()

    def _end(self, state: RequestState) -> None:
        """Deliver, then tell the listeners."""
        task = asyncio.create_task(self._deliver(state))
        self._deliveries.add(task)
        task.add_done_callback(self._deliveries.discard)

    async def _deliver(self, state: RequestState) -> None:
        params = state.params
        try:
            if params.publish and state.tokens:
                payload = trajectory_to_proto(state.trajectory()).SerializeToString()
                stream = self._stream(params.run_id)
                state.stream_entry_id = await stream.publish(params.request_id, payload)
        except OpdError as error:
            log.error("trajectory %s could not be published, it is kept: %s", params.request_id, error)  # noqa: TRY400
            state.error = error
            state.notify()
            return
        except Exception as error:
            log.exception("publishing %s failed", params.request_id)
            self._fail(state, InternalError(f"publishing failed: {error}"))
            return
        state.delivered = True
        self._table.mark_ended(params.key)
        state.notify()

    def _stream(self, run_id: str) -> TrajectoryStream:
        if run_id not in self._streams:
            assert self._redis_url is not None  # checked when the request came in
            self._streams[run_id] = TrajectoryStream(
                self._redis_url, run_id, consumer="rollout", timeout_s=self._config.stream_timeout_s
            )
        return self._streams[run_id]

    def _load(self) -> rollout_service_pb2.RolloutLoad:
        engine = self._driver.engine
        return rollout_service_pb2.RolloutLoad(
            running=engine.running,
            waiting=engine.waiting,
            paused=self._driver.paused,
            tokens_generated=engine.counters.tokens,
        )

    async def close(self) -> None:
        """Stop between two tokens; what is unfinished fails with UNAVAILABLE, so that clients ask elsewhere."""
        if self._installed is not None:
            await self._installed.close()
        for state in self._table.unfinished():
            if state.finish_reason is None:
                self._fail(state, UnavailableError("the rollout server is stopping"))
        await asyncio.gather(*self._deliveries, return_exceptions=True)
        for stream in self._streams.values():
            await stream.close()


def _token_batch(state: RequestState, start: int, end: int) -> rollout_service_pb2.TokenBatch:
    return rollout_service_pb2.TokenBatch(
        first_index=start,
        token_ids=state.tokens[start:end],
        sampling_logprobs=state.sampling_logprobs[start:end],
        policy_logprobs=state.policy_logprobs[start:end],
        policy_versions=state.policy_versions[start:end],
    )
