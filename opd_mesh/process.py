"""How every server process begins and ends: arguments before heavy imports, logs, telemetry, readable errors.

A service's ``__main__`` reads::

    arguments = parse_arguments("teacher", TeacherServerConfig)
    from teacher_server.server import serve  # torch comes in here
    run(serve(arguments))
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from opd_mesh.config.base import load_config
from opd_mesh.errors import OpdError
from opd_mesh.telemetry import configure_telemetry

ConfigT = TypeVar("ConfigT", bound=BaseModel)
EXIT_USER_ERROR = 2
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ServiceArguments(Generic[ConfigT]):
    """What the command line said."""

    service: str
    config: ConfigT
    listen: str
    insecure: bool
    ready_file: Path | None
    extra: dict[str, Any]

    def announce(self, address: str) -> None:
        """Tell a supervisor where we listen (``--ready-file``) and a person (stderr)."""
        print(f"opd {self.service}: listening on {address}", file=sys.stderr, flush=True)
        if self.ready_file is not None:
            partial = self.ready_file.with_suffix(".partial")
            partial.write_text(json.dumps({"address": address, "pid": os.getpid()}), encoding="utf-8")
            partial.replace(self.ready_file)  # a reader never sees half a file


def parse_arguments(
    service: str, config_model: type[ConfigT], *, extra: dict[str, dict[str, Any]] | None = None
) -> ServiceArguments[ConfigT]:
    """Parse ``sys.argv``, load the configuration, set up logs and telemetry; exits with 2 on bad input."""
    parser = argparse.ArgumentParser(prog=f"opd serve {service}")
    parser.add_argument("--config", type=Path, required=True, help="YAML configuration")
    parser.add_argument("--listen", default="127.0.0.1:0", help="host:port; port 0 lets the system choose")
    parser.add_argument("--insecure", action="store_true", help="allow plaintext beyond loopback")
    parser.add_argument("--ready-file", type=Path, help="written (JSON: address, pid) once listening")
    parser.add_argument("--die-with-parent", type=int, metavar="PID", help="end when this parent process ends (Linux)")
    for flag, options in (extra or {}).items():
        parser.add_argument(flag, **options)
    namespace = vars(parser.parse_args())
    logging.basicConfig(
        level=os.environ.get("OPD_LOG_LEVEL", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if (parent := namespace.pop("die_with_parent")) is not None:
        end_with_parent(parent)
    try:
        config = load_config(config_model, namespace.pop("config"))
    except OpdError as error:
        fail(error)
    configure_telemetry(f"opd-{service}")
    return ServiceArguments(
        service=service,
        config=config,
        listen=namespace.pop("listen"),
        insecure=namespace.pop("insecure"),
        ready_file=namespace.pop("ready_file"),
        extra=namespace,
    )


def end_with_parent(parent: int) -> None:
    """Ask Linux for SIGTERM when the parent dies, so that a killed supervisor leaves nothing behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the request was in place
        sys.exit(0)


def fail(error: OpdError) -> None:
    """Print one clear message, no stack, and exit."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def error_in(lines: Sequence[str]) -> str | None:
    """The message that :func:`fail` printed last, found again in a process's log."""
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].startswith("error: "):
            return "\n".join(lines[number:]).removeprefix("error: ")
    return None


def run(main: Coroutine[Any, Any, int | None]) -> None:
    """Run to the end; an :class:`OpdError` becomes a message and exit code 2."""
    try:
        code = asyncio.run(main)
    except OpdError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code or 0)
