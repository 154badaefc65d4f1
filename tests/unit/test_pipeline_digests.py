"""What a digest depends on: all that determines a result, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pipeline_cases import pipeline

from opd_mesh.errors import ConfigError, ModelNotFoundError
from opd_mesh.pipeline.digests import FileDigests, Resolved, digest_of, resolve
from opd_mesh.pipeline.plan import plan


def resolved(changes: dict[str, Any] | None = None, choices: Mapping[str, int] | None = None) -> dict[str, Resolved]:
    return resolve(plan(pipeline(changes)), (choices or {}).get, FileDigests())


def digests(changes: dict[str, Any] | None = None) -> dict[str, str | None]:
    return {job_id: one.digest for job_id, one in resolved(changes).items()}


def changed_by(changes: dict[str, Any], before: dict[str, Any] | None = None) -> set[str]:
    """Jobs whose results would be others."""
    old, new = digests(before), digests((before or {}) | changes)
    assert old.keys() == new.keys()
    return {job_id for job_id in old if old[job_id] != new[job_id]}


def test_a_file_that_changes_meanwhile_is_noticed_by_the_jobs_that_read_it(tmp_path: Path) -> None:
    prompts, model = tmp_path / "prompts.jsonl", tmp_path / "model"
    prompts.write_text('{"prompt": "1="}\n')
    model.mkdir()
    (model / "weights").write_bytes(b"1")
    changes = {"domains.bare": {"jsonl": {"path": str(prompts)}}, "model": {"path": str(model)}}
    changes["stages.bare"] = {"kind": "base", "domains": ["bare"], "recipe": {"run": {"steps": 2}}}
    files = FileDigests()
    found = resolve(plan(pipeline(changes)), {}.get, files)
    assert set(found["seed0/bare"].files) == {prompts, model}
    assert set(found["seed0/base"].files) == {model}
    assert found["seed0/add/sft"].files == ()
    prompts.touch()
    for job in found.values():
        files.check(job.files)
    prompts.write_text('{"prompt": "2="}\n')
    files.check(found["seed0/base"].files)
    with pytest.raises(ConfigError, match=r"prompts\.jsonl has changed while a job was reading it"):
        files.check(found["seed0/bare"].files)
    (model / "weights").unlink()
    with pytest.raises(ConfigError, match="model has changed"):
        files.check(found["seed0/base"].files)


EVALUATED = {"seed0/evaluate/answers", "seed0/evaluate"}
AFTER_ADD = {"seed0/add/sft", "seed0/cold/answers", "seed0/cold", "seed0/opd", "seed0/soup"} | EVALUATED


def test_digests_are_the_same_every_time_and_different_for_all() -> None:
    once = digests()
    assert once == digests()
    assert len(set(once.values())) == len(once)


@pytest.mark.parametrize(
    "changes",
    [
        {"pipeline.name": "other", "pipeline.jobs": 7},
        {"defaults.run.threads": 5},
        {"defaults.run.device": "cpu"},
        {"defaults.rollout.timeout_s": 5.0},
        {"defaults.rollout.engine.threads": 3},
        {"defaults.checkpoint": {"every_steps": 9, "keep": 1}},
        {"defaults.redis_url": "redis://elsewhere:1/0", "defaults.teacher_timeout_s": 3.0},
        {"defaults.batch.marks_spill": True},
        {"defaults.objective": {"implementation": "reference"}},
        {"domains.add.verifier.timeout_s": 1.0},
        {"efforts": {"unused": {"opening": "?"}}},
        {"stages.add.sft.optimizer": {"lr": 1e-3}},  # as in defaults
    ],
)
def test_what_does_not_determine_a_result_changes_nothing(changes: dict[str, Any]) -> None:
    assert changed_by(changes) == set()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stages.add.sft.optimizer": {"lr": 5e-3}}, AFTER_ADD),
        ({"stages.add.sft.run.steps": 9}, AFTER_ADD),
        ({"stages.opd.recipe.optimizer": {"lr": 5e-3}}, {"seed0/opd"} | EVALUATED),
        ({"stages.opd.teachers.add": {"add": 1.0, "base": 0.5}}, {"seed0/opd"} | EVALUATED),
        ({"stages.soup.weights": [1, 2]}, {"seed0/soup"} | EVALUATED),
        ({"stages.evaluate.prompts_per_domain": 9}, EVALUATED),
        (
            {"stages.cold.responses.temperature": 0.5},
            {"seed0/cold/answers", "seed0/cold", "seed0/opd"} | EVALUATED,
        ),
    ],
)
def test_a_change_reaches_what_depends_on_it_and_nothing_else(changes: dict[str, Any], expected: set[str]) -> None:
    assert changed_by(changes) == expected


def test_a_domain_that_is_only_looked_at_does_not_determine_a_specialist() -> None:
    changed = changed_by({"domains.reverse.reasoning_gym": {"task": "spell_backward", "params": {"max_word_len": 5}}})
    assert "seed0/reverse/grpo" in changed
    assert "seed0/base" in changed  # it trains on both, so that here all that follows is another
    apart = {"stages.base.domains": {"add": {}}}
    changed = changed_by({"domains.reverse.prompt": "{{ metadata.word }}>"}, before=apart)
    assert not changed & {"seed0/model", "seed0/base", "seed0/add/sft"}
    assert {"seed0/reverse/grpo", "seed0/soup"} <= changed


def test_the_seed_and_the_model_reach_everything() -> None:
    assert changed_by({"model.init.config.hidden_size": 48} | {}) == set(digests())
    one, other = resolved({"pipeline.seeds": [0, 1]}), resolved()
    assert {job_id: found.digest for job_id, found in one.items() if job_id in other} == digests()
    assert all(
        found.digest != one[job_id.replace("seed1", "seed0")].digest
        for job_id, found in one.items()
        if job_id.startswith("seed1/")
    )


def test_a_model_that_is_added_leaves_the_answers_of_the_others() -> None:
    before = resolved()["seed0/evaluate/answers"].parts
    after = resolved({"stages.evaluate.models": ["base", "add", "reverse", "opd", "soup", "cold"]})
    assert {model: after["seed0/evaluate/answers"].parts[model] for model in before} == before
    assert set(after["seed0/evaluate/answers"].parts) - set(before) == {"cold"}
    assert len(set(after["seed0/evaluate/answers"].parts.values())) == 6


def test_one_changed_specialist_leaves_the_answers_of_others() -> None:
    before = resolved()
    after = resolved({"stages.add.sft.run.steps": 9})
    for job_id, kept in (("seed0/cold/answers", {"reverse"}), ("seed0/evaluate/answers", {"base", "reverse"})):
        same = {model for model, digest in after[job_id].parts.items() if before[job_id].parts[model] == digest}
        assert same == kept


# --- files -----------------------------------------------------------------------------------------------------
def test_files_count_by_their_contents(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "elsewhere.jsonl"
    for path in (first, second):
        path.write_text('{"prompt": "1+1=", "answer": "2"}\n')

    def with_file(path: Path) -> dict[str, Any]:
        return {"domains.add.reasoning_gym": None, "domains.add.prompt": None} | {
            "domains.add.jsonl": {"path": str(path)},
            "domains.add.verifier": {"name": "exact"},
        }

    before = digests(with_file(first))
    assert digests(with_file(second)) == before
    second.write_text('{"prompt": "1+1=", "answer": "3"}\n')
    after = digests(with_file(second))
    changed = {job_id for job_id in before if before[job_id] != after[job_id]}
    assert {"seed0/base", "seed0/add/sft"} <= changed
    assert "seed0/model" not in changed
    with pytest.raises(ConfigError, match=r"absent\.jsonl"):
        digests(with_file(tmp_path / "absent.jsonl"))


def test_a_model_from_outside_counts_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"1")
    changes = {"model": {"path": str(tmp_path / "model")}}
    before = digests(changes)
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(ModelNotFoundError):
        digests(changes)
    assert digests({"model": {"path": str(tmp_path / "moved")}}) == before
    (tmp_path / "moved" / "model.safetensors").write_bytes(b"2")
    assert digests({"model": {"path": str(tmp_path / "moved")}})["seed0/base"] != before["seed0/base"]


def test_the_digest_of_values_does_not_depend_on_their_order() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert digest_of({"b": [1, 2]}) != digest_of({"b": [2, 1]})


# --- choices ---------------------------------------------------------------------------------------------------
def test_what_depends_on_a_choice_is_known_once_it_is_made() -> None:
    sweep = {"pipeline.seeds": [0, 1], "stages.add.sweep": {"optimizer.lr": [1e-3, 2e-3]}}
    open_ones = resolved(sweep)
    choice = open_ones["seed0/add/choose"].digest
    assert choice is not None
    unknown = {job_id for job_id, found in open_ones.items() if found.digest is None}
    after = {"cold/answers", "cold", "opd", "soup", "evaluate/answers", "evaluate"}
    assert unknown == {f"seed{seed}/{name}" for seed in (0, 1) for name in after} | {"seed1/add/sft"}
    # Answers of models that do not depend on it are known already.
    assert set(open_ones["seed0/evaluate/answers"].parts) == {"base", "reverse"}

    made = resolved(sweep, {choice: 1})
    assert all(found.digest is not None for found in made.values())
    assert made["seed1/add/sft"].option == 1
    assert made["seed0/soup"].inputs["model/0"] == made["seed0/add/sft[optimizer.lr=0.002]"].digest
    other = resolved(sweep, {choice: 0})
    assert other["seed0/soup"].digest != made["seed0/soup"].digest
    # A sweep that comes to what stood there before comes to the same artefacts.
    assert other["seed0/soup"].digest == resolved()["seed0/soup"].digest
    assert made["seed1/add/sft"].digest != other["seed1/add/sft"].digest


# --- judging ---------------------------------------------------------------------------------------------------
def judging(folder: Path, **files: str) -> dict[str, Any]:
    """The tiny pipeline with a stage that learns to answer and to judge, and one that is rewarded by a GRM."""
    for name in ("spelling", "style"):
        (folder / f"{name}.yaml").write_text(files.get(name, f"name: {name}\ncriteria: [{{name: good}}]\n"))
    whole = dict.fromkeys(("stages.cold", "stages.opd", "stages.soup", "stages.add", "stages.evaluate"))
    return whole | {
        "domains.judge": {"judging": {"rubric": str(folder / "spelling.yaml"), "domain": "reverse"}},
        "domains.reverse.reward": {"name": "grm", "rubric": str(folder / "style.yaml")},
        "defaults.rollout": {"max_new_tokens": 6, "engine": {"max_context_tokens": 1024}},
        "stages.judge": {"kind": "base", "domains": ["judge"], "recipe": {"run": {"steps": 2}}},
    }


def judging_digests(folder: Path, changes: Mapping[str, Any] | None = None, **files: str) -> dict[str, str | None]:
    return digests(judging(folder, **files) | dict(changes or {}))


def test_rubrics_go_in_by_their_contents_where_something_is_learned_by_them(tmp_path: Path) -> None:
    before = judging_digests(tmp_path)

    def other(changes: Mapping[str, Any] | None = None, **files: str) -> set[str]:
        after = judging_digests(tmp_path, changes, **files)
        assert after.keys() == before.keys()
        return {job for job in after if after[job] != before[job]}

    changed = "name: spelling\ncriteria: [{name: bad}]\n"
    assert other() == set()
    assert other(spelling=changed) == {"seed0/judge"}
    assert other(style=changed) == {"seed0/reverse/grpo"}  # SFT earns nothing
    # The stage that judges reverse depends on what reverse asks, and not on how it is rewarded.
    assert other({"domains.reverse.prompt": "{{ metadata.word }}:"}) >= {"seed0/judge", "seed0/reverse/grpo"}
    assert other({"domains.reverse.verifier.threshold": 1.0}) >= {"seed0/judge", "seed0/reverse/grpo"}
    assert other({"defaults.grm": {"max_verdict_tokens": 99}}) == {"seed0/reverse/grpo"}
    assert other({"defaults.grm": {"peers": {"channel": {"timeout_s": 99}}}}) == set()


def test_of_a_frozen_judges_engine_goes_in_what_goes_in_of_the_students(tmp_path: Path) -> None:
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")

    def digest(**engine: Any) -> str | None:
        judge = {"model": str(tmp_path / "judge"), "engine": {"max_context_tokens": 1024, **engine}}
        return judging_digests(tmp_path, {"defaults.grm": {"judge": judge}})["seed0/reverse/grpo"]

    assert digest(threads=3, cache_bytes=1 << 20, max_waiting=5) == digest()
    assert digest(dtype="bfloat16") != digest()
    assert digest(engine="vllm") != digest()
