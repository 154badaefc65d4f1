"""Server and client interceptors: errors to status, a span and a duration around every call."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import SpanKind

from opd_mesh import telemetry
from opd_mesh.errors import DeadlineError, InternalError, OpdError, OverloadedError, UnimplementedError
from opd_mesh.rpc.status import GRPC_CODES, STATUS_DETAILS_KEY, status_of

log = logging.getLogger("opd_mesh.rpc")
RETRY_DELAY_S = 1.0
# For how long a refused upload is still taken: a client that is cut off while it writes may lose the refusal's status.
REFUSED_UPLOAD_S = 10.0


async def _abort(context: grpc.aio.ServicerContext, error: OpdError) -> NoReturn:
    status = status_of(error)
    await context.abort(GRPC_CODES[error.code], status.message, ((STATUS_DETAILS_KEY, status.SerializeToString()),))
    raise AssertionError("abort always raises")


class _ServerCall:
    """Span, duration and error mapping of one call on the server."""

    def __init__(self, method: str, context: grpc.aio.ServicerContext) -> None:
        self.method = method
        self.context = context
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        self.span = telemetry.start_rpc_span(method, SpanKind.SERVER, telemetry.extract_context(metadata))
        self.trace_context = trace.set_span_in_context(self.span)
        self.started = time.monotonic()
        self.status = "OK"

    async def fail(self, error: BaseException) -> NoReturn:
        """Ends the call with the status that ``error`` maps to."""
        if isinstance(error, OpdError):
            self.status = error.code
            log.info("%s: %s: %s", self.method, error.code, error)
            await _abort(self.context, error)
        if isinstance(error, asyncio.CancelledError):
            self.status = "CANCELLED"
            raise error
        if isinstance(error, NotImplementedError) and self.context.code() == grpc.StatusCode.UNIMPLEMENTED:
            # What the generated base class says for a method that a servicer leaves out.
            self.status = "UNIMPLEMENTED"
            await _abort(self.context, UnimplementedError(f"{self.method} is not served here"))
        if isinstance(error, grpc.aio.AbortError):  # not an RpcError: that is a call of our own that failed in here
            code = self.context.code()
            self.status = getattr(code, "name", "UNKNOWN")
            raise error
        self.status = "INTERNAL"
        self.span.record_exception(error)
        log.error("%s failed", self.method, exc_info=error)
        await _abort(
            self.context, InternalError(f"{type(error).__name__} in {self.method}; the server's log has the stack")
        )

    async def inside(self, work: Awaitable[Any]) -> Any:
        """Await ``work`` with the call's span as the current one."""
        token = otel_context.attach(self.trace_context)
        try:
            return await work
        finally:
            otel_context.detach(token)

    def close(self) -> None:
        """Ends the span, whatever happened."""
        telemetry.end_rpc_span(self.span, self.method, self.status, time.monotonic() - self.started, server=True)


class _Admission:
    """Calls at once, over all connections. Ours and not gRPC's own, which counts health checks and gives no delay."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Raises :class:`OverloadedError` where there is none."""
        if self.running >= self.limit:
            raise OverloadedError(
                f"{self.running} calls run already, no more are admitted", retry_delay_s=RETRY_DELAY_S
            )
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


class ServerInterceptor(grpc.aio.ServerInterceptor):
    """Installed on every server of the mesh."""

    def __init__(self, max_concurrent_rpcs: int) -> None:
        self._admission = _Admission(max_concurrent_rpcs)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Wrap the handler, whatever its arity."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.lstrip("/")
        # Health and reflection have state and errors of their own.
        if handler is None or method.startswith("grpc."):
            return handler
        if handler.response_streaming:
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
            factory = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            wrapped: Any = _wrap_stream(behaviour, method, self._admission)
        else:
            behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
            factory = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            wrapped = _wrap_unary(behaviour, method, self._admission)
        return factory(wrapped, handler.request_deserializer, _unless_serialized(handler.response_serializer))


