"""The requests of a server: what was asked, what has been written, who is listening."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from opd_mesh.errors import InvalidInputError, OpdError, RequestConflictError, RequestNotFoundError
from opd_mesh.trajectory import FinishReason, SamplingParams, Trajectory
from rollout_server.generation import TokenEvent
from rollout_server.log_format import pack_ids, unpack_ids


@dataclass(frozen=True, slots=True)
class RequestParams:
    """Everything that makes two uses of one ``request_id`` the same request.

    Attributes:
        shared_prefix_tokens: see ``GenerateRequest``. That of the first use counts, and another is no conflict: it says
            how a prompt is read, not what is written.
    """

    request_id: str
    run_id: str
    domain: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    publish: bool
    tokenizer_fingerprint: str
    shared_prefix_tokens: int = field(default=0, compare=False)

    @property
    def key(self) -> str:
        """Names the request in this server: ``request_id`` is unique in its run only, and runs follow each other."""
        return f"{len(self.run_id)}:{self.run_id}:{self.request_id}"


@dataclass(slots=True, eq=False)
class RequestState:
    """A request from admission until it is forgotten."""

    params: RequestParams
    lineage: int
    # Names it in the log; −1 without one.
    handle: int = -1
    # Tokens that were found in the log when this process began; what came after them may have come otherwise before.
    recovered: int = 0
    tokens: list[int] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    policy_logprobs: list[float] = field(default_factory=list)
    policy_versions: list[int] = field(default_factory=list)
    kept: list[bytes] = field(default_factory=list)  # with ``keep_mask``, the ids each was drawn from, packed
    finish_reason: FinishReason | None = None
    error: OpdError | None = None
    # True where `error` is the end of it. Otherwise it may yet be delivered, or be written on by another server.
    failed: bool = False
    # True once the trajectory is where it belongs (on the Redis stream, if it was to be published).
    delivered: bool = False
    stream_entry_id: str = ""
    # Set to deliver at once what could not be delivered before; None until that has happened.
    again: asyncio.Event | None = None
    # Called once, when it has ended; then forgotten.
    on_end: list[Callable[[RequestState], None]] = field(default_factory=list)
    _changed: asyncio.Event | None = None  # made when somebody waits

    @property
    def ended(self) -> bool:
        """Nothing more will be written, and listeners may be told so."""
        return self.error is not None or self.delivered

    def append(self, event: TokenEvent) -> None:
        """Take one token."""
        self.tokens.append(event.token_id)
        self.sampling_logprobs.append(event.sampling_logprob)
        self.policy_logprobs.append(event.policy_logprob)
        self.policy_versions.append(event.policy_version)
        if event.kept:
            self.kept.append(pack_ids(event.kept))
        self.finish_reason = event.finish_reason

    def when_ended(self, tell: Callable[[RequestState], None]) -> None:
        """Call ``tell`` once, as soon as it has ended: at once, where it has."""
        if self.ended:
            tell(self)
        else:
            self.on_end.append(tell)

    def hurry(self) -> None:
        """Deliver at once what could not be delivered before."""
        if self.again is not None:
            self.again.set()

    def notify(self) -> None:
        """Wake every listener."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None
        if self.on_end and self.ended:
            listeners, self.on_end = self.on_end, []
            for tell in listeners:
                tell(self)

    async def wait_change(self) -> None:
        """Until the next :meth:`notify`."""
        if self._changed is None:
            self._changed = asyncio.Event()
        await self._changed.wait()

    def trajectory(self) -> Trajectory:
        """What has been written, as a trajectory; without a scored span if that is nothing."""
        prompt = self.params.prompt_ids
        span = ((len(prompt), len(prompt) + len(self.tokens)),) if self.tokens else ()
        return Trajectory(
            trajectory_id=self.params.request_id,
            domain=self.params.domain,
            token_ids=(*prompt, *self.tokens),
            scored_spans=span,
            sampling_logprobs=tuple(self.sampling_logprobs),
            policy_logprobs=tuple(self.policy_logprobs),
            policy_versions=tuple(self.policy_versions),
            sampling=self.params.sampling,
            finish_reason=self.finish_reason or FinishReason.CANCELLED,
            run_id=self.params.run_id,
            lineage=self.lineage,
            kept_token_ids=tuple(map(unpack_ids, self.kept)),
        )


class RequestTable:
    """All requests by key; of those that ended, the newest ``finished_kept``.

    Args:
        on_forgotten: called with those that are let go of.
    """

    def __init__(
        self, *, finished_kept: int, on_forgotten: Callable[[Sequence[RequestState]], None] = lambda states: None
    ) -> None:
        self._finished_kept = finished_kept
        self._on_forgotten = on_forgotten
        self._states: dict[str, RequestState] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()

    def find(self, params: RequestParams) -> RequestState | None:
        """The request of these parameters, if it is known.

        Raises:
            RequestConflictError: the id is known with other parameters; names the first that differs.
        """
        state = self._states.get(params.key)
        if state is None or state.params == params:
            return state
        differing = next(
            name for name in RequestParams.__slots__ if getattr(state.params, name) != getattr(params, name)
        )
        raise RequestConflictError(
            f"request {params.request_id!r} is known with another {differing}; choose a new request_id", field=differing
        )

    def get(self, request_id: str, run_id: str = "") -> RequestState:
        """A request by its id, and its run where several have that id.

        Raises:
            RequestNotFoundError: there is none.
            InvalidInputError: several runs have it, and ``run_id`` is empty.
        """
        found = [
            state
            for state in self._states.values()
            if state.params.request_id == request_id and run_id in ("", state.params.run_id)
        ]
        if not found:
            raise RequestNotFoundError(f"no request {request_id!r} here", field="request_id")
        if len(found) > 1:
            raise InvalidInputError(f"{len(found)} runs have a request {request_id!r}; name one", field="run_id")
        return found[0]

    def lookup(self, key: str) -> RequestState | None:
        """The request, or None."""
        return self._states.get(key)

    def add(self, state: RequestState) -> None:
        """A new request."""
        self._states[state.params.key] = state

    def forget(self, key: str) -> None:
        """As if it had never been asked. Not one that has ended."""
        self._states.pop(key, None)

    def mark_ended(self, *states: RequestState) -> None:
        """They may be forgotten when newer ones have ended."""
        for state in states:
            if self._states.get(state.params.key) is state:  # else dropped meanwhile
                self._ended[state.params.key] = None
        if (surplus := len(self._ended) - self._finished_kept) > 0:
            oldest = [self._ended.popitem(last=False)[0] for _ in range(surplus)]
            self._on_forgotten([self._states.pop(key) for key in oldest])

    def drop(self, state: RequestState) -> None:
        """Let go of it for good, ended or not."""
        self._ended.pop(state.params.key, None)
        self._on_forgotten([self._states.pop(state.params.key)])

    def undelivered(self) -> list[RequestState]:
        """Those that are being written, or wait, or could not be delivered yet."""
        return [state for state in self._states.values() if not state.failed and not state.delivered]
