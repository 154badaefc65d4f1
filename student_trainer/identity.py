"""Who the run is: its id, its lineage, and the models it began with, in ``RUN_DIR/run.json``."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from opd_mesh.errors import CorruptWeightsError, PreconditionError
from opd_mesh.files import write_durably

FILE = "run.json"


@dataclass
class RunIdentity:
    """What must not change while a run is stopped and resumed.

    Attributes:
        run_id: unique, for two runs may share a Redis and a name.
        lineage: counts the starts; it rises even where a run was killed before its first checkpoint.
        models: digest by role ("student", "teacher/<id>", "head/<id>").
    """

    run_id: str
    lineage: int = 0
    models: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, run_dir: Path, name: str) -> RunIdentity:
        """Of the run in this folder, in a new lineage. Raises :class:`CorruptWeightsError` for an unreadable file."""
        path = run_dir / FILE
        if path.exists():
            try:
                identity = cls(**json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise CorruptWeightsError(f"{path} cannot be read: {error}") from error
        else:
            identity = cls(run_id=f"{name}.{run_dir.name}.{secrets.token_hex(4)}")
        identity.lineage += 1
        identity._write(run_dir)
        return identity

    def bind(self, run_dir: Path, models: Mapping[str, str]) -> None:
        """Remember the models of a new run; compare them with those of a resumed one.

        Raises:
            PreconditionError: naming the first that is another than when the run began.
        """
        if not self.models:
            self.models = dict(models)
            self._write(run_dir)
            return
        for role in sorted(self.models.keys() | models.keys()):
            then, now = self.models.get(role, "none"), models.get(role, "none")
            if then != now:
                raise PreconditionError(
                    f"{role} is {now[:16]}…, but the run began with {then[:16]}…: its checkpoints and held-out marks "
                    "belong to the other one. Bring that back, or start a new run",
                    field=role.replace("teacher/", "teachers.").replace("head/", "teachers."),
                )

    def _write(self, run_dir: Path) -> None:
        write_durably(run_dir / FILE, json.dumps(asdict(self), indent=1))
