"""Grading answers in a child process, because a verifier may hang, crash, or eat the trainer's own time.

The parent pickles every job (domain, item, text) and sends some at a time; the child answers each with a line of JSON
as soon as it has it, so that the time of every single answer is bounded. A child that is silent for too long is killed,
one that ends is replaced; whatever it was working on is a counted failure, and the others are graded on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from opd_mesh.errors import ConfigError, InternalError
from student_trainer.tasks.domain import Domain
from student_trainer.tasks.items import Prompt
from student_trainer.tasks.verifiers import Grade, VerifierSpec

log = logging.getLogger("student_trainer")
START_TIMEOUT_S = 120.0  # imports, and the families' word lists
STOP_TIMEOUT_S = 5.0
JOBS_AT_ONCE = 512
READ_BYTES = 1 << 16


class Grader:
    """Grades the answers of all domains that have a verifier, in one child process. For one event loop."""

    def __init__(self, domains: Sequence[Domain]) -> None:
        self._domains = {domain.name: domain for domain in domains if domain.has_verifier}
        self._told: set[str] = set()  # domains whose verifier has failed
        # The one thread that starts, asks and replaces the child. Linux ends the child when this thread ends.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grader")
        self._child: _Child | None = None
        self._closed = False

    async def start(self) -> None:
        """Start the child, where any domain has a verifier.

        Raises:
            ConfigError: a verifier cannot be opened; names the field.
        """
        if self._domains:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._ready_child)

    async def grade(self, domain: str, entries: Sequence[tuple[Prompt, str]]) -> list[Grade]:
        """Grades in the order of ``entries`` (prompt, text of the response).

        A prompt of another kind (``Prompt.other``) gets no score and no failure.

        Raises:
            ConfigError: the domain has no verifier, or the child cannot be started again.
        """
        if domain not in self._domains:
            raise ConfigError(f"domain {domain} has no verifier; give it one", field=f"domains.{domain}.verifier")
        if self._closed:
            raise InternalError("the grader is closed")
        grades = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._grade, self._domains[domain], entries
        )
        failure = next((grade.failure for grade in grades if grade.failure is not None), None)
        if failure is not None and domain not in self._told:
            self._told.add(domain)
            log.warning("domain %s: an answer has no score, for %s (told once, then only counted)", domain, failure)
        return grades

    async def close(self) -> None:
        """End the child; what is being graded is given up."""
        if self._closed:
            return
        self._closed = True
        if self._child is not None:
            self._child.kill()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._end_child)
        await asyncio.to_thread(self._thread.shutdown)

    # --- in the thread -----------------------------------------------------------------------------------------
    def _ready_child(self) -> _Child:
        if self._closed:
            raise InternalError("the grader is closed")
        if self._child is None:
            self._child = _Child()  # here before it is ready, so that close can end it
            try:
                if self._closed:
                    raise InternalError("the grader is closed")
                self._child.open([domain.verifier_spec for domain in self._domains.values()])
            except Exception:
                self._end_child()
                raise
        return self._child

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._child = None

    def _grade(self, domain: Domain, entries: Sequence[tuple[Prompt, str]]) -> list[Grade]:
        grades: list[Grade] = [Grade(None, parsed=False)] * len(entries)
        jobs: deque[tuple[int, bytes]] = deque()
        for place, (prompt, text) in enumerate(entries):
            if prompt.other:
                continue
            item = domain.item(prompt)
            try:
                jobs.append((place, pickle.dumps((domain.name, item, text))))
            except Exception as error:  # noqa: BLE001 - what a family puts into its metadata
                grades[place] = Grade(None, parsed=False, failure=f"the item cannot be sent: {error}")
        verifier = domain.config.verifier
        assert verifier is not None  # see grade
        while jobs:
            child = self._ready_child()
            sent = [jobs[place] for place in range(min(len(jobs), JOBS_AT_ONCE))]
            try:
                child.send([job for _, job in sent])
                for place, _ in sent:
                    grades[place] = child.receive(verifier.timeout_s)
                    jobs.popleft()
            except _ChildFailedError as error:
                self._end_child()
                place, _ = jobs.popleft()
                grades[place] = Grade(None, parsed=False, failure=str(error))
        return grades


class _ChildFailedError(Exception):
    """The child hung or ended, over the job in hand."""


class _Child:
    """The process, from the parent's side. :meth:`open` comes first."""

    def __init__(self) -> None:
        # Not by fork, which copies the trainer's threads and locks, nor as multiprocessing spawns, which imports the
        # trainer's main module, torch and all.
        self._connection, theirs = multiprocessing.Pipe()
        serve = f"from student_trainer.tasks.grading import serve; serve({theirs.fileno()}, {os.getpid()})"
        self._received = b""  # of a line that is not whole
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", serve],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        except BaseException:
            self._connection.close()
            raise
        finally:
            theirs.close()

    def open(self, specs: list[VerifierSpec]) -> None:
        """Open the verifiers there. Raises :class:`ConfigError` if one cannot be opened."""
        try:
            self.send(specs)
            refusal = self._message(START_TIMEOUT_S)
        except _ChildFailedError as error:
            raise ConfigError(f"the verifiers' process does not start: {error}", field="domains") from error
        if refusal is not None:
            message, field = refusal
            raise ConfigError(message, field=field)

    def send(self, what: list[VerifierSpec] | list[bytes]) -> None:
        """Jobs to answer, in this order."""
        try:
            self._connection.send(what)
        except OSError as error:
            raise _ChildFailedError(self._end()) from error

    def receive(self, timeout_s: float) -> Grade:
        """The answer to the next job."""
        message = self._message(timeout_s)
        try:
            score, parsed, failure, said, gold, judged_chars = message
        except (TypeError, ValueError) as error:
            raise _ChildFailedError("the verifier wrote into the grader's own pipe") from error
        return Grade(score, parsed, failure, said, gold, judged_chars)

    def _message(self, timeout_s: float) -> Any:
        """The pipe carries lines of JSON this way, not pickles: what runs there may have been written by a model, and
        may write there itself. So the whole line has to be here in time, not only its beginning."""
        ends_at = time.monotonic() + timeout_s
        try:
            while b"\n" not in self._received:
                if not self._connection.poll(max(0.0, ends_at - time.monotonic())):
                    raise _ChildFailedError(f"the verifier took longer than {timeout_s:g} s")
                if not (more := os.read(self._connection.fileno(), READ_BYTES)):
                    raise EOFError
                self._received += more
            line, _, self._received = self._received.partition(b"\n")
            return json.loads(line)
        except (EOFError, OSError) as error:
            raise _ChildFailedError(self._end()) from error
        except ValueError as error:
            raise _ChildFailedError("the verifier wrote into the grader's own pipe") from error

    def _end(self) -> str:
        self._wait()
        return f"the verifier ended its process (exit code {self._process.returncode})"

    def _wait(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)

    def kill(self) -> None:
        """From any thread."""
        self._process.kill()

    def join(self) -> None:
        """Wait until it is gone."""
        self._wait()
        self._connection.close()
