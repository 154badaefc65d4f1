"""Artefacts: whole or not there, found by digest, and noticed when damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from opd_mesh.files import write_durably
from opd_mesh.pipeline.digests import digest_of
from opd_mesh.pipeline.store import FILE, Artefact, Store

DIGEST, OTHER = digest_of("one"), digest_of("other")


def make(store: Store, digest: str = DIGEST, name: str = "add") -> Artefact:
    folder = store.folder(name, digest)
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(b"12345")
    (folder / "told.json").write_text("{}")
    (folder / "log").write_text("not part of the result")
    files = ["model", "told.json"]
    return store.finish(folder, digest, kind="train", name=name, files=files, model="model", facts={"steps": 3})


def test_an_artefact_is_found_by_its_digest_whatever_its_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.find(DIGEST) is None
    made = make(store)
    assert made.path == tmp_path / f"add-{DIGEST[:12]}"
    assert made.model == made.path / "model"
    again = Store(tmp_path)
    assert again.find(DIGEST) == made
    assert again.find(OTHER) is None
    made.path.rename(tmp_path / f"renamed-{DIGEST[:12]}")
    assert Store(tmp_path).find(DIGEST) is not None


def test_what_is_begun_is_no_artefact_and_is_gone_on_with(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.folder("add", DIGEST)
    (folder / "checkpoint").write_text("half")
    assert Store(tmp_path).find(DIGEST) is None
    assert Store(tmp_path).folder("add", DIGEST) == folder
    assert (folder / "checkpoint").exists()


def test_a_crash_while_what_is_damaged_is_removed_leaves_nothing_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(Store(tmp_path))
    (made.path / "model" / "weights").write_bytes(b"damage")

    def crash(path: Path, **_: object) -> None:
        if path.exists():  # the removal has come as far as the one file that tells of the damage
            (path / FILE).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).folder("add", DIGEST)
    monkeypatch.undo()
    store = Store(tmp_path)
    assert store.find(DIGEST) is None
    assert list(store.folder("add", DIGEST).iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == [made.path.name]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 99}'])
def test_an_unreadable_artefact_is_made_again(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    made = make(Store(tmp_path))
    (made.path / FILE).write_text(content)
    store = Store(tmp_path)
    assert store.find(DIGEST) is None
    assert "is damaged and is made again" in caplog.text
    folder = store.folder("add", DIGEST)
    assert list(folder.iterdir()) == []


def test_damage_to_its_files_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make(Store(tmp_path))
    weights = made.path / "model" / "weights"
    (made.path / "log").write_text("logs may change")
    os.utime(weights)  # touched, but the same
    assert Store(tmp_path).find(DIGEST) is not None
    weights.write_bytes(b"12346")
    os.utime(weights, ns=(1, 1))
    assert Store(tmp_path).find(DIGEST) is None
    assert "model/weights is not what was written" in caplog.text
    weights.write_bytes(b"1234")
    assert Store(tmp_path).find(DIGEST) is None
    weights.unlink()
    assert Store(tmp_path).find(DIGEST) is None
    assert "weights is missing" in caplog.text


def test_an_artefact_of_another_digest_under_the_name_is_not_taken(tmp_path: Path) -> None:
    made = make(Store(tmp_path))
    body = json.loads((made.path / FILE).read_text())
    (made.path / FILE).write_text(json.dumps(body | {"digest": DIGEST[:12] + "0" * 52}))
    assert Store(tmp_path).find(DIGEST) is None


def test_artefact_json_is_written_last_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash at any moment of the writing leaves either nothing or all of it."""
    seen: list[bool] = []
    replace = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if target.name == FILE:
            seen.append(Store(tmp_path).find(DIGEST) is None)
            assert json.loads(self.read_text())["digest"] == DIGEST  # whole before it gets its name
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        make(Store(tmp_path))
    monkeypatch.undo()
    assert seen == [True]
    assert Store(tmp_path).find(DIGEST) is None


def test_everything_is_synced_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    make(Store(tmp_path))
    assert set(synced[: synced.index(f"{FILE}.partial")]) >= {"weights", "told.json", "model"}


def test_write_durably_replaces_at_once(tmp_path: Path) -> None:
    write_durably(tmp_path / "a.json", "1")
    write_durably(tmp_path / "a.json", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "2"
