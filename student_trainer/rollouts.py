"""The student's writing: requests to the rollout servers, trajectories back through the Redis stream."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError
from opd.v1 import common_pb2, rollout_service_pb2

from opd_mesh.clients.rollout import GenerateSpec, RolloutClient
from opd_mesh.config.recipe import Recipe
from opd_mesh.convert import policy_to_proto, trajectory_from_proto, trajectory_to_proto
from opd_mesh.errors import (
    ConfigError,
    OpdError,
    StreamUnavailableError,
    TokenizerMismatchError,
    TrajectoryError,
    UnavailableError,
)
from opd_mesh.policy import PolicyId
from opd_mesh.seeds import derive_seed
from opd_mesh.stream import TrajectoryStream
from opd_mesh.trajectory import SamplingParams, Trajectory
from student_trainer.data import Prompt

log = logging.getLogger("student_trainer")
READ_BLOCK_S = 0.5
READ_COUNT = 64


@dataclass(frozen=True, slots=True)
class Arrival:
    """A trajectory and the stream entry that holds it until it is acknowledged."""

    trajectory: Trajectory
    entry_id: str


def own_trajectory_id(lineage: int, step: int, index: int) -> str:
    """Unique in the run, over resumes too."""
    return f"l{lineage:04d}-s{step:06d}-p{index:04d}"


def is_own_id(trajectory_id: str) -> bool:
    """Whether an id is of the form that the run gives to its own trajectories (or its evaluations)."""
    return trajectory_id[:1] in ("l", "e") and trajectory_id[1:5].isdigit() and trajectory_id[5:6] == "-"


async def _policy_once_loaded(client: RolloutClient) -> rollout_service_pb2.GetPolicyResponse:
    """A server answers health before its model is there. Raises :class:`UnavailableError` where that takes too long."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + client.config.connect_timeout_s
    while True:
        try:
            return await client.get_policy()
        except UnavailableError as error:
            if loop.time() > deadline:
                raise
            await asyncio.sleep(min(error.retry_delay_s or 0.5, max(0.0, deadline - loop.time())))