def _unless_serialized(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """A method may answer with messages that are bytes already: see ``opd_mesh.chunk_codec``."""
    return lambda message: message if isinstance(message, bytes) else serialize(message)


async def _take_the_rest(requests: AsyncIterable[Any]) -> None:
    """Read and drop what a refused client still sends, until it has sent all or ``REFUSED_UPLOAD_S`` are over."""
    with suppress(Exception):  # whatever this meets, the refusal is what the client has to hear
        async with asyncio.timeout(REFUSED_UPLOAD_S):
            async for _ in requests:
                pass


def _wrap_unary(
    behaviour: Callable[..., Awaitable[Any]], method: str, admission: _Admission
) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        current = _ServerCall(method, context)
        try:
            with admission.place():
                try:
                    return await current.inside(behaviour(request, context))
                except OpdError as error:
                    if isinstance(request, AsyncIterable) and not isinstance(error, DeadlineError):
                        await _take_the_rest(request)
                    raise
        except BaseException as error:  # noqa: BLE001 - mapped to a status, never swallowed
            await current.fail(error)
        finally:
            current.close()

    return call


def _wrap_stream(
    behaviour: Callable[..., AsyncIterator[Any]], method: str, admission: _Admission
) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        current = _ServerCall(method, context)
        try:
            with admission.place():
                responses = aiter(behaviour(request, context))
                while True:
                    try:
                        # Not around the yield: a generator may be closed from another task, whose context is another.
                        response = await current.inside(anext(responses))
                    except StopAsyncIteration:
                        break
                    yield response
        except GeneratorExit:
            current.status = "CANCELLED"
            raise
        except BaseException as error:  # noqa: BLE001 - mapped to a status, never swallowed
            await current.fail(error)
        finally:
            current.close()

    return call


def _with_context(details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()), *telemetry.inject_context())
    return grpc.aio.ClientCallDetails(
        method=details.method,
        timeout=details.timeout,
        metadata=metadata,
        credentials=details.credentials,
        wait_for_ready=details.wait_for_ready,
    )


def _code_of(finished: Any) -> str:
    """Status of a call that is done: its ``code()`` is a coroutine, which then ends without waiting."""
    coroutine = finished.code()
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value.name
    coroutine.close()
    return "UNKNOWN"


class _ClientSpan:
    """A client span that ends when the call does, and is the parent of the server's."""

    async def _call(self, continuation: Callable[..., Awaitable[Any]], details: Any, request: Any) -> Any:
        raw = details.method
        method = (raw.decode() if isinstance(raw, bytes) else raw).lstrip("/")
        if method.startswith("grpc."):  # health checks: many, and nobody's trace
            return await continuation(details, request)
        current = telemetry.start_rpc_span(method, SpanKind.CLIENT)
        started = time.monotonic()
        token = otel_context.attach(trace.set_span_in_context(current))
        try:
            call = await continuation(_with_context(details), request)
        except BaseException:
            telemetry.end_rpc_span(current, method, "UNKNOWN", time.monotonic() - started, server=False)
            raise
        finally:
            otel_context.detach(token)

        def ended(finished: Any) -> None:
            telemetry.end_rpc_span(current, method, _code_of(finished), time.monotonic() - started, server=False)

        call.add_done_callback(ended)
        return call


class UnaryUnarySpan(_ClientSpan, grpc.aio.UnaryUnaryClientInterceptor):
    """unary → unary."""

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """Wrap the call."""
        return await self._call(continuation, client_call_details, request)


class UnaryStreamSpan(_ClientSpan, grpc.aio.UnaryStreamClientInterceptor):
    """unary → stream."""

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """Wrap the call."""
        return await self._call(continuation, client_call_details, request)


class StreamUnarySpan(_ClientSpan, grpc.aio.StreamUnaryClientInterceptor):
    """stream → unary."""

    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        """Wrap the call."""
        return await self._call(continuation, client_call_details, request_iterator)


class StreamStreamSpan(_ClientSpan, grpc.aio.StreamStreamClientInterceptor):
    """stream → stream."""

    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        """Wrap the call."""
        return await self._call(continuation, client_call_details, request_iterator)


def client_interceptors() -> list[grpc.aio.ClientInterceptor]:
    """One per arity: grpc.aio files an interceptor under the first kind it matches, so one class cannot serve four."""
    return [UnaryUnarySpan(), UnaryStreamSpan(), StreamUnarySpan(), StreamStreamSpan()]
