"""Traces and metrics by OpenTelemetry, configured by the standard ``OTEL_*`` variables alone.

Without ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``OTEL_TRACES_EXPORTER=console``) everything here is a no-op. Convention
names stand in this module and nowhere else.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

from opentelemetry import context as otel_context
from opentelemetry import metrics, propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

RPC_SYSTEM = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS_CODE = "rpc.response.status_code"
ERROR_TYPE = "error.type"
SERVER_DURATION = "rpc.server.call.duration"
CLIENT_DURATION = "rpc.client.call.duration"
RUN_ID = "opd.run_id"
STEP = "opd.step"
TEACHER = "opd.teacher_id"
TOKENS = "opd.tokens"
TRAJECTORY = "opd.trajectory_id"
WEIGHTS = "opd.weights"

_SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


def _wanted(signal: str) -> str | None:
    """``"otlp"``, ``"console"`` or None, for ``"traces"`` or ``"metrics"``."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    chosen = os.environ.get(f"OTEL_{signal.upper()}_EXPORTER")
    if chosen is not None:
        return chosen if chosen in ("otlp", "console") else None
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT")
    return "otlp" if any(os.environ.get(name) for name in endpoints) else None


def configure_telemetry(service: str) -> None:
    """Install exporters as the environment asks. Call once per process, after parsing the command line."""
    traces, measures = _wanted("traces"), _wanted("metrics")
    if traces is None and measures is None:
        return
    from opentelemetry.sdk.resources import Resource

    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", service)})
    if traces is not None:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

        exporter: SpanExporter
        if traces == "otlp":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
        else:
            exporter = ConsoleSpanExporter()
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        atexit.register(provider.shutdown)
    if measures is not None:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import (
            ConsoleMetricExporter,
            MetricExporter,
            PeriodicExportingMetricReader,
        )

        metric_exporter: MetricExporter
        if measures == "otlp":
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

            metric_exporter = OTLPMetricExporter()
        else:
            metric_exporter = ConsoleMetricExporter()
        meter_provider = MeterProvider(
            resource=resource, metric_readers=[PeriodicExportingMetricReader(metric_exporter)]
        )
        metrics.set_meter_provider(meter_provider)
        atexit.register(meter_provider.shutdown)


@cache
def tracer() -> trace.Tracer:
    """The mesh's tracer. Asked for before there is a provider, it finds the one that is installed later."""
    return trace.get_tracer("opd_mesh")


@contextmanager
def span(name: str, attributes: Mapping[str, str | int | float] | None = None) -> Iterator[Span]:
    """An internal span around a piece of work."""
    with tracer().start_as_current_span(name, attributes=attributes) as current:
        yield current


def inject_context() -> list[tuple[str, str]]:
    """The current trace context as gRPC metadata."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return list(carrier.items())


def extract_context(metadata: Mapping[str, str]) -> otel_context.Context:
    """The caller's trace context."""
    return propagate.extract(metadata)


def start_rpc_span(method: str, kind: SpanKind, parent: otel_context.Context | None = None) -> Span:
    """A span for one call; ``method`` as ``package.Service/Method``."""
    attributes = {RPC_SYSTEM: "grpc", RPC_METHOD: method}
    return tracer().start_span(method, context=parent, kind=kind, attributes=attributes)


def end_rpc_span(current: Span, method: str, status_code: str, duration_s: float, *, server: bool) -> None:
    """End the span of a call and record its duration."""
    attributes: dict[str, str] = {RPC_SYSTEM: "grpc", RPC_METHOD: method, RPC_STATUS_CODE: status_code}
    current.set_attribute(RPC_STATUS_CODE, status_code)
    if status_code != "OK":
        attributes[ERROR_TYPE] = status_code
        current.set_attribute(ERROR_TYPE, status_code)
        current.set_status(Status(StatusCode.ERROR, status_code))
    current.end()
    _duration_histogram(SERVER_DURATION if server else CLIENT_DURATION).record(duration_s, attributes)


_histograms: dict[str, metrics.Histogram] = {}


def _duration_histogram(name: str) -> metrics.Histogram:
    if name not in _histograms:
        meter = metrics.get_meter("opd_mesh")
        _histograms[name] = meter.create_histogram(name, unit="s", explicit_bucket_boundaries_advisory=_SECONDS_BUCKETS)
    return _histograms[name]
