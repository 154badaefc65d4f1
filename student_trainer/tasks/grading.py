"""The grader's child process: opens the verifiers, then answers jobs until its parent is gone.

It imports no torch, and nothing of the parent's main module.
"""

from __future__ import annotations

import json
import pickle
import signal
from multiprocessing.connection import Connection
from typing import Any

from opd_mesh.errors import ConfigError
from opd_mesh.process import end_with_parent
from student_trainer.tasks.items import Item
from student_trainer.tasks.verifiers import Grade, Verification, VerifierSpec


def serve(descriptor: int, parent: int) -> None:
    """Answer on one end of a pipe.

    In come the list of :class:`VerifierSpec`, then lists of jobs, each a pickle of (domain, item, text), from our own
    parent. Out go lines of JSON: null or a refusal [message, field], then job by job [score, parsed, failure, said,
    gold, judged_chars].
    """
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears of it, and closes
    connection: Connection = Connection(descriptor)
    lines = open(descriptor, "wb", closefd=False)  # noqa: SIM115 - the connection's

    def tell(value: Any) -> None:
        lines.write(json.dumps(value).encode() + b"\n")
        lines.flush()

    specs: list[VerifierSpec] = connection.recv()
    try:
        verifications = {spec.domain: Verification(spec) for spec in specs}
    except ConfigError as error:
        tell([error.message, error.field])
        return
    tell(None)
    while True:
        try:
            jobs: list[bytes] = connection.recv()
        except EOFError:
            return
        for job in jobs:
            grade = _graded(verifications, job)
            tell([grade.score, grade.parsed, grade.failure, grade.said, grade.gold, grade.judged_chars])


def _graded(verifications: dict[str, Verification], job: bytes) -> Grade:
    try:
        domain, item, text = pickle.loads(job)
        assert isinstance(item, Item)
    except Exception as error:  # noqa: BLE001 - what a family puts into its metadata
        return Grade(None, parsed=False, failure=f"the item cannot be read: {error}")
    return verifications[domain].grade(item, text)
