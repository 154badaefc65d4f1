"""Client of ``opd.v1.TeacherService``: one teacher server, or several replicas of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import grpc
from opd.v1 import teacher_service_pb2, teacher_service_pb2_grpc

from opd_mesh.clients.base import ServiceClient
from opd_mesh.clients.head_download import HeadData, HeadDownload
from opd_mesh.clients.replica import Replica, ReplicaCounts, speaks_of_the_replica
from opd_mesh.clients.replicas import ReplicaSet
from opd_mesh.clients.scoring_stream import ScoreRequest, ScoreResult, ScoringStream, WireCount, open_scoring_call
from opd_mesh.config.services import ChannelConfig
from opd_mesh.errors import (
    DeadlineError,
    HeadMismatchError,
    OpdError,
    OverloadedError,
    PreconditionError,
    TeacherUnavailableError,
    UnavailableError,
    UnimplementedError,
)
from opd_mesh.rpc.channel import responses_of, rpc_errors, targets_text
from opd_mesh.tensors import dtype_name

SERVICE = "opd.v1.TeacherService"
log = logging.getLogger("opd_mesh.replicas")


@dataclass
class TeacherClient(ServiceClient):
    """One or several replicas of the same teachers: addresses, and host names of which every record is a replica.

    Attributes:
        probe: asked (replica's address, teacher id) of every replica that joins or comes back, for every teacher on it;
            where it raises, that teacher gets no items there.
    """

    addresses: Sequence[str]
    config: ChannelConfig = field(default_factory=ChannelConfig)

    def __post_init__(self) -> None:
        self.wire = WireCount()
        self.retries = 0  # items asked again of another replica
        self.probe: Callable[[str, str], Awaitable[None]] | None = None
        self._cards: dict[str, tuple[str, teacher_service_pb2.TeacherCard]] = {}  # as first seen, and where
        self._replicas = ReplicaSet(self.addresses, SERVICE, self.config, self._admit)

    async def close(self) -> None:
        """Ends streams and channels."""
        await self._replicas.close()

    @property
    def name(self) -> str:
        """The addresses as given: the same for as long as the client lives, whoever is behind them."""
        return targets_text(self.addresses)

    @property
    def target(self) -> str:
        """The replicas present now, for messages; as a key, use :attr:`name`."""
        return self._replicas.target

    @property
    def _channel(self) -> grpc.aio.Channel:  # type: ignore[override]
        return self._replicas.all[0].channel

    @property
    def _stub(self) -> teacher_service_pb2_grpc.TeacherServiceStub:
        return _stub_of(self._replicas.all[0])

    @property
    def is_lone(self) -> bool:
        """Whether there is one address, and no name behind which others may appear."""
        return self._replicas.lone

    def replicas_of(self, teacher_id: str) -> list[str]:
        """Addresses of those that can be asked about this teacher now."""
        return [replica.address for replica in self._replicas.all if self._replicas.lone or replica.serves(teacher_id)]

    def counts(self) -> dict[str, ReplicaCounts]:
        """Items, retries and failures by address."""
        return {replica.address: replica.counts for replica in self._replicas.all}

    def troubles(self) -> str:
        """What is the matter with each replica, for a message; of a single one nothing is known."""
        return "" if self._replicas.lone else self._replicas.troubles()

    # --- cards and heads ---------------------------------------------------------------------------------------
    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait for one replica that serves; those that do not are told in the log, and join when they do.

        Raises:
            UnavailableError: none within ``timeout_s`` (default: the channel's ``connect_timeout_s``).
        """
        await self._replicas.ready(self.config.connect_timeout_s if timeout_s is None else timeout_s)

    def require_agreement(self, teacher_id: str) -> None:
        """Raises :class:`PreconditionError` where a replica that serves has other weights, or another tokenizer."""
        for replica in self._replicas.all:
            if (error := replica.refused.get(teacher_id)) is not None:
                raise error

    async def _admit(self, replica: Replica) -> None:
        try:
            cards = await self._list(replica)
        except UnimplementedError:
            return  # a server of another make; every item names the digest that it expects
        replica.refused = {}
        # Without a probe nothing below waits, up to where it counts as serving: whoever sets one now and then lists
        # the replicas that serve has missed nobody.
        for card in cards:
            address, known = self._cards.setdefault(card.teacher_id, (replica.address, card))
            error = _disagreement(address, known, replica.address, card)
            if error is None and self.probe is not None:
                try:
                    await self.probe(replica.address, card.teacher_id)
                except PreconditionError as refusal:
                    error = refusal
            if error is not None:
                replica.refused[card.teacher_id] = error
                log.error("replica %s gets no items for teacher %r: %s", replica, card.teacher_id, error)
        replica.teacher_ids = frozenset(card.teacher_id for card in cards)

    async def _list(self, replica: Replica) -> list[teacher_service_pb2.TeacherCard]:
        async with rpc_errors(replica.address):
            stub = _stub_of(replica)
            response = await stub.ListTeachers(teacher_service_pb2.ListTeachersRequest(), timeout=self.config.timeout_s)
        return list(response.teachers)

    async def _get(
        self, replica: Replica, request: teacher_service_pb2.GetTeacherRequest
    ) -> teacher_service_pb2.GetTeacherResponse:
        async with rpc_errors(replica.address):
            stub = _stub_of(replica)
            return await stub.GetTeacher(request, timeout=self.config.timeout_s)

    async def list_teachers(self) -> list[teacher_service_pb2.TeacherCard]:
        """All cards of one replica."""
        return await self._replicas.ask_any("", self._list)

    async def get_teacher(self, teacher_id: str) -> teacher_service_pb2.TeacherCard:
        """One card. Raises :class:`UnknownTeacherError`."""
        request = teacher_service_pb2.GetTeacherRequest(teacher_id=teacher_id)
        return (await self._replicas.ask_any(teacher_id, lambda replica: self._get(replica, request))).teacher

    async def get_vocabulary(self, teacher_id: str) -> dict[str, int]:
        """Token → id of the teacher's tokenizer."""
        request = teacher_service_pb2.GetTeacherRequest(teacher_id=teacher_id, include_vocabulary=True)
        response = await self._replicas.ask_any(teacher_id, lambda replica: self._get(replica, request))
        return {entry.token.decode("utf-8", "surrogatepass"): entry.id for entry in response.vocabulary}

    async def get_head(self, teacher_id: str, *, digest: str = "", timeout_s: float = 600.0) -> HeadData:
        """Download a head, resuming by offset where the stream breaks, from another replica if there is one.

        Raises:
            HeadMismatchError: the head served is not the one of ``digest``.
            TeacherUnavailableError: not here, whole, within ``timeout_s``.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        download = HeadDownload(digest)
        last: OpdError | None = None
        avoid: set[str] = set()
        while True:
            replica = await self._replicas.pick(teacher_id, avoid, max(0.0, deadline - loop.time()))
            try:
                if replica is None:
                    raise last or UnavailableError(self.troubles())
                left_s = max(0.0, deadline - loop.time())
                return await self._replicas.while_there(replica, self._go_on(download, replica, teacher_id, left_s))
            except (UnavailableError, DeadlineError) as error:
                # The last attempt may die of the deadline itself; what kept it from succeeding is the better message.
                last = error if isinstance(error, UnavailableError) or last is None else last
                if loop.time() >= deadline or isinstance(error, DeadlineError):
                    raise TeacherUnavailableError(
                        f"the head of teacher {teacher_id!r} did not arrive within {timeout_s:g} s: {last}"
                    ) from error
                avoid = {replica.address} if replica is not None else set()
                if not self._replicas.usable(teacher_id, avoid):
                    avoid = set()
                    await asyncio.sleep(min(1.0, max(0.0, deadline - loop.time())))

    async def _go_on(self, download: HeadDownload, replica: Replica, teacher_id: str, timeout_s: float) -> HeadData:
        request = teacher_service_pb2.GetHeadRequest(
            teacher_id=teacher_id, digest=download.digest, offset=download.offset
        )
        stub = _stub_of(replica)
        async for response in responses_of(stub.GetHead(request, timeout=timeout_s), replica.address):
            self.wire.received += response.ByteSize()
            download.take(response)
        return download.finish()

    # --- scoring -----------------------------------------------------------------------------------------------
    async def score(self, request: ScoreRequest) -> ScoreResult:
        """One item over a standing stream, asked of every replica in turn, once, until one answers.

        Whether to ask them again is the caller's to say (scoring is pure, so it is safe). An item that another replica
        could answer, too, has a deadline that grows with the tokens asked for; a replica that misses it is lost: what
        else is in flight there goes elsewhere at once.

        Raises:
            OpdError: as :meth:`ScoringStream.score`, of the last replica asked; :class:`UnavailableError` where none
                can be asked.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + request.timeout_s
        tried: list[str] = []
        last: OpdError | None = None
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    place = await self._replicas.place(request.teacher_id, len(request.token_ids), tried)
            except TimeoutError:
                why = f"no replica was free for teacher {request.teacher_id!r} within {request.timeout_s:g} s"
                raise last or DeadlineError(why, metadata={"teacher_id": request.teacher_id}) from None
            except OpdError as none_left:
                raise last or none_left from None
            with place as replica:
                self.retries += bool(tried)
                replica.counts.retries += bool(tried)
                tried.append(replica.address)
                try:
                    return await self._attempt(replica, request, deadline - loop.time(), tried)
                except OpdError as error:
                    if not speaks_of_the_replica(error) or self._replicas.lone:
                        raise
                    last = error

    async def _attempt(
        self, replica: Replica, request: ScoreRequest, left_s: float, tried: Sequence[str]
    ) -> ScoreResult:
        timeout_s = left_s  # where nobody else could answer, giving up would only queue it again
        if self._replicas.usable(request.teacher_id, tried):
            config = self.config
            timeout_s = config.item_timeout_s + config.item_timeout_per_token_s * replica.tokens_in_flight
            timeout_s = min(timeout_s, left_s / 2)  # the other needs time, too
        stream = self._stream_to(replica)
        try:
            result = await stream.score(replace(request, timeout_s=max(0.0, timeout_s)))
        except OpdError as error:
            self._blame(replica, stream, error, late=timeout_s < left_s)
            raise
        replica.circuit.succeed()
        replica.counts.items += 1
        return self._checked(replica, request, result)

    def _blame(self, replica: Replica, stream: ScoringStream, error: OpdError, *, late: bool) -> None:
        """What an item's error says of the replica. ``late``: a missed deadline is its fault, not the caller's."""
        if not speaks_of_the_replica(error):
            replica.circuit.succeed()  # it answered
            return
        replica.counts.failures += 1
        if self._replicas.lone or replica.stream is not stream:
            return  # nothing else to ask; or lost already, with all that was in flight
        if isinstance(error, OverloadedError):
            self._replicas.busy(replica, error)
        elif stream.broken is not None or (late and isinstance(error, DeadlineError)):
            self._replicas.lose(replica, error)
        elif not isinstance(error, DeadlineError):
            self._replicas.failed(replica, error)

    def _stream_to(self, replica: Replica) -> ScoringStream:
        stream = replica.stream
        if not isinstance(stream, ScoringStream) or stream.broken is not None:
            call = open_scoring_call(replica.channel)
            stream = replica.stream = ScoringStream(call, replica.address, self.wire)
        return stream

    @staticmethod
    def _checked(replica: Replica, request: ScoreRequest, result: ScoreResult) -> ScoreResult:
        if request.expected_head_digest and result.head_digest != request.expected_head_digest:
            raise HeadMismatchError(
                f"{replica.address} answered with head {result.head_digest[:12]}…, expected "
                f"{request.expected_head_digest[:12]}…: the teacher's weights changed during the run",
                metadata={"teacher_id": request.teacher_id},
            )
        return result

    async def score_at(self, address: str, request: ScoreRequest) -> ScoreResult:
        """One attempt at one replica, whatever its health.

        Raises:
            UnavailableError: it is no replica any more.
            OpdError: as :meth:`ScoringStream.score`.
        """
        replica = next((each for each in self._replicas.all if each.address == address), None)
        if replica is None:
            raise UnavailableError(f"{address} is no replica of {self.name} any more", metadata={"target": address})

        async def ask(replica: Replica) -> ScoreResult:
            return self._checked(replica, request, await self._stream_to(replica).score(request))

        return await self._replicas.while_there(replica, ask(replica))

    def leave_out(self, address: str, error: OpdError) -> None:
        """This replica gets no items until it is admitted again, which asks :attr:`probe`; those in flight move."""
        for replica in self._replicas.all:
            if replica.address == address and not self._replicas.lone:
                self._replicas.lose(replica, error)

    @asynccontextmanager
    async def scoring_stream(self) -> AsyncIterator[ScoringStream]:
        """A stream of one's own, to the first replica."""
        replica = self._replicas.all[0]
        stream = ScoringStream(open_scoring_call(replica.channel), replica.address, self.wire)
        try:
            yield stream
        finally:
            await stream.close()


def _stub_of(replica: Replica) -> teacher_service_pb2_grpc.TeacherServiceStub:
    return teacher_service_pb2_grpc.TeacherServiceStub(replica.channel)


def _disagreement(
    first: str, one: teacher_service_pb2.TeacherCard, second: str, other: teacher_service_pb2.TeacherCard
) -> PreconditionError | None:
    """Why two replicas are not the same teacher."""
    for name, left, right in (
        ("teacher digest", one.teacher_digest, other.teacher_digest),
        ("head digest", one.head.digest, other.head.digest),
        ("tokenizer fingerprint", one.tokenizer_fingerprint, other.tokenizer_fingerprint),
        ("dtype", dtype_name(one.dtype) if one.dtype else "", dtype_name(other.dtype) if other.dtype else ""),
    ):
        if left != right:
            return PreconditionError(
                f"replicas {first} and {second} of teacher {one.teacher_id!r} disagree: {name} {left or 'none'} "
                f"against {right or 'none'}. Serve the same files from both, or take one out of the addresses",
                field=f"teachers.{one.teacher_id}.addresses",
                metadata={"teacher_id": one.teacher_id, "replicas": f"{first}, {second}"},
            )
    return None
