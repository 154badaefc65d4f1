"""A recipe's paths do not depend on where a run is resumed from."""

from __future__ import annotations

from pathlib import Path

import pytest
from mesh import tiny_recipe
from pipeline_cases import pipeline

from opd_mesh.config.judging import FrozenJudgeConfig
from opd_mesh.config.paths import resolve_paths
from opd_mesh.errors import ConfigError, ModelNotFoundError
from opd_mesh.pipeline.run import resolve_pipeline_paths


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


def test_rubrics_gold_and_judges_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    spell = {"reasoning_gym": {"task": "spell_backward"}, "verifier": {"name": "reasoning_gym"}}
    recipe = tiny_recipe(
        Path("model"),
        {},
        objective={"name": "grpo"},
        batch={"responses_per_prompt": 2},
        domains={
            "reverse": {**spell, "reward": {"name": "grm", "rubric": "r.yaml"}},
            "named": {**spell, "reward": {"name": "grm", "rubric": "style@2"}},
            "judge": {"judging": {"rubric": "r.yaml", "path": "gold.jsonl"}},
        },
        grm={"rubrics": "rubrics", "judge": {"model": "model"}},
    )
    resolved = resolve_paths(recipe)
    domains, grm = resolved.domains, resolved.grm
    assert domains["reverse"].reward is not None
    assert domains["reverse"].reward.rubric == tmp_path / "r.yaml"
    assert domains["named"].reward is not None
    assert domains["named"].reward.rubric == "style@2"
    assert domains["judge"].judging is not None
    assert (domains["judge"].judging.rubric, domains["judge"].judging.path) == (
        tmp_path / "r.yaml",
        tmp_path / "gold.jsonl",
    )
    assert isinstance(grm.judge, FrozenJudgeConfig)
    assert (grm.rubrics, grm.judge.model) == (tmp_path / "rubrics", tmp_path / "model")
    with pytest.raises(ModelNotFoundError) as error:
        resolve_paths(recipe.replace(grm={"rubrics": "rubrics", "judge": {"model": "absent"}}))
    assert error.value.field == "grm.judge.model"


def test_a_pipelines_reward_model_has_absolute_paths_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = pipeline(
        {"defaults.grm": {"rubrics": "r", "judge": {"model": "j"}}, "stages.opd.recipe.grm": {"rubrics": "o"}}
    )
    resolved = resolve_pipeline_paths(given)
    assert resolved.defaults["grm"] == {"rubrics": str(tmp_path / "r"), "judge": {"model": str(tmp_path / "j")}}
    assert resolved.stages["opd"].recipe["grm"] == {"rubrics": str(tmp_path / "o")}  # type: ignore[union-attr]
    plain = pipeline()
    assert resolve_pipeline_paths(plain).stages == plain.stages
