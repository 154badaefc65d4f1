"""Servers as child processes: started with a configuration, waited for, ended."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from opd_mesh.config.base import dump_config
from opd_mesh.errors import UnavailableError
from opd_mesh.process import error_in

log = logging.getLogger("opd_mesh.supervisor")
START_LIMIT_S = 7200.0
START_TIMEOUT_S = 600.0  # without a word in its log; a large teacher takes minutes to load and prove
STOP_TIMEOUT_S = 60.0
LOG_TAIL_LINES = 12
MODULES = {
    "teacher": "teacher_server",
    "rollout": "rollout_server",
    "judge": "rollout_server",
    "grm": "grm_server",
    "trainer": "student_trainer",
    "answers": "student_trainer.answering",
}


@dataclass(eq=False)
class Child:
    """A server process."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path
    ready_file: Path
    config: BaseModel
    address: str = ""  # once it is known
    log_offset: int = 0  # where this process's part of the log begins: a resumed run appends

    @classmethod
    def start(
        cls,
        name: str,
        config: BaseModel,
        *,
        services: Path,
        logs: Path,
        listen: str = "127.0.0.1:0",
        extra: Sequence[str] = (),
        keep_open: Sequence[int] = (),
    ) -> Child:
        """Does not wait for it. It has a session of its own, so that Ctrl-C does not reach it, and ends with us.

        Args:
            name: one of ``MODULES``.
            services: folder of its configuration and of the file in which it says where it listens.
            logs: folder of its log.
            extra: more arguments.
            keep_open: file descriptors that it inherits.
        """
        config_path, ready_file = services / f"{name}.yaml", services / f"{name}.ready.json"
        log_path = logs / f"{name}.log"
        dump_config(config, config_path)
        ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", MODULES[name], "--config", str(config_path), "--listen", listen]
        command += ["--ready-file", str(ready_file), "--die-with-parent", str(os.getpid()), *extra]
        log_offset = log_path.stat().st_size if log_path.exists() else 0
        with log_path.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=tuple(keep_open),
                # They take turns on the same cores: one whose OpenMP threads spin while they wait steals the others'.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            )
        return cls(name, process, log_path, ready_file, config, log_offset=log_offset)

    async def ready(self) -> str:
        """Its address, once it is known.

        Raises:
            UnavailableError: it ended, or says nothing any more; with what it said.
        """
        deadline, said = time.monotonic() + START_TIMEOUT_S, 0
        limit = time.monotonic() + START_LIMIT_S
        while time.monotonic() < min(deadline, limit):
            if (size := self.log_path.stat().st_size) != said:
                deadline, said = time.monotonic() + START_TIMEOUT_S, size
            if self.ready_file.exists():
                self.address = str(json.loads(self.ready_file.read_text())["address"])
                return self.address
            if self.process.poll() is not None:
                raise self.gone(" before it was ready")
            await asyncio.sleep(0.05)
        raise UnavailableError(
            f"the {self.name} server is not ready; it said nothing for {START_TIMEOUT_S:g} s, or was not done in "
            f"{START_LIMIT_S:g} s: see {self.log_path}"
        )

    def gone(self, when: str = "") -> UnavailableError:
        """Of a process that has ended: the error that says so."""
        code = self.process.returncode
        return UnavailableError(f"the {self.name} server ended with code {code}{when}: {self.said_error()}")

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL where that does not end it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self.process.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            log.warning("%s did not end within %g s and is killed", self.name, STOP_TIMEOUT_S)
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    def log_tail(self) -> str:
        """The last lines it wrote, for an error message."""
        return "\n".join(f"    {line}" for line in self._log_lines()[-LOG_TAIL_LINES:])

    def _log_lines(self) -> list[str]:
        with self.log_path.open("rb") as file:
            file.seek(self.log_offset)
            return file.read().decode("utf-8", errors="replace").splitlines()

    def said_error(self) -> str:
        """The one clear message that a service ends with, or the tail of its log."""
        return error_in(self._log_lines()) or f"the end of {self.log_path}:\n{self.log_tail()}"
