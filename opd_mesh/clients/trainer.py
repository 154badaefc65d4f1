"""Client of ``opd.v1.TrainerService``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from google.protobuf import duration_pb2
from opd.v1 import trainer_service_pb2, trainer_service_pb2_grpc

from opd_mesh.clients.base import ServiceClient
from opd_mesh.config.services import ChannelConfig
from opd_mesh.convert import trajectory_to_proto
from opd_mesh.rpc.channel import open_channel, responses_of, rpc_errors, wait_until_serving
from opd_mesh.trajectory import Trajectory

SERVICE = "opd.v1.TrainerService"


@dataclass
class TrainerClient(ServiceClient):
    """One server."""

    address: str
    config: ChannelConfig = field(default_factory=ChannelConfig)

    def __post_init__(self) -> None:
        self._channel = open_channel(self.address, SERVICE, self.config)
        self._stub = trainer_service_pb2_grpc.TrainerServiceStub(self._channel)

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Raises :class:`UnavailableError` after ``timeout_s`` (default: the channel's ``connect_timeout_s``)."""
        wait_s = self.config.connect_timeout_s if timeout_s is None else timeout_s
        await wait_until_serving(self._channel, SERVICE, target=self.address, timeout_s=wait_s)

    async def get_run(self) -> trainer_service_pb2.Run:
        """Where the run stands."""
        async with rpc_errors(self.address):
            response = await self._stub.GetRun(trainer_service_pb2.GetRunRequest(), timeout=self.config.timeout_s)
        return response.run

    async def watch_run(self, from_step: int = 0) -> AsyncIterator[trainer_service_pb2.WatchRunResponse]:
        """State changes and steps until the run ends."""
        call = self._stub.WatchRun(trainer_service_pb2.WatchRunRequest(from_step=from_step))
        async for response in responses_of(call, self.address):
            yield response

    async def submit_trajectories(
        self, trajectories: Iterable[Trajectory], *, timeout_s: float = 600.0
    ) -> trainer_service_pb2.SubmitTrajectoriesResponse:
        """Trajectories from outside; the answer speaks of each."""

        async def requests() -> AsyncIterator[trainer_service_pb2.SubmitTrajectoriesRequest]:
            for trajectory in trajectories:
                yield trainer_service_pb2.SubmitTrajectoriesRequest(trajectory=trajectory_to_proto(trajectory))

        async with rpc_errors(self.address):
            return await self._stub.SubmitTrajectories(requests(), timeout=timeout_s)

    async def pause_run(self, reason: str = "") -> trainer_service_pb2.Run:
        """Stop before the next step."""
        async with rpc_errors(self.address):
            request = trainer_service_pb2.PauseRunRequest(reason=reason)
            response = await self._stub.PauseRun(request, timeout=self.config.timeout_s)
        return response.run

    async def resume_run(self) -> trainer_service_pb2.Run:
        """Go on."""
        async with rpc_errors(self.address):
            response = await self._stub.ResumeRun(trainer_service_pb2.ResumeRunRequest(), timeout=self.config.timeout_s)
        return response.run

    async def save_checkpoint(self, *, timeout_s: float = 600.0) -> trainer_service_pb2.SaveCheckpointResponse:
        """Returns when the checkpoint is durable."""
        async with rpc_errors(self.address):
            request = trainer_service_pb2.SaveCheckpointRequest(timeout=duration_pb2.Duration(seconds=int(timeout_s)))
            return await self._stub.SaveCheckpoint(request, timeout=timeout_s + self.config.timeout_s)
