"""Artefacts: what jobs leave behind, in folders named after the digest of what made them.

``artefacts/<name>-<digest12>/`` is whole once it holds ``artefact.json``, which is written last and names every file of
the result with its size and SHA-256.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_mesh.files import sha256, sync, write_durably
from opd_mesh.pipeline.digests import FORMAT

log = logging.getLogger("opd_mesh.pipeline")
FILE = "artefact.json"
SHORT = 12  # of a digest, in a folder's name
DAMAGED = ".damaged"  # behind the name of a folder that is being removed


@dataclass(frozen=True, slots=True)
class Artefact:
    """A finished result.

    Attributes:
        model: its checkpoint, where it is a model.
        facts: what else is to be known of it, as its job wrote it.
    """

    digest: str
    kind: str
    name: str
    path: Path
    model: Path | None
    facts: Mapping[str, Any]


class Store:
    """The artefacts in a folder. What is asked for twice is looked at once, as long as it is not thrown away."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: dict[str, Artefact] = {}

    def find(self, digest: str) -> Artefact | None:
        """The finished artefact, whatever its name; None where there is none, or it is damaged (which is logged)."""
        if digest not in self._found:
            for path in sorted(self.root.glob(f"*-{digest[:SHORT]}")):
                artefact = self._read(path, digest)
                if artefact is not None:
                    self._found[digest] = artefact
                    break
        return self._found.get(digest)

    def _read(self, path: Path, digest: str) -> Artefact | None:
        try:
            body = json.loads((path / FILE).read_text(encoding="utf-8"))
            if body["format"] != FORMAT or body["digest"] != digest:
                raise ValueError("it is of another digest or format")
            for name, (size, modified_ns, expected) in body["files"].items():
                file = path / name
                stat = file.stat()
                if stat.st_size != size or (stat.st_mtime_ns != modified_ns and sha256(file) != expected):
                    raise ValueError(f"{name} is not what was written")
            model = None if body["model"] is None else path / body["model"]
            return Artefact(digest, body["kind"], body["name"], path, model, body["facts"])
        except FileNotFoundError as error:
            if (path / FILE).exists():
                log.warning("%s is damaged and is made again: %s is missing", path, error.filename)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is damaged and is made again: %s", path, error)
        return None

    def folder(self, name: str, digest: str) -> Path:
        """Where an artefact is to be made: what an earlier attempt left is there, but nothing damaged."""
        begun = sorted(self.root.glob(f"*-{digest[:SHORT]}"))
        path = begun[0] if begun else self.root / f"{name}-{digest[:SHORT]}"
        old = path.with_name(f"{path.name}{DAMAGED}")
        if (path / FILE).exists():  # not whole, or it would have been found
            # Half removed it might look like one that was begun: first it loses its name.
            shutil.rmtree(old, ignore_errors=True)
            path.replace(old)
            sync(self.root)
        if old.exists():
            shutil.rmtree(old)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def finish(
        self,
        path: Path,
        digest: str,
        *,
        kind: str,
        name: str,
        files: Iterable[str],
        model: str | None = None,
        facts: Mapping[str, Any] | None = None,
        made_of: Mapping[str, str] | None = None,
    ) -> Artefact:
        """Make what is in a folder an artefact, durably.

        Args:
            files: relative names of files and folders that are the result.
            model: that of them which is a checkpoint.
            made_of: digests of the inputs by role, for people.
        """
        listed: dict[str, list[Any]] = {}
        for part in files:
            whole = path / part
            for file in sorted(whole.rglob("*")) if whole.is_dir() else [whole]:
                if file.is_file():
                    sync(file)
                    stat = file.stat()
                    listed[str(file.relative_to(path))] = [stat.st_size, stat.st_mtime_ns, sha256(file)]
            if whole.is_dir():
                sync(whole)
        body = {
            "format": FORMAT,
            "digest": digest,
            "kind": kind,
            "name": name,
            "made_of": dict(made_of or {}),
            "model": model,
            "facts": dict(facts or {}),
            "files": listed,
        }
        write_durably(path / FILE, json.dumps(body, indent=1) + "\n")
        sync(self.root)
        artefact = self.find(digest)
        assert artefact is not None  # it has just been written
        return artefact
