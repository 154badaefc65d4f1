"""A recipe's paths do not depend on where a run is resumed from."""

from __future__ import annotations

from pathlib import Path

import pytest
from mesh import tiny_recipe

from opd_mesh.config.paths import resolve_paths
from opd_mesh.errors import ConfigError


def test_the_token_logs_folder_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    recipe = tiny_recipe(Path("model"), {"one": Path("model")}, rollout={"log": {"path": "log", "lease_s": 2.0}})
    resolved = resolve_paths(recipe)
    assert resolved.rollout.log is not None
    assert (resolved.rollout.log.path, resolved.rollout.log.lease_s) == (tmp_path / "log", 2.0)
    assert resolve_paths(tiny_recipe(Path("model"), {"one": Path("model")})).rollout.log is None


def test_a_token_log_of_somebody_elses_server_is_refused(tmp_path: Path) -> None:
    rollout = {"log": {"path": str(tmp_path / "log")}, "peers": {"addresses": ["127.0.0.1:1"]}}
    with pytest.raises(ConfigError, match=r"rollout\.peers\.addresses names servers that run already") as error:
        resolve_paths(tiny_recipe(tmp_path, {"one": tmp_path}, rollout=rollout))
    assert error.value.field == "rollout.log"