class Rollouts:
    """All rollout servers of a run, and its stream."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        run_id: str,
        tokenizer_fingerprint: str,
        eos_token_id: int | None,
        vocab_size: int,
    ) -> None:
        self._recipe = recipe
        self._vocab_size = vocab_size
        self._run_id = run_id
        self._fingerprint = tokenizer_fingerprint
        stop = list(recipe.rollout.stop_token_ids)
        if eos_token_id is not None and eos_token_id not in stop:
            stop.append(eos_token_id)
        self._stop_token_ids = tuple(stop)
        self._clients = [
            RolloutClient(address, recipe.rollout.peers.channel) for address in recipe.rollout.peers.addresses
        ]
        url = recipe.redis_url or os.environ.get("OPD_REDIS_URL")
        if not self._clients:
            raise ConfigError("names no rollout server", field="rollout.peers.addresses")
        if not url:
            raise ConfigError("no Redis: set OPD_REDIS_URL, or redis_url in the recipe", field="redis_url")
        self.stream = TrajectoryStream(url, run_id, consumer="trainer-0", timeout_s=recipe.redis_timeout_s)
        self._submitted: set[str] = set()
        self.external: deque[Arrival] = deque()
        # Entries that must be acknowledged at the next checkpoint though nothing trains on them.
        self.discarded: list[str] = []

    async def connect(self) -> None:
        """Wait for every server and for Redis.

        Raises:
            UnavailableError, StreamUnavailableError: naming the address.
            TokenizerMismatchError: a server loaded another tokenizer.
        """
        await self.stream.length()
        for client in self._clients:
            await client.wait_ready()
            policy = await _policy_once_loaded(client)
            if policy.tokenizer_fingerprint != self._fingerprint:
                raise TokenizerMismatchError(
                    f"rollout server {client.address} has tokenizer {policy.tokenizer_fingerprint[:16]}…, the student "
                    f"in {self._recipe.student.path} has {self._fingerprint[:16]}…; start it with the same checkpoint"
                )

    def sampling(self, domain: str, *key: int | str) -> SamplingParams:
        """How a response is drawn: a pure function of (run seed, key)."""
        rollout = self._recipe.rollout
        return SamplingParams(
            seed=derive_seed(self._recipe.run.seed, domain, *key),
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_new_tokens=self._recipe.domains[domain].max_new_tokens or rollout.max_new_tokens,
            stop_token_ids=self._stop_token_ids,
        )

    def spec(self, request_id: str, prompt: Prompt, sampling: SamplingParams, *, publish: bool) -> GenerateSpec:
        """A request for one response."""
        return GenerateSpec(
            request_id=request_id,
            run_id=self._run_id,
            domain=prompt.domain,
            prompt_token_ids=prompt.token_ids,
            sampling=sampling,
            tokenizer_fingerprint=self._fingerprint,
            publish=publish,
        )

    def _owner(self, index: int) -> RolloutClient:
        return self._clients[index % len(self._clients)]

    async def push_policy(self, policy: PolicyId, tensors: Sequence[tuple[str, np.ndarray]]) -> float:
        """Give the weights to every server; returns the longest time that one stood still, in seconds."""
        message = policy_to_proto(policy)
        answers = await asyncio.gather(
            *(
                client.update_policy(
                    message,
                    tensors,
                    tokenizer_fingerprint=self._fingerprint,
                    timeout_s=self._recipe.rollout.timeout_s,
                )
                for client in self._clients
            )
        )
        return max(answer.pause_s for answer in answers)

    async def write_unpublished(self, specs: Sequence[GenerateSpec]) -> list[Trajectory]:
        """Responses that do not go to the stream: for evaluation."""
        timeout_s = self._recipe.rollout.timeout_s
        return await asyncio.gather(
            *(self._owner(index).generate(spec, timeout_s=timeout_s) for index, spec in enumerate(specs))
        )

    async def write(self, specs: Sequence[GenerateSpec]) -> AsyncIterator[Arrival]:
        """Ask for all responses and give each back as it comes through the stream.

        Raises:
            RolloutUnavailableError, StreamUnavailableError: a bounded wait has ended.
            OpdError: what a server says of a request.
        """
        timeout_s = self._recipe.rollout.timeout_s
        wanted = {spec.request_id for spec in specs}
        generating = [
            asyncio.create_task(self._owner(index).generate(spec, timeout_s=timeout_s))
            for index, spec in enumerate(specs)
        ]
        loop = asyncio.get_running_loop()
        all_written_at: float | None = None
        try:
            while wanted:
                for arrival in await self._read():
                    if arrival.trajectory.trajectory_id in wanted:
                        wanted.remove(arrival.trajectory.trajectory_id)
                        all_written_at = None
                        yield arrival
                    else:
                        self._sort_other(arrival)
                for task in generating:
                    if task.done():
                        written = task.result()  # raises what the server said
                        if not written.num_scored:  # cancelled from outside before its first token: never published
                            wanted.discard(written.trajectory_id)
                if wanted and all(task.done() for task in generating):
                    all_written_at = all_written_at or loop.time()
                    if loop.time() - all_written_at > self._recipe.redis_timeout_s:
                        raise StreamUnavailableError(
                            f"{len(wanted)} trajectories were published but do not arrive on "
                            f"{self.stream.stream_key} (first: {min(wanted)}); has the stream been trimmed by hand?"
                        )
        finally:
            for task in generating:
                task.cancel()
            await asyncio.gather(*generating, return_exceptions=True)

    async def _read(self) -> list[Arrival]:
        arrivals = []
        for entry in await self.stream.read(READ_COUNT, READ_BLOCK_S):
            try:
                trajectory = trajectory_from_proto(common_pb2.Trajectory.FromString(entry.payload))
                trajectory.validate()
                if not is_own_id(trajectory.trajectory_id):
                    self._check_external(trajectory)
            except (DecodeError, OpdError) as error:
                await self.stream.dead_letter(entry.entry_id, f"unusable: {error}")
                log.warning("stream entry %s is unusable and went to the dead letters: %s", entry.entry_id, error)
                continue
            arrivals.append(Arrival(trajectory, entry.entry_id))
        return arrivals

    def _sort_other(self, arrival: Arrival) -> None:
        """From outside: waits for its turn. Our own of an earlier lineage: written again in this one, so let go."""
        if is_own_id(arrival.trajectory.trajectory_id):
            self.discarded.append(arrival.entry_id)
        else:
            self.external.append(arrival)

    def _check_external(self, trajectory: Trajectory) -> None:
        trajectory.validate(vocab_size=self._vocab_size, max_tokens=self._recipe.rollout.engine.max_context_tokens)
        if trajectory.domain not in self._recipe.domains:
            known = ", ".join(self._recipe.domains)
            raise TrajectoryError(f"no teacher is routed to {trajectory.domain!r}; known are {known}", field="domain")
        if trajectory.run_id not in ("", self._run_id):
            raise TrajectoryError(f"belongs to {trajectory.run_id!r}, this is {self._run_id!r}", field="run_id")
        if not trajectory.policy_versions:
            raise TrajectoryError("required from outside: without it staleness is unknown", field="policy_versions")

    async def submit(self, trajectory: Trajectory) -> bool:
        """Take a trajectory from outside into the stream; False if it was taken before.

        Raises:
            TrajectoryError, TooLongError: naming the field.
            RequestConflictError: the id waits already with other contents.
        """
        self._check_external(trajectory)
        if is_own_id(trajectory.trajectory_id):
            raise TrajectoryError("this form is kept for the run's own trajectories", field="trajectory_id")
        payload = trajectory_to_proto(trajectory).SerializeToString(deterministic=True)
        await self.stream.publish(trajectory.trajectory_id, payload)
        is_new = trajectory.trajectory_id not in self._submitted
        self._submitted.add(trajectory.trajectory_id)
        return is_new

    async def acknowledge(self, entry_ids: Iterable[str]) -> None:
        """A durable checkpoint holds these, and what was discarded is of no use to anyone."""
        await self.stream.acknowledge([*entry_ids, *self.discarded])
        self.discarded.clear()

    async def close(self) -> None:
        """End the connections."""
        for client in self._clients:
            await client.close()
        await self.stream.close()
