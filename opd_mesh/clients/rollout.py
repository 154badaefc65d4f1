"""Client of ``opd.v1.RolloutService``. One client per server: a ``request_id`` has an owner."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from opd.v1 import common_pb2, rollout_service_pb2, rollout_service_pb2_grpc

from opd_mesh.clients.base import ServiceClient
from opd_mesh.clients.generation_stream import GenerationStream
from opd_mesh.clients.patience import Patience
from opd_mesh.config.services import ChannelConfig
from opd_mesh.convert import finish_reason_from_proto, sampling_to_proto, trajectory_from_proto
from opd_mesh.errors import (
    OpdError,
    OverloadedError,
    PolicyBaseMismatchError,
    PreconditionError,
    RolloutUnavailableError,
    StreamUnavailableError,
    UnavailableError,
)
from opd_mesh.policy_weights import LoraFactors, SharedTensors, host_id
from opd_mesh.rpc.channel import open_channel, responses_of, rpc_errors, wait_until_serving
from opd_mesh.tensors import chunks_of, header_of
from opd_mesh.trajectory import FinishReason, SamplingParams, Trajectory

SERVICE = "opd.v1.RolloutService"
REATTACH_DELAY_S = 0.5
log = logging.getLogger("opd_mesh.clients")
AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, slots=True)
class GenerateSpec:
    """One response to write; see ``GenerateRequest`` in the proto.

    Attributes:
        shared_prefix_tokens: with so many prompt tokens, fewer than all, the prompts of other requests begin, too: the
            server reads them once. 0: none.
    """

    request_id: str
    run_id: str
    domain: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    tokenizer_fingerprint: str
    publish: bool = False
    shared_prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """What is told of a finished response beside its trajectory.

    Attributes:
        num_scored: its tokens; 0 where it was cancelled before the first, and then it is not published.
        stream_entry_id: Redis stream entry it went to, or empty.
    """

    num_scored: int
    finish_reason: FinishReason
    stream_entry_id: str


@dataclass(frozen=True)
class _Given:
    """What the server was given last, as far as this client knows."""

    policy: common_pb2.Policy
    digests: Mapping[str, str]


@dataclass
class RolloutClient(ServiceClient):
    """One server."""

    address: str
    config: ChannelConfig = field(default_factory=ChannelConfig)

    def __post_init__(self) -> None:
        self._channel = open_channel(self.address, SERVICE, self.config)
        self._stub = rollout_service_pb2_grpc.RolloutServiceStub(self._channel)
        self.wire_bytes = 0  # over the socket; what goes through shared memory is not counted
        self._given: _Given | None = None
        self._generating: GenerationStream | None = None

    async def wait_ready(self, timeout_s: float | None = None, *, with_policy: bool = False) -> None:
        """Wait until the server answers; with ``with_policy``, until it holds a policy.

        Raises:
            UnavailableError: after ``timeout_s`` (default: the channel's ``connect_timeout_s``).
        """
        await wait_until_serving(
            self._channel,
            SERVICE,
            target=self.address,
            timeout_s=self.config.connect_timeout_s if timeout_s is None else timeout_s,
            accept_not_serving=not with_policy,
        )

    async def get_policy(self) -> rollout_service_pb2.GetPolicyResponse:
        """What is served, and how busy it is."""
        async with rpc_errors(self.address):
            request = rollout_service_pb2.GetPolicyRequest()
            return await self._stub.GetPolicy(request, timeout=self.config.timeout_s)

    async def stream(
        self, spec: GenerateSpec, *, from_index: int = 0, last_seen: rollout_service_pb2.SeenToken | None = None
    ) -> AsyncIterator[rollout_service_pb2.GenerateResponse]:
        """The responses of one ``Generate`` call, from token ``from_index`` on.

        Args:
            last_seen: the token before, as it was received.

        Raises:
            BeyondLogError: a machine died, and its log with some of what was seen: ask again from
                ``metadata["written"]`` at most.
            OpdError: as the server says.
        """
        request = _request_of(spec)
        request.from_index = from_index
        if last_seen is not None:
            request.last_seen.CopyFrom(last_seen)
        async for response in responses_of(self._stub.Generate(request), self.address):
            self.wire_bytes += response.ByteSize()
            yield response

    async def generate(self, spec: GenerateSpec, *, timeout_s: float = 600.0) -> Trajectory:
        """Write one response to its end, asking again where the stream breaks or the server is full.

        What is asked for at one moment, here and by :meth:`write`, goes over one ``GenerateBatch`` stream.

        Raises:
            RolloutUnavailableError: not finished within ``timeout_s`` seconds, or the server was not to be reached
                for the channel's ``connect_timeout_s`` on end.
            OpdError: as the server says.
        """
        return trajectory_from_proto((await self._finished(spec, timeout_s, return_trajectory=True)).trajectory)

    async def write(self, spec: GenerateSpec, *, timeout_s: float = 600.0) -> Written:
        """As :meth:`generate`, without the trajectory: for one that is published, which comes through Redis."""
        result = await self._finished(spec, timeout_s, return_trajectory=False)
        return Written(result.num_tokens, finish_reason_from_proto(result.finish_reason), result.stream_entry_id)

    async def _finished(
        self, spec: GenerateSpec, timeout_s: float, *, return_trajectory: bool
    ) -> rollout_service_pb2.GenerateBatchResult:
        request = _request_of(spec)
        last: OpdError | None = None
        patience = Patience(self.config.connect_timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    stream = self._generation_stream()
                    try:
                        return await stream.ask(request, return_trajectory=return_trajectory)
                    except StreamUnavailableError:
                        raise  # Redis, not the server: it has waited for that already
                    except OverloadedError as error:  # a large step waits its turn, and so does one whose Redis is full
                        await asyncio.sleep(error.retry_delay_s or REATTACH_DELAY_S)
                        continue
                    except UnavailableError as error:
                        last = error
                        if stream.broken is not None and stream.reached:
                            patience.reached()
                    if patience.is_over():
                        raise self._out_of_reach(last)
                    await asyncio.sleep(REATTACH_DELAY_S)
        except TimeoutError:
            raise RolloutUnavailableError(
                f"rollout server {self.address} did not finish request {spec.request_id!r} within {timeout_s:g} s"
                + (f" (last: {last})" if last else ""),
                metadata={"target": self.address},
            ) from last

    def _generation_stream(self) -> GenerationStream:
        """The standing one, or another where it broke."""
        if self._generating is None or self._generating.broken is not None:
            self._generating = GenerationStream(self._stub.GenerateBatch(), self.address, self._count_wire_bytes)
        return self._generating

    def _count_wire_bytes(self, size: int) -> None:
        self.wire_bytes += size

    async def close(self) -> None:
        """Ends the stream and the channel."""
        if self._generating is not None:
            await self._generating.close()
        await super().close()

    async def cancel(self, request_id: str, *, run_id: str = "") -> rollout_service_pb2.CancelGenerationResponse:
        """Free the slot of a request; without ``run_id`` the id must be known of one run only."""
        async with rpc_errors(self.address):
            request = rollout_service_pb2.CancelGenerationRequest(request_id=request_id, run_id=run_id)
            return await self._stub.CancelGeneration(request, timeout=self.config.timeout_s)

    async def update_policy(
        self,
        policy: common_pb2.Policy,
        tensors: Sequence[tuple[str, np.ndarray]],
        *,
        tokenizer_fingerprint: str,
        timeout_s: float = 600.0,
        digests: Mapping[str, str] | None = None,
        adapter: LoraFactors | None = None,
    ) -> rollout_service_pb2.UpdatePolicyResponse:
        """Give new weights and wait until they are swapped in; given again where the connection breaks.

        Args:
            policy: its digest is that over ``digests`` and ``adapter``, or, without them, that of all bytes.
            tensors: all of them. With ``digests`` those that the server has already are left out, and to a server on
                this machine they go through shared memory.
            digests: by name, see :mod:`opd_mesh.policy_weights`.
            adapter: ``tensors`` are the factors of a LoRA adapter.

        Raises:
            PolicyBaseMismatchError: the server has not the checkpoint that ``adapter`` changes.
            RolloutUnavailableError: the server was not to be reached for the channel's ``connect_timeout_s`` on end.
            OpdError: as the server says.
        """
        manifest = rollout_service_pb2.PolicyManifest(
            policy=policy,
            tokenizer_fingerprint=tokenizer_fingerprint,
            tensor_digests=digests,
            adapter=adapter.to_proto() if adapter else None,
        )
        given = _Given(policy, dict(digests or {}))
        shared = bool(digests)
        while True:
            base = self._given if digests and adapter is None else None
            known = base.digests if base else {}
            sent = [(name, array) for name, array in tensors if not digests or digests[name] != known.get(name)]
            del manifest.tensors[:]
            manifest.tensors.extend(header_of(name, array) for name, array in sent)
            manifest.ClearField("base")
            if base is not None and len(sent) < len(tensors):
                manifest.base.CopyFrom(base.policy)
            arrays = [array for _, array in sent]
            try:
                answer = await self._until_answered(
                    lambda share=shared, arrays=arrays: self._send_policy(manifest, arrays, share, timeout_s)  # type: ignore[misc]
                )
            except PolicyBaseMismatchError:
                self._given = None  # it was restarted, or somebody else gave it a policy
                if base is None:
                    raise
            except PreconditionError as error:
                if not shared or not (error.field or "").startswith("shared_memory"):
                    raise
                shared = False
            else:
                self._given = given
                return answer

    async def _send_policy(
        self, manifest: rollout_service_pb2.PolicyManifest, arrays: Sequence[np.ndarray], share: bool, timeout_s: float
    ) -> rollout_service_pb2.UpdatePolicyResponse:
        manifest.ClearField("shared_memory")
        if share and (await self.get_policy()).host_id == host_id() != "":
            try:
                with SharedTensors() as memory:
                    await asyncio.to_thread(memory.write, arrays)
                    manifest.shared_memory.CopyFrom(memory.message)
                    return await self._stub.UpdatePolicy(_parts(manifest, []), timeout=timeout_s)
            except OSError as error:
                log.info("shared memory cannot hold the policy (%s); it goes over the socket", error)
        self.wire_bytes += sum(array.nbytes for array in arrays)
        return await self._stub.UpdatePolicy(_parts(manifest, arrays), timeout=timeout_s)

    async def _until_answered(self, call: Callable[[], Awaitable[AnswerT]]) -> AnswerT:
        """Ask again where the connection breaks, for ``connect_timeout_s`` on end."""
        patience = Patience(self.config.connect_timeout_s)
        while True:
            started = asyncio.get_running_loop().time()
            try:
                async with rpc_errors(self.address):
                    return await call()
            except UnavailableError as error:
                if patience.is_over(failing_since=started):
                    raise self._out_of_reach(error) from error
            await asyncio.sleep(REATTACH_DELAY_S)

    def _out_of_reach(self, last: OpdError) -> RolloutUnavailableError:
        return RolloutUnavailableError(
            f"rollout server {self.address} was not to be reached for {self.config.connect_timeout_s:g} s "
            f"(last: {last})",
            metadata={"target": self.address},
        )

    async def pause(self, reason: str = "") -> rollout_service_pb2.PauseGenerationResponse:
        """Stop decoding between two tokens."""
        async with rpc_errors(self.address):
            request = rollout_service_pb2.PauseGenerationRequest(reason=reason)
            return await self._stub.PauseGeneration(request, timeout=self.config.timeout_s)

    async def resume(self) -> rollout_service_pb2.ResumeGenerationResponse:
        """Go on decoding."""
        async with rpc_errors(self.address):
            request = rollout_service_pb2.ResumeGenerationRequest()
            return await self._stub.ResumeGeneration(request, timeout=self.config.timeout_s)


def _request_of(spec: GenerateSpec) -> rollout_service_pb2.GenerateRequest:
    return rollout_service_pb2.GenerateRequest(
        request_id=spec.request_id,
        run_id=spec.run_id,
        domain=spec.domain,
        prompt_token_ids=spec.prompt_token_ids,
        sampling=sampling_to_proto(spec.sampling),
        publish=spec.publish,
        tokenizer_fingerprint=spec.tokenizer_fingerprint,
        shared_prefix_tokens=spec.shared_prefix_tokens,
    )


async def _parts(
    manifest: rollout_service_pb2.PolicyManifest, arrays: Sequence[np.ndarray]
) -> AsyncIterator[rollout_service_pb2.UpdatePolicyRequest]:
    yield rollout_service_pb2.UpdatePolicyRequest(manifest=manifest)
    for chunk in chunks_of(arrays):
        yield rollout_service_pb2.UpdatePolicyRequest(chunk=chunk)
