"""The student's writing: requests to the rollout servers, trajectories back through the Redis stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from google.protobuf.message import DecodeError
from opd.v1 import common_pb2, rollout_service_pb2

from opd_mesh.clients.rollout import GenerateSpec, RolloutClient, Written
from opd_mesh.config.recipe import Recipe
from opd_mesh.convert import policy_to_proto, trajectory_from_proto, trajectory_to_proto
from opd_mesh.errors import (
    ConfigError,
    OpdError,
    PolicyBaseMismatchError,
    PreconditionError,
    StreamUnavailableError,
    TokenizerMismatchError,
    TrajectoryError,
    UnavailableError,
)
from opd_mesh.policy import PolicyId
from opd_mesh.policy_weights import PolicyWeights
from opd_mesh.seeds import derive_seed
from opd_mesh.stream import TrajectoryStream
from opd_mesh.trajectory import SamplingParams, Trajectory
from student_trainer.importance import check_behaviour
from student_trainer.rollout_watch import RolloutWatch
from student_trainer.tasks import Prompt
from student_trainer.tasks.judging import verdict_grammars
from student_trainer.writing import Arrival, Writing, is_own_id

log = logging.getLogger("student_trainer")
READ_BLOCK_S = 0.5
READ_COUNT = 512
CANCEL_TIMEOUT_S = 3.0


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
    """All rollout servers of a run, and its stream.

    Args:
        for_training: False: nothing is published, whatever the recipe trains, but everything needs a server.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        run_id: str,
        tokenizer_fingerprint: str,
        eos_token_id: int | None,
        vocab_size: int,
        for_training: bool = True,
    ) -> None:
        self._recipe = recipe
        self._vocab_size = vocab_size
        self._run_id = run_id
        self._fingerprint = tokenizer_fingerprint
        stop = list(recipe.rollout.stop_token_ids)
        if eos_token_id is not None and eos_token_id not in stop:
            stop.append(eos_token_id)
        self._stop_token_ids = tuple(stop)
        self._grammars = verdict_grammars(recipe)
        # Of every token that is trained on, the ids that it was drawn from are told: so many at most.
        self._kept_ids = recipe.rollout.top_k if recipe.keeps_masks and for_training else 0
        self._clients = [
            RolloutClient(address, recipe.rollout.peers.channel) for address in recipe.rollout.peers.addresses
        ]
        if not self._clients and (recipe.needs_rollouts or not for_training):
            raise ConfigError("names no rollout server", field="rollout.peers.addresses")
        url = recipe.redis_url or os.environ.get("OPD_REDIS_URL")
        publishes = recipe.writes and for_training
        if not url and publishes:
            raise ConfigError("no Redis: set OPD_REDIS_URL, or redis_url in the recipe", field="redis_url")
        self._stream: TrajectoryStream | None = None
        if url and publishes:
            self._stream = TrajectoryStream(url, run_id, consumer="trainer-0", timeout_s=recipe.redis_timeout_s)
        self.watch = RolloutWatch(self._clients)
        # A request may queue behind those of max_staleness earlier steps.
        self._generate_timeout_s = recipe.rollout.timeout_s * (1 + recipe.max_staleness)
        # Addresses of servers that have not the checkpoint that an adapter changes. Once merged weights, always: the
        # same version in the other form would be another policy to them.
        self._takes_merged: set[str] = set()
        self._outstanding = 0
        self._writings: list[Writing] = []
        self._reader: asyncio.Task[None] | None = None
        self._submitted: set[str] = set()
        self.external: deque[Arrival] = deque()
        # Entries that must be acknowledged at the next checkpoint though nothing trains on them.
        self.discarded: list[str] = []

    async def connect(self) -> None:
        """Wait for every server and for Redis.

        Raises:
            UnavailableError, StreamUnavailableError: naming the address.
            TokenizerMismatchError: a server loaded another tokenizer.
            PreconditionError: verdicts are constrained, and a server takes no grammars; or rollouts are truncated for a
                policy gradient, and it does not tell the ids that are left.
        """
        if self._stream is not None:
            await self._stream.length()
        for client in self._clients:
            await client.wait_ready()
            policy = await _policy_once_loaded(client)
            if policy.tokenizer_fingerprint != self._fingerprint:
                raise TokenizerMismatchError(
                    f"rollout server {client.address} has tokenizer {policy.tokenizer_fingerprint[:16]}…, the student "
                    f"in {self._recipe.student.path} has {self._fingerprint[:16]}…; start it with the same checkpoint"
                )
            if self._grammars and not policy.limits.grammars:
                field = f"domains.{min(self._grammars)}.judging.constrained"
                raise PreconditionError(
                    f"rollout server {client.address} takes no grammars (its log says why), and verdicts are to be "
                    f"constrained; start it with engine: transformers, or set {field} to false",
                    field=field,
                )
            if policy.limits.max_kept_ids < self._kept_ids:
                told = policy.limits.max_kept_ids
                raise PreconditionError(
                    f"rollout server {client.address} tells {f'at most {told}' if told else 'none'} of the ids that "
                    f"top_k and top_p leave, and {self._recipe.objective.name} needs the {self._kept_ids} of "
                    "rollout.top_k; start it with engine: transformers, or set top_p to 1 and top_k to 0",
                    field="rollout.top_k",
                )

    @property
    def stream(self) -> TrajectoryStream:
        """Of the run. Raises :class:`PreconditionError` where nothing is written to train on."""
        if self._stream is None:
            raise PreconditionError(f"the objective {self._recipe.objective.name} takes no trajectories")
        return self._stream

    def sampling(self, domain: str, *key: int | str) -> SamplingParams:
        """How a response is drawn: a pure function of (run seed, key); a verdict under its rubric's grammar, and what a
        policy gradient learns from with the ids that it was drawn from."""
        rollout = self._recipe.rollout
        return SamplingParams(
            seed=derive_seed(self._recipe.run.seed, domain, *key),
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_new_tokens=self._recipe.max_new_tokens(self._recipe.domains[domain]),
            stop_token_ids=self._stop_token_ids,
            grammar=self._grammars.get(domain, ""),
            keep_mask=self._recipe.keeps_masks,
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

    async def push_policy(
        self,
        policy: PolicyId,
        weights: PolicyWeights,
        *,
        merged: Callable[[], PolicyWeights],
        clients: Sequence[RolloutClient] | None = None,
    ) -> float:
        """Give the weights to every server; returns the longest time that one stood still, in seconds.

        Nobody reads the weights any more when this returns or raises: an error is raised when all have ended.

        Args:
            merged: all weights of the plain model, for servers that have not the checkpoint that an adapter changes.
            clients: only to these.
        """
        whole: asyncio.Task[PolicyWeights] | None = None

        async def give(client: RolloutClient) -> float:
            nonlocal whole
            if weights.adapter is None or client.address not in self._takes_merged:
                try:
                    return await self._give(client, policy, weights)
                except PolicyBaseMismatchError as error:
                    if weights.adapter is None:
                        raise
                    log.info("rollout server %s takes merged weights: %s", client.address, error)
            self._takes_merged.add(client.address)
            whole = whole or asyncio.create_task(asyncio.to_thread(merged))
            return await self._give(client, policy, await whole)

        try:
            pauses_s = await asyncio.gather(
                *map(give, self._clients if clients is None else clients), return_exceptions=True
            )
        finally:
            if whole is not None:  # not done only where this was cancelled
                whole.cancel()
                await asyncio.gather(whole, return_exceptions=True)
        for pause_s in pauses_s:
            if isinstance(pause_s, BaseException):
                raise pause_s
        return max((pause_s for pause_s in pauses_s if not isinstance(pause_s, BaseException)), default=0.0)

    async def _give(self, client: RolloutClient, policy: PolicyId, weights: PolicyWeights) -> float:
        answer = await client.update_policy(
            policy_to_proto(replace(policy, digest=weights.digest)),
            list(weights.tensors.items()),
            tokenizer_fingerprint=self._fingerprint,
            timeout_s=self._recipe.rollout.timeout_s,
            digests=weights.digests,
            adapter=weights.adapter,
        )
        return answer.pause_s

    # --- writing -----------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._outstanding += 1
        try:
            yield
        finally:
            self._outstanding -= 1

    async def _generate(self, server: RolloutClient, spec: GenerateSpec) -> Trajectory:
        with self._counted():
            return await server.generate(spec, timeout_s=self._generate_timeout_s)

    async def _write(self, server: RolloutClient, spec: GenerateSpec) -> Written:
        with self._counted():
            return await server.write(spec, timeout_s=self._generate_timeout_s)

    @property
    def outstanding(self) -> int:
        """Requests that are not answered."""
        return self._outstanding

    async def write_unpublished(self, specs: Sequence[GenerateSpec]) -> list[Trajectory]:
        """Responses that do not go to the stream: for evaluation."""
        return await asyncio.gather(
            *(self._generate(self._owner(index), spec) for index, spec in enumerate(specs)),
        )

    def write(self, specs: Sequence[GenerateSpec], on_arrival: Callable[[], None]) -> Writing:
        """Ask for all responses; they come through the stream, and :meth:`Writing.wait` raises what goes wrong."""
        writing = Writing(on_arrival)
        for index, spec in enumerate(specs):
            server = self._owner(index)
            writing.ask(spec.request_id, server, self._write(server, spec))
        self._writings.append(writing)
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_while_wanted())
        return writing

    async def abandon(self, writings: Sequence[Writing]) -> None:
        """Cancel what is outstanding, on the servers too where they answer soon."""
        open_requests: dict[str, RolloutClient] = {}
        for writing in writings:
            open_requests |= await writing.close()
            if writing in self._writings:
                self._writings.remove(writing)
        if open_requests:
            log.info("cancelling %d responses that nobody will read", len(open_requests))
            calls = [server.cancel(name, run_id=self._run_id) for name, server in open_requests.items()]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CANCEL_TIMEOUT_S):
                    await asyncio.gather(*calls, return_exceptions=True)

    # --- the stream --------------------------------------------------------------------------------------------
    async def _read_while_wanted(self) -> None:
        """The one reader of the stream: every arrival goes to the step that wants it."""
        try:
            while self._writings:
                arrivals = await self._read()
                for arrival in arrivals:
                    self._dispatch(arrival)
                self._writings = [writing for writing in self._writings if not writing.ended]
                for writing in self._writings:
                    self._check_overdue(writing)
        except Exception as error:  # noqa: BLE001 - handed to who waits for it
            for writing in self._writings:
                writing.fail(error)
            self._writings = []

    def _wanted_by(self, trajectory_id: str) -> Writing | None:
        return next((writing for writing in self._writings if trajectory_id in writing.wanted), None)

    def _dispatch(self, arrival: Arrival) -> None:
        if writing := self._wanted_by(arrival.trajectory.trajectory_id):
            writing.take(arrival)
        else:
            self._sort_other(arrival)

    def _check_overdue(self, writing: Writing) -> None:
        now = asyncio.get_running_loop().time()
        if not writing.all_answered:
            writing.all_written_at = None
            return
        writing.all_written_at = writing.all_written_at or now
        if now - writing.all_written_at > self._recipe.redis_timeout_s:
            writing.fail(
                writing.suspect
                or StreamUnavailableError(
                    f"{len(writing.wanted)} trajectories were published but do not arrive on "
                    f"{self.stream.stream_key} (first: {min(writing.wanted)}); has the stream been trimmed by hand?"
                )
            )

    async def _read(self) -> list[Arrival]:
        arrivals = []
        for entry in await self.stream.read(READ_COUNT, READ_BLOCK_S):
            try:
                trajectory = trajectory_from_proto(common_pb2.Trajectory.FromString(entry.payload))
                trajectory.validate()
                if not is_own_id(trajectory.trajectory_id):
                    self._check_external(trajectory)
                elif self._needs_ratios and self._wanted_by(trajectory.trajectory_id):
                    check_behaviour(trajectory, masks_applied=self._recipe.policy_gradient is not None)
            except (DecodeError, OpdError) as error:
                await self.stream.dead_letter(entry.entry_id, f"unusable: {error}")
                log.warning("stream entry %s is unusable and went to the dead letters: %s", entry.entry_id, error)
                if writing := self._wanted_by(entry.trajectory_id):
                    text = f"response {entry.trajectory_id} is unusable: {error}"
                    writing.suspect = TrajectoryError(text, field=error.field if isinstance(error, OpdError) else None)
                continue
            arrivals.append(Arrival(trajectory, entry.entry_id))
        return arrivals

    @property
    def _needs_ratios(self) -> bool:
        """Whether the log-probabilities of those who wrote have a part in the loss."""
        return self._recipe.importance is not None or self._recipe.policy_gradient is not None

    def _sort_other(self, arrival: Arrival) -> None:
        """From outside: waits for its turn. Our own of an earlier lineage: written again in this one, so let go."""
        if is_own_id(arrival.trajectory.trajectory_id):
            self.discarded.append(arrival.entry_id)
        else:
            self.external.append(arrival)

    def _check_external(self, trajectory: Trajectory) -> None:
        if not self._recipe.distils:
            raise PreconditionError(
                f"a run of {self._recipe.objective.name} takes no trajectories from outside: it compares responses to "
                "its own prompts",
                field="objective",
            )
        trajectory.validate(vocab_size=self._vocab_size, max_tokens=self._recipe.rollout.engine.max_context_tokens)
        if trajectory.domain not in self._recipe.domains:
            known = ", ".join(self._recipe.domains)
            raise TrajectoryError(f"no teacher is routed to {trajectory.domain!r}; known are {known}", field="domain")
        if trajectory.run_id not in ("", self._run_id):
            raise TrajectoryError(f"belongs to {trajectory.run_id!r}, this is {self._run_id!r}", field="run_id")
        if not trajectory.policy_versions:
            raise TrajectoryError("required from outside: without it staleness is unknown", field="policy_versions")
        if self._recipe.importance is not None:
            check_behaviour(trajectory, masks_applied=False)

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
        """A durable checkpoint holds these, and what was discarded is of no use to anyone. After a failure the next
        call repeats them."""
        done, self.discarded = [*entry_ids, *self.discarded], []
        if not done:
            return
        try:
            await self.stream.acknowledge(done)
        except BaseException:
            self.discarded += done
            raise

    async def close(self) -> None:
        """End the connections."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        await self.watch.close()
        for client in self._clients:
            await client.close()
        if self._stream is not None:
            await self._stream.close()
