"""``opd.v1.TrainerService``: the run, seen and steered from outside."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
from opd.v1 import trainer_service_pb2, trainer_service_pb2_grpc

from opd_mesh.convert import policy_to_proto, trajectory_from_proto
from opd_mesh.errors import DeadlineError, OpdError, PreconditionError
from opd_mesh.rpc.server import with_idle_timeout
from opd_mesh.rpc.status import status_of
from opd_mesh.trajectory import Trajectory
from student_trainer.run_state import Phase, RunState

SAVE_TIMEOUT_S = 600.0
_PHASES: dict[Phase, trainer_service_pb2.RunState] = {
    Phase.STARTING: trainer_service_pb2.RUN_STATE_STARTING,
    Phase.RUNNING: trainer_service_pb2.RUN_STATE_RUNNING,
    Phase.PAUSED: trainer_service_pb2.RUN_STATE_PAUSED,
    Phase.FINISHED: trainer_service_pb2.RUN_STATE_FINISHED,
    Phase.FAILED: trainer_service_pb2.RUN_STATE_FAILED,
}


class TrainerServicer(trainer_service_pb2_grpc.TrainerServiceServicer):
    """Steers a run through three functions; what it tells comes from the :class:`RunState`.

    Args:
        submit: takes a trajectory from outside; True if it is new, False if it is known.
        save: writes a checkpoint after the step in progress; returns (path, step).
    """

    def __init__(
        self,
        state: RunState,
        *,
        submit: Callable[[Trajectory], Awaitable[bool]],
        save: Callable[[], Awaitable[tuple[Path, int]]],
        idle_timeout_s: float,
    ) -> None:
        self._state = state
        self._submit = submit
        self._save = save
        self._idle_timeout_s = idle_timeout_s

    async def GetRun(
        self, request: trainer_service_pb2.GetRunRequest, context: grpc.aio.ServicerContext
    ) -> trainer_service_pb2.GetRunResponse:
        """Where the run stands."""
        return trainer_service_pb2.GetRunResponse(run=self._run())

    async def WatchRun(
        self, request: trainer_service_pb2.WatchRunRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[trainer_service_pb2.WatchRunResponse]:
        """State and steps as they come."""
        sent = 0
        last: trainer_service_pb2.Run | None = None
        async for _ in self._state.watch():
            run = self._run()
            if run != last:
                yield trainer_service_pb2.WatchRunResponse(run=run)
                last = run
            lines = self._state.metrics.lines
            while sent < len(lines):
                line = lines[sent]
                sent += 1
                if line["step"] >= request.from_step:
                    step = trainer_service_pb2.StepMetrics(step=int(line["step"]), metrics=line)
                    yield trainer_service_pb2.WatchRunResponse(step=step)

    async def SubmitTrajectories(
        self,
        request_iterator: AsyncIterator[trainer_service_pb2.SubmitTrajectoriesRequest],
        context: grpc.aio.ServicerContext,
    ) -> trainer_service_pb2.SubmitTrajectoriesResponse:
        """Each item on its own."""
        if self._state.ended:
            raise PreconditionError(f"the run is {self._state.phase}")
        response = trainer_service_pb2.SubmitTrajectoriesResponse()
        index = 0
        async for request in with_idle_timeout(request_iterator, self._idle_timeout_s, "SubmitTrajectories"):
            try:
                if await self._submit(trajectory_from_proto(request.trajectory)):
                    response.accepted += 1
                else:
                    response.duplicates += 1
            except OpdError as error:
                response.refused.add(
                    index=index, trajectory_id=request.trajectory.trajectory_id, status=status_of(error)
                )
            index += 1
        return response

    async def PauseRun(
        self, request: trainer_service_pb2.PauseRunRequest, context: grpc.aio.ServicerContext
    ) -> trainer_service_pb2.PauseRunResponse:
        """Stop before the next step."""
        self._state.pause()
        return trainer_service_pb2.PauseRunResponse(run=self._run())

    async def ResumeRun(
        self, request: trainer_service_pb2.ResumeRunRequest, context: grpc.aio.ServicerContext
    ) -> trainer_service_pb2.ResumeRunResponse:
        """Go on."""
        self._state.resume()
        return trainer_service_pb2.ResumeRunResponse(run=self._run())

    async def SaveCheckpoint(
        self, request: trainer_service_pb2.SaveCheckpointRequest, context: grpc.aio.ServicerContext
    ) -> trainer_service_pb2.SaveCheckpointResponse:
        """Durable when it answers."""
        timeout_s = request.timeout.ToNanoseconds() / 1e9 or SAVE_TIMEOUT_S
        try:
            async with asyncio.timeout(timeout_s):
                path, step = await self._save()
        except TimeoutError:
            raise DeadlineError(f"the step in progress did not end within {timeout_s:g} s") from None
        return trainer_service_pb2.SaveCheckpointResponse(path=str(path), step=step)

    def _run(self) -> trainer_service_pb2.Run:
        state = self._state
        run = trainer_service_pb2.Run(
            run_id=state.run_id,
            state=_PHASES[state.phase],
            step=state.step,
            total_steps=state.total_steps,
            error=state.error,
            phase=state.activity,
            warnings=state.warnings,
        )
        if state.policy is not None:
            run.policy.CopyFrom(policy_to_proto(state.policy))
        if state.metrics.lines:
            run.metrics.update({k: v for k, v in state.metrics.lines[-1].items() if math.isfinite(v)})
        run.started_at.FromMilliseconds(int(state.started_at * 1000))
        return run
