"""Client of ``opd.v1.RolloutService``. One client per server: a ``request_id`` has an owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from opd.v1 import common_pb2, rollout_service_pb2, rollout_service_pb2_grpc

from opd_mesh.clients.base import ServiceClient
from opd_mesh.config.services import ChannelConfig
from opd_mesh.convert import sampling_to_proto, trajectory_from_proto
from opd_mesh.errors import (
    InvalidInputError,
    OpdError,
    OverloadedError,
    RolloutUnavailableError,
    StreamUnavailableError,
    UnavailableError,
)
from opd_mesh.rpc.channel import open_channel, responses_of, rpc_errors, wait_until_serving
from opd_mesh.tensors import chunks_of, header_of
from opd_mesh.trajectory import SamplingParams, Trajectory

SERVICE = "opd.v1.RolloutService"
REATTACH_DELAY_S = 0.5


@dataclass(frozen=True, slots=True)
class GenerateSpec:
    """One response to write; see ``GenerateRequest`` in the proto."""

    request_id: str
    run_id: str
    domain: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    tokenizer_fingerprint: str
    publish: bool = False


@dataclass
class RolloutClient(ServiceClient):
    """One server."""

    address: str
    config: ChannelConfig = field(default_factory=ChannelConfig)

    def __post_init__(self) -> None:
        self._channel = open_channel(self.address, SERVICE, self.config)
        self._stub = rollout_service_pb2_grpc.RolloutServiceStub(self._channel)
        self.wire_bytes = 0

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
        self, spec: GenerateSpec, *, from_index: int = 0
    ) -> AsyncIterator[rollout_service_pb2.GenerateResponse]:
        """The responses of one ``Generate`` call, from token ``from_index`` on."""
        request = rollout_service_pb2.GenerateRequest(
            request_id=spec.request_id,
            run_id=spec.run_id,
            domain=spec.domain,
            prompt_token_ids=spec.prompt_token_ids,
            sampling=sampling_to_proto(spec.sampling),
            from_index=from_index,
            publish=spec.publish,
            tokenizer_fingerprint=spec.tokenizer_fingerprint,
        )
        async for response in responses_of(self._stub.Generate(request), self.address):
            self.wire_bytes += response.ByteSize()
            yield response

    async def generate(self, spec: GenerateSpec, *, timeout_s: float = 600.0) -> Trajectory:
        """Write one response to its end, attaching again where the stream breaks or the server is full.

        Raises:
            RolloutUnavailableError: not finished within ``timeout_s`` seconds, or the server was not to be reached
                for the channel's ``connect_timeout_s`` on end.
            OpdError: as the server says.
        """
        seen = 0
        last: OpdError | None = None
        loop = asyncio.get_running_loop()
        failing_since: float | None = None
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        async for response in self.stream(spec, from_index=seen):
                            failing_since = None
                            kind = response.WhichOneof("payload")
                            if kind == "tokens":
                                seen = response.tokens.first_index + len(response.tokens.token_ids)
                            elif kind == "finished":
                                return trajectory_from_proto(response.finished.trajectory)
                        last = UnavailableError("the stream ended before the response did")
                    except StreamUnavailableError:
                        raise  # Redis, not the server: it has waited for that already
                    except OverloadedError as error:  # a large step waits its turn, and so does one whose Redis is full
                        await asyncio.sleep(error.retry_delay_s or REATTACH_DELAY_S)
                        continue
                    except UnavailableError as error:
                        last = error
                    except InvalidInputError as error:
                        if error.field != "from_index" or seen == 0:
                            raise
                        seen = 0  # a server that was restarted knows nothing of the request: it is written again
                        continue
                    failing_since = failing_since or loop.time()
                    if loop.time() - failing_since > self.config.connect_timeout_s:
                        raise RolloutUnavailableError(
                            f"rollout server {self.address} was not to be reached for "
                            f"{self.config.connect_timeout_s:g} s (last: {last})",
                            metadata={"target": self.address},
                        )
                    await asyncio.sleep(REATTACH_DELAY_S)
        except TimeoutError:
            raise RolloutUnavailableError(
                f"rollout server {self.address} did not finish request {spec.request_id!r} within {timeout_s:g} s"
                + (f" (last: {last})" if last else ""),
                metadata={"target": self.address},
            ) from last

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
    ) -> rollout_service_pb2.UpdatePolicyResponse:
        """Send new weights and wait until they are swapped in; sent again where the connection breaks.

        Raises:
            RolloutUnavailableError: the server was not to be reached for the channel's ``connect_timeout_s`` on end.
            OpdError: as the server says.
        """
        arrays = [array for _, array in tensors]
        manifest = rollout_service_pb2.PolicyManifest(
            policy=policy,
            tensors=[header_of(name, array) for name, array in tensors],
            tokenizer_fingerprint=tokenizer_fingerprint,
        )

        async def requests() -> AsyncIterator[rollout_service_pb2.UpdatePolicyRequest]:
            yield rollout_service_pb2.UpdatePolicyRequest(manifest=manifest)
            for chunk in chunks_of(arrays):
                self.wire_bytes += len(chunk.data)
                yield rollout_service_pb2.UpdatePolicyRequest(chunk=chunk)

        loop = asyncio.get_running_loop()
        failing_since: float | None = None
        while True:
            started = loop.time()
            try:
                async with rpc_errors(self.address):
                    return await self._stub.UpdatePolicy(requests(), timeout=timeout_s)
            except UnavailableError as error:
                failing_since = failing_since or started
                if loop.time() - failing_since > self.config.connect_timeout_s:
                    raise RolloutUnavailableError(
                        f"rollout server {self.address} was not to be reached for {self.config.connect_timeout_s:g} s "
                        f"(last: {error})",
                        metadata={"target": self.address},
                    ) from error
            await asyncio.sleep(REATTACH_DELAY_S)

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
