"""Requests and the token log: what is written when, and requests as a log tells them.

``None`` in the place of the log is a server whose requests do not survive it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from google.protobuf.message import DecodeError
from opd.v1 import rollout_service_pb2

from opd_mesh.convert import sampling_from_proto, sampling_to_proto
from opd_mesh.errors import InternalError, OpdError, error_classes_by_reason
from rollout_server.engine import TokenEvent
from rollout_server.generation import GenerationRequest, WrittenToken
from rollout_server.requests import RequestParams, RequestState
from rollout_server.token_log import LoggedToken, RecoveredRequest, TokenLog

log = logging.getLogger("rollout_server")
_CLASSES = error_classes_by_reason()


def params_to_bytes(params: RequestParams) -> bytes:
    """As a ``GenerateRequest``: what the log keeps of a request, readable by any version and language."""
    return rollout_service_pb2.GenerateRequest(
        request_id=params.request_id,
        run_id=params.run_id,
        domain=params.domain,
        prompt_token_ids=params.prompt_ids,
        sampling=sampling_to_proto(params.sampling),
        publish=params.publish,
        tokenizer_fingerprint=params.tokenizer_fingerprint,
        shared_prefix_tokens=params.shared_prefix_tokens,
    ).SerializeToString()


def params_from_proto(request: rollout_service_pb2.GenerateRequest) -> RequestParams:
    """Raises :class:`opd_mesh.errors.InvalidInputError` for sampling parameters that cannot be."""
    return RequestParams(
        request_id=request.request_id,
        run_id=request.run_id,
        domain=request.domain,
        prompt_ids=tuple(request.prompt_token_ids),
        sampling=sampling_from_proto(request.sampling),
        publish=request.publish,
        tokenizer_fingerprint=request.tokenizer_fingerprint,
        shared_prefix_tokens=request.shared_prefix_tokens,
    )


def state_of(recovered: RecoveredRequest) -> RequestState:
    """A request as it was when the log's last owner ended.

    Raises:
        InternalError: the log holds a request that this version cannot read.
    """
    try:
        params = params_from_proto(rollout_service_pb2.GenerateRequest.FromString(recovered.payload))
    except (DecodeError, OpdError) as unreadable:
        raise InternalError(f"the log holds a request that cannot be read: {unreadable}") from unreadable
    error = recovered.error
    return RequestState(
        params,
        lineage=recovered.lineage,
        handle=recovered.handle,
        recovered=len(recovered.tokens),
        tokens=list(recovered.tokens),
        sampling_logprobs=list(recovered.sampling_logprobs),
        policy_logprobs=list(recovered.policy_logprobs),
        policy_versions=list(recovered.policy_versions),
        kept=list(recovered.kept),
        finish_reason=recovered.finish_reason,
        error=_CLASSES.get(error[0], InternalError)(error[1]) if error else None,
        failed=error is not None,
        delivered=recovered.delivered,
        stream_entry_id=recovered.stream_entry_id,
    )


def written_tokens(state: RequestState) -> tuple[WrittenToken, ...]:
    """For the engine: what has been written already."""
    columns = state.tokens, state.sampling_logprobs, state.policy_logprobs, state.policy_versions
    return tuple(map(WrittenToken, *columns))


def generation_request(state: RequestState) -> GenerationRequest:
    """For the engine: what is to be written, behind what has been."""
    params = state.params
    return GenerationRequest(
        params.key, params.prompt_ids, params.sampling, written_tokens(state), params.shared_prefix_tokens
    )


def states_of(recovered: Iterable[RecoveredRequest]) -> list[RequestState]:
    """All that can be read; what cannot stays in the log, and keeps nobody from the rest. Slow, so in a thread."""
    states = []
    for request in recovered:
        try:
            states.append(state_of(request))
        except InternalError as error:
            log.error("request %d of the log is left alone: %s", request.handle, error)  # noqa: TRY400
    return states


class RequestLog:
    """Writes the life of requests to a :class:`TokenLog`, or nowhere.

    :meth:`begin` and :meth:`record` write at once, in the engine's thread. The others only note what the next owner
    would find out for itself, and what may wait for a disk: a thread of their own writes them, in order.
    """

    def __init__(self, token_log: TokenLog | None) -> None:
        self._log = token_log
        self._notes = ThreadPoolExecutor(1, thread_name_prefix="log-notes")

    @property
    def kept(self) -> bool:
        """Requests survive the process."""
        return self._log is not None

    @property
    def full(self) -> bool:
        """The disk is full."""
        return self._log is not None and self._log.full

    def begin(self, states: Sequence[RequestState]) -> None:
        """Before the engine hears of them; all or none. Raises :class:`opd_mesh.errors.LogFullError`."""
        if self._log is not None and states:
            handles = self._log.begin_many([(params_to_bytes(state.params), state.lineage) for state in states])
            for state, handle in zip(states, handles, strict=True):
                state.handle = handle

    def record(
        self, events: Sequence[TokenEvent], lookup: Callable[[str], RequestState | None]
    ) -> Sequence[TokenEvent]:
        """Log the tokens of a step; returns the events of requests that are still wanted.

        Raises:
            LogFullError: nothing was logged; to be tried again.
        """
        states = [lookup(event.request_id) for event in events]
        wanted = [
            (event, state)
            for event, state in zip(events, states, strict=True)
            if state is not None and state.finish_reason is None and state.error is None  # else ended meanwhile
        ]
        if self._log is not None:
            tokens = [
                LoggedToken(
                    handle=state.handle,
                    index=event.position,
                    token_id=event.token_id,
                    sampling_logprob=event.sampling_logprob,
                    policy_logprob=event.policy_logprob,
                    policy_version=event.policy_version,
                    finish=event.finish_reason,
                    kept=event.kept,
                )
                for event, state in wanted
                if event.error is None
            ]
            if tokens:
                self._log.append(tokens)
        return [event for event, _ in wanted]

    def cancelled(self, state: RequestState) -> None:
        """It ended by a caller's wish."""
        self._note(lambda token_log: token_log.end_cancelled(state.handle))

    def failed(self, state: RequestState, error: OpdError) -> None:
        """It cannot be written to its end."""
        self._note(lambda token_log: token_log.end_failed(state.handle, error.reason, str(error)))

    def delivered(self, states: Sequence[RequestState]) -> None:
        """They are where they belong."""
        entries = [(state.handle, state.stream_entry_id) for state in states]
        if entries:
            self._note(lambda token_log: token_log.delivered_many(entries))

    def forgotten(self, states: Sequence[RequestState]) -> None:
        """Nobody will ask for them again, or nobody may."""
        handles = [state.handle for state in states]
        if handles:
            self._note(lambda token_log: token_log.forget_many(handles))

    def _note(self, write: Callable[[TokenLog], None]) -> None:
        """What is lost of these is done again by the next owner: the log may be full, or another's."""
        if self._log is not None:
            self._notes.submit(self._write, write, self._log)

    @staticmethod
    def _write(write: Callable[[TokenLog], None], token_log: TokenLog) -> None:
        try:
            write(token_log)
        except OpdError as error:
            log.warning("not logged: %s", error)
        except Exception:
            log.exception("a note was not logged")

    def close(self) -> None:
        """Wait until all is written; the log itself stays open."""
        self._notes.shutdown(wait=True)
