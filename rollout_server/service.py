"""``opd.v1.RolloutService``: one method per RPC."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

import grpc
import numpy as np
from opd.v1 import rollout_service_pb2, rollout_service_pb2_grpc
from torch import Tensor

from opd_mesh import telemetry
from opd_mesh.config.services import RolloutServerConfig
from opd_mesh.convert import kept_to_proto, policy_from_proto, policy_to_proto, trajectory_to_proto
from opd_mesh.errors import (
    CorruptWeightsError,
    InvalidInputError,
    OpdError,
    PreconditionError,
    TensorDecodeError,
    TokenizerMismatchError,
    UnavailableError,
)
from opd_mesh.policy import PolicyId, is_new_policy
from opd_mesh.policy_weights import host_id, read_shared
from opd_mesh.rpc.server import with_idle_timeout
from opd_mesh.rpc.writer import MESSAGE_BYTES
from opd_mesh.stream import TrajectoryStream
from opd_mesh.tensors import TensorAssembler
from rollout_server.batch_call import BatchCall
from rollout_server.engines import LoadedEngine
from rollout_server.generations import Generations, check_seen
from rollout_server.log_format import unpack_ids
from rollout_server.policy_transfer import ServedWeights
from rollout_server.request_log import params_from_proto
from rollout_server.requests import RequestParams, RequestState
from rollout_server.saved_kv import SavedKv
from rollout_server.token_log import TokenLog

log = logging.getLogger("rollout_server")
# What the run of a policy that nobody trains is called, before the beginning of its digest: versions of one run are in
# an order, and those of two checkpoints are not.
FROZEN_RUN = "frozen"
TOKEN_BYTES = 32  # of a token in a message, without kept ids; at most


class RolloutServicer(rollout_service_pb2_grpc.RolloutServiceServicer):
    """Answers UNAVAILABLE until :meth:`install` has been given an engine, and generates once it holds a policy.

    Args:
        redis_url: where finished trajectories go; None: requests that ask for publication are refused.
        on_serving: called with whether a policy is in place.
        on_failure: called when the decode loop has ended by itself; the process should end, too.
    """

    def __init__(
        self,
        config: RolloutServerConfig,
        *,
        redis_url: str | None,
        on_serving: Callable[[bool], Awaitable[None]],
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._config = config
        self._redis_url = redis_url
        self._on_serving = on_serving
        self._on_failure = on_failure
        self._streams: dict[str, TrajectoryStream] = {}
        self._installed: Generations | None = None
        self._update_lock = asyncio.Lock()
        self._batch_calls: set[BatchCall] = set()

    def install(
        self,
        loaded: LoadedEngine,
        *,
        token_log: TokenLog | None = None,
        recovered: Sequence[RequestState] = (),
    ) -> None:
        """Begin to accept policies, and to serve what a log holds."""
        self._loaded = replace(loaded, base=None)  # held in one place, which lets go of it
        self._weights = ServedWeights(loaded.engine.tensor_shapes, loaded.base, loaded.base_digest)
        self._saved_kv = SavedKv(token_log.path) if token_log is not None else None
        self._installed = Generations(
            loaded.engine,
            token_log=token_log,
            tokenizer_fingerprint=loaded.tokenizer_fingerprint,
            finished_kept=self._config.engine.finished_kept,
            max_slots=self._config.engine.max_slots,
            max_waiting=self._config.engine.max_waiting,
            stream_of=self._stream,
            on_failure=self._on_failure,
        )
        self._installed.recover(recovered)

    async def serve_frozen(self) -> None:
        """The checkpoint's own weights, which the engine holds since it was built, are the policy, and stay it."""
        generations = self._generations
        digest = self._loaded.base_digest
        policy = PolicyId(f"{FROZEN_RUN}.{digest[:16]}", 0, 0, digest)
        saved = await self._take_saved_kv(policy)
        refused = await generations.driver.call(lambda: generations.submit_recovered(saved))
        self._weights = ServedWeights(generations.engine.tensor_shapes, policy=policy)
        generations.refuse(refused)
        await generations.end_outdated(policy)
        log.info("serving the checkpoint's own weights, frozen: %s", policy)
        await self._on_serving(True)

    @property
    def _generations(self) -> Generations:
        if self._installed is None:
            raise UnavailableError("the model is still being loaded", retry_delay_s=2.0)
        return self._installed

    @property
    def _policy(self) -> PolicyId | None:
        return self._weights.policy

    # --- policy ------------------------------------------------------------------------------------------------
    async def GetPolicy(
        self, request: rollout_service_pb2.GetPolicyRequest, context: grpc.aio.ServicerContext
    ) -> rollout_service_pb2.GetPolicyResponse:
        """What is served, and how busy it is."""
        load = self._load()
        settings = self._config.engine
        return rollout_service_pb2.GetPolicyResponse(
            policy=policy_to_proto(self._policy) if self._policy else None,
            tokenizer_fingerprint=self._loaded.tokenizer_fingerprint,
            load=load,
            limits=rollout_service_pb2.RolloutLimits(
                max_context_tokens=settings.max_context_tokens,
                max_slots=settings.max_slots,
                max_waiting=settings.max_waiting,
                grammars=self._loaded.engine.takes_grammars,
                max_kept_ids=self._loaded.engine.max_kept_ids,
            ),
            cache_mode=str(self._loaded.engine.cache_mode),
            host_id=host_id(),
            base_digest=self._weights.base_digest,
        )

    async def UpdatePolicy(
        self,
        request_iterator: AsyncIterator[rollout_service_pb2.UpdatePolicyRequest],
        context: grpc.aio.ServicerContext,
    ) -> rollout_service_pb2.UpdatePolicyResponse:
        """Receive, verify, prepare beside the old weights, swap between two tokens. Whatever fails before the swap
        leaves the old policy serving."""
        generations = self._generations
        if self._config.frozen:
            raise PreconditionError(
                f"this server keeps the weights of {self._config.model}: take `frozen: true` out of its configuration, "
                "or give the policy to another server",
                field="frozen",
            )
        idle_s = self._config.server.stream_idle_timeout_s
        messages = with_idle_timeout(request_iterator, idle_s, "UpdatePolicy")
        first = await anext(messages, None)
        if first is None or first.WhichOneof("payload") != "manifest":
            raise InvalidInputError("the first message must be the manifest", field="manifest")
        manifest = first.manifest
        offered = policy_from_proto(manifest.policy)
        self._check_offer(manifest, offered)
        unchanged = rollout_service_pb2.UpdatePolicyResponse(policy=policy_to_proto(offered), swapped=False)
        if not is_new_policy(self._policy, offered):
            async for _ in messages:  # take what was sent, so that the client is not cut off in its stream
                pass
            return unchanged
        weights = self._weights
        served = weights.policy
        weights.check(manifest, offered)
        try:
            assembler = TensorAssembler(manifest.tensors)
            if manifest.HasField("shared_memory"):
                await asyncio.to_thread(assembler.fill, lambda arrays: read_shared(manifest.shared_memory, arrays))
            async for message in messages:
                assembler.add(message.chunk)
            arrays = assembler.finish()
        except TensorDecodeError as error:
            raise CorruptWeightsError(f"policy {offered}: {error}; the old policy stays") from error

        async def install() -> rollout_service_pb2.UpdatePolicyResponse:
            # The lock is not held while weights arrive, for their sender may die; so ask again under it whether they
            # are still new, and still fit what is served. From here on what is served changes by us alone.
            async with self._update_lock:
                if not is_new_policy(self._policy, offered):
                    return unchanged
                if weights.policy is not served:
                    weights.check(manifest, offered)
                pause_s, prefilled_again = await self._exchange(manifest, offered, arrays)
            return rollout_service_pb2.UpdatePolicyResponse(
                policy=policy_to_proto(offered), swapped=True, pause_s=pause_s, prefilled_again=prefilled_again
            )

        # A client that goes away now must not leave new weights under the old policy's name.
        return await generations.to_the_end(install())

    async def _exchange(
        self, manifest: rollout_service_pb2.PolicyManifest, offered: PolicyId, arrays: Mapping[str, np.ndarray]
    ) -> tuple[float, int]:
        """Verify, prepare, swap; returns (seconds that decoding stood still, requests that are read again)."""
        generations, weights = self._generations, self._weights
        engine = generations.engine
        tensors = await asyncio.to_thread(weights.tensors_of, manifest, offered, arrays)
        prepared = await asyncio.to_thread(engine.prepare_policy, tensors)
        saved = await self._take_saved_kv(offered)

        def swap() -> tuple[float, int, list[tuple[RequestState, OpdError]]]:
            running = engine.running
            started = time.perf_counter()
            engine.swap_policy(prepared, offered.version)
            pause_s = time.perf_counter() - started
            return pause_s, running, generations.submit_recovered(saved)

        with telemetry.span("rollout.swap_policy"):
            pause_s, prefilled_again, refused = await generations.driver.call(swap)
        weights.accept(manifest, offered)
        log.info("serving policy %s; decoding paused %.4f s", offered, pause_s)
        generations.refuse(refused)
        await generations.end_outdated(offered)
        await self._on_serving(True)
        return pause_s, prefilled_again

    async def _take_saved_kv(self, offered: PolicyId) -> dict[int, dict[str, Tensor]]:
        if self._saved_kv is None or not self._generations.recovered_unfinished:
            return {}
        return await asyncio.to_thread(self._saved_kv.take, offered.digest)

    def _check_offer(self, manifest: rollout_service_pb2.PolicyManifest, offered: PolicyId) -> None:
        if not offered.run_id or not offered.digest:
            raise InvalidInputError("run_id and digest are required", field="manifest.policy")
        if manifest.tokenizer_fingerprint != self._loaded.tokenizer_fingerprint:
            raise TokenizerMismatchError(
                f"the policy's tokenizer is {manifest.tokenizer_fingerprint[:16]}…, but this server loaded "
                f"{self._loaded.tokenizer_fingerprint[:16]}… from {self._config.model}",
                field="manifest.tokenizer_fingerprint",
            )

    # --- generation --------------------------------------------------------------------------------------------
    async def Generate(
        self, request: rollout_service_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[rollout_service_pb2.GenerateResponse]:
        """Attach to the request, or begin it, and stream from ``from_index`` on."""
        generations = self._generations
        params = self._checked_params(request)
        policy = self._policy
        state, attached = await generations.attach(params, request.from_index, policy)
        unproved = request.HasField("last_seen") and request.from_index > 0
        started = rollout_service_pb2.GenerationStarted(
            attached=attached, policy=policy_to_proto(policy) if policy else None
        )
        yield rollout_service_pb2.GenerateResponse(started=started)
        sent = request.from_index
        while True:
            written = len(state.tokens)
            if unproved and written >= request.from_index:
                check_seen(state, request.from_index, request.last_seen)
                unproved = False
            if written > sent:
                end = _end_of_piece(state, sent, written)
                yield rollout_service_pb2.GenerateResponse(tokens=_token_batch(state, sent, end))
                sent = end
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

    async def GenerateBatch(
        self,
        request_iterator: AsyncIterator[rollout_service_pb2.GenerateBatchRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[rollout_service_pb2.GenerateBatchResponse]:
        """Attach to each request, or begin it, and answer each when it has ended."""
        call = BatchCall(
            self._generations,
            check=self._checked_params,
            policy=lambda: self._policy,
            credits=self._config.engine.max_slots + self._config.engine.max_waiting,
            idle_timeout_s=self._config.server.stream_idle_timeout_s,
            max_message_bytes=self._config.server.max_message_bytes,
        )
        self._batch_calls.add(call)
        try:
            async with aclosing(call.answers(request_iterator)) as answers:
                async for response in answers:
                    yield response
        finally:
            self._batch_calls.discard(call)

    async def CancelGeneration(
        self, request: rollout_service_pb2.CancelGenerationRequest, context: grpc.aio.ServicerContext
    ) -> rollout_service_pb2.CancelGenerationResponse:
        """Free the slot."""
        generations = self._generations
        state = generations.table.get(request.request_id, request.run_id)
        cancelled = await generations.cancel(state)
        return rollout_service_pb2.CancelGenerationResponse(cancelled=cancelled, tokens_written=len(state.tokens))

    async def PauseGeneration(
        self, request: rollout_service_pb2.PauseGenerationRequest, context: grpc.aio.ServicerContext
    ) -> rollout_service_pb2.PauseGenerationResponse:
        """Stop between two tokens."""
        await self._generations.driver.pause()
        log.info("generation paused: %s", request.reason or "no reason given")
        return rollout_service_pb2.PauseGenerationResponse(load=self._load())

    async def ResumeGeneration(
        self, request: rollout_service_pb2.ResumeGenerationRequest, context: grpc.aio.ServicerContext
    ) -> rollout_service_pb2.ResumeGenerationResponse:
        """Go on."""
        await self._generations.driver.resume()
        return rollout_service_pb2.ResumeGenerationResponse(load=self._load())

    def _checked_params(self, request: rollout_service_pb2.GenerateRequest) -> RequestParams:
        if not request.request_id:
            raise InvalidInputError("must not be empty", field="request_id")
        if request.tokenizer_fingerprint != self._loaded.tokenizer_fingerprint:
            raise TokenizerMismatchError(
                f"the prompt's ids come from tokenizer {request.tokenizer_fingerprint[:16] or '(none given)'}, "
                f"this server has {self._loaded.tokenizer_fingerprint[:16]}…",
                field="tokenizer_fingerprint",
            )
        ids = request.prompt_token_ids
        if not ids:
            raise InvalidInputError("the prompt is empty", field="prompt_token_ids")
        if not 0 <= min(ids) <= max(ids) < self._loaded.vocab_size:
            raise InvalidInputError(f"ids must lie in [0, {self._loaded.vocab_size})", field="prompt_token_ids")
        if request.publish and self._redis_url is None:
            raise PreconditionError(
                "this server has no Redis to publish to: set OPD_REDIS_URL or redis_url", field="publish"
            )
        return params_from_proto(request)

    def _stream(self, run_id: str) -> TrajectoryStream:
        if self._redis_url is None:  # a request from the log, of a server that had one
            raise UnavailableError("this server has no Redis to publish to: set OPD_REDIS_URL or redis_url")
        if run_id not in self._streams:
            self._streams[run_id] = TrajectoryStream(
                self._redis_url, run_id, consumer="rollout", timeout_s=self._config.stream_timeout_s
            )
        return self._streams[run_id]

    def _load(self) -> rollout_service_pb2.RolloutLoad:
        generations = self._generations
        engine, driver = generations.engine, generations.driver
        return rollout_service_pb2.RolloutLoad(
            running=engine.running,
            waiting=engine.waiting,
            paused=driver.paused,
            tokens_generated=engine.counters.tokens,
            busy_s=driver.busy_s,
            idle_s=driver.idle_s,
            log_full=generations.log.full,
            prefill_tokens=engine.counters.prefill_tokens,
            shared_prefill_tokens=engine.counters.shared_prefill_tokens,
            replayed_tokens=engine.counters.replayed_tokens,
            preempted=engine.counters.preempted,
        )

    async def close(self, *, save_kv: bool = True) -> None:
        """Stop between two tokens, save what is unfinished, and tell the clients to ask again.

        Args:
            save_kv: where the configuration says so; False where the engine, or the ownership of the log, is lost.
        """
        generations = self._installed
        if generations is not None:
            unfinished = await generations.stop()
            for call in self._batch_calls:
                call.stop()
            wanted = save_kv and self._config.log is not None and self._config.log.save_kv
            if self._saved_kv is not None and wanted and self._policy is not None:
                await asyncio.to_thread(self._saved_kv.save, generations.engine, unfinished, self._policy.digest)
            generations.engine.close()
        for stream in self._streams.values():
            await stream.close()


def _end_of_piece(state: RequestState, start: int, written: int) -> int:
    """How much of what is written goes into one message: kept ids may be many."""
    end, room = start, MESSAGE_BYTES
    while end < written and room > 0:
        room -= TOKEN_BYTES + (2 * len(state.kept[end]) if state.kept else 0)
        end += 1
    return end


def _token_batch(state: RequestState, start: int, end: int) -> rollout_service_pb2.TokenBatch:
    return rollout_service_pb2.TokenBatch(
        first_index=start,
        token_ids=state.tokens[start:end],
        sampling_logprobs=state.sampling_logprobs[start:end],
        policy_logprobs=state.policy_logprobs[start:end],
        policy_versions=state.policy_versions[start:end],
        kept_token_ids=kept_to_proto(map(unpack_ids, state.kept[start:end])),
    )
