"""Recipes and service configurations: what is refused, what is said, and that nothing is lost on the way to disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from opd_mesh.config.base import dump_config, load_config, parse_config
from opd_mesh.config.pipeline import PipelineRecipe
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.services import ClientTlsConfig, PeerConfig, ServerConfig, TeacherServerConfig
from opd_mesh.errors import ConfigError
from opd_mesh.supervisor import LocalMesh

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


def plain(**sections: Any) -> dict[str, Any]:
    """A small valid recipe as YAML would give it; ``sections`` replace whole sections."""
    return {
        "run": {"name": "r", "steps": 3},
        "student": {"path": "models/student"},
        "teachers": {"arithmetic": {"path": "models/a"}, "words": {"addresses": ["10.0.0.7:8500"]}},
        "domains": {
            "sums": {"reasoning_gym": {"task": "chain_sum"}, "teachers": {"arithmetic": 1.0}},
            "text": {"jsonl": {"path": "data/text.jsonl"}, "teachers": {"words": 0.5, "arithmetic": 0.25}},
        },
        **sections,
    }


def refusal(value: Any, model: Any = Recipe) -> ConfigError:
    """The error that ``value`` is refused with."""
    with pytest.raises(ConfigError) as caught:
        parse_config(model, value, source="r.yaml")
    return caught.value


def test_a_valid_recipe_is_taken() -> None:
    recipe = parse_config(Recipe, plain(), source="r.yaml")
    assert recipe.run.steps == 3
    assert recipe.domains["text"].teachers == {"words": 0.5, "arithmetic": 0.25}
    assert recipe.student.path == Path("models/student")


@pytest.mark.parametrize(
    ("value", "path", "near"),
    [
        (plain(optimiser={"lr": 1e-3}), "optimiser", "'optimizer'"),
        (plain(optimizer={"learning_rate": 1e-3}), "optimizer.learning_rate", None),
        (plain(optimizer={"max_gradient_norm": 1.0}), "optimizer.max_gradient_norm", "'max_grad_norm'"),
        (plain(rollout={"engine": {"max_slot": 2}}), "rollout.engine.max_slot", "'max_slots'"),
        (plain(teachers={"arithmetic": {"path": "a", "adaptor": "b"}}), "teachers.arithmetic.adaptor", "'adapter'"),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_nearest(value: Any, path: str, near: str | None) -> None:
    error = refusal(value)
    line = next(line for line in str(error).splitlines() if line.strip().startswith(f"{path}: "))
    assert f"unknown key {path.rpartition('.')[2]!r}" in line
    assert (f"did you mean {near}?" in line) if near else ("known keys are betas, eps, " in line)


def test_every_problem_is_listed_at_once() -> None:
    value = plain(
        run={"stps": 3, "sed": 1},
        batch={"prompts_per_step": 0},
        optimizer={"lr": -1, "scheduel": "cosine"},
        recipe_version=2,
    )
    error = refusal(value)
    paths = [line.strip().partition(": ")[0] for line in str(error).splitlines()[1:]]
    wrong = {"recipe_version", "run.stps", "run.sed", "run.steps", "batch.prompts_per_step"}
    assert set(paths) == wrong | {"optimizer.lr", "optimizer.scheduel"}
    assert len(paths) == len(set(paths))
    assert error.field == paths[0]
    assert str(error).startswith("r.yaml is not valid:")


def test_an_unknown_key_is_refused_from_python_too() -> None:
    with pytest.raises(ValidationError, match="did you mean 'drain_grace_s'"):
        ServerConfig(drain_grace=3.0)  # type: ignore[call-arg]


def test_routing_to_an_unknown_teacher() -> None:
    value = plain()
    value["domains"]["sums"]["teachers"] = {"arithmetics": 1.0, "arithmetic": 1.0}
    assert "domains.sums.teachers names 'arithmetics', but the teachers are arithmetic, words" in str(refusal(value))


def test_a_teacher_that_marks_nothing() -> None:
    value = plain()
    value["domains"].pop("text")
    assert "teachers words mark no domain" in str(refusal(value))


@pytest.mark.parametrize("weight", [0, -0.5, float("inf"), float("nan")])
def test_a_weight_must_be_above_zero_and_finite(weight: float) -> None:
    value = plain()
    value["domains"]["text"]["teachers"]["words"] = weight
    assert "domains.text: teachers.words: the weight must be above 0 and finite" in str(refusal(value))


def test_a_domain_without_teachers() -> None:
    value = plain()
    value["domains"]["text"]["teachers"] = {}
    assert "domains.text.teachers: " in str(refusal(value))


@pytest.mark.parametrize("sources", [(), ("reasoning_gym", "jsonl")])
def test_a_domain_has_exactly_one_source(sources: tuple[str, ...]) -> None:
    known = {"reasoning_gym": {"task": "chain_sum"}, "jsonl": {"path": "p.jsonl"}}
    value = plain()
    value["domains"]["sums"] = {"teachers": {"arithmetic": 1.0}, **{name: known[name] for name in sources}}
    wanted = "domains.sums: name exactly one source: reasoning_gym, jsonl, dataset, trajectories or judging"
    assert wanted in str(refusal(value))


def test_a_teacher_needs_a_path_or_addresses() -> None:
    value = plain()
    value["teachers"]["words"] = {"domains": ["text"]}
    assert "teachers.words: give `path` (a checkpoint folder) or `addresses`" in str(refusal(value))


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":8500", "host:http", "host:70000", "host:-1"])
def test_an_address_that_cannot_be_dialled(address: str) -> None:
    assert repr(address) in str(refusal({"addresses": ["10.0.0.1:1", address]}, PeerConfig))
    value = plain()
    value["teachers"]["words"]["addresses"] = [address]
    assert f"teachers.words: {address!r} is not host:port" in str(refusal(value))


@pytest.mark.parametrize("address", ["localhost:8500", "10.0.0.1:65535", "[::1]:8500", "rollout-0.mesh.svc:8500"])
def test_an_address_that_can(address: str) -> None:
    assert PeerConfig(addresses=[address]).addresses == [address]


@pytest.mark.parametrize("only", ["cert_file", "key_file"])
def test_a_client_certificate_goes_with_its_key(only: str) -> None:
    # gRPC's core ends the whole process when it is given one without the other.
    assert "cert_file and key_file go together" in str(refusal({"ca_file": "ca.pem", only: "x.pem"}, ClientTlsConfig))


# --- files ----------------------------------------------------------------------------------------------------
def written(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_duplicate_key_is_refused_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "run:\n  steps: 3\n  seed: 1\n  steps: 4\n")
    with pytest.raises(ConfigError, match=r"duplicate key 'steps'(.|\n)*line 4"):
        load_config(Recipe, path)


def test_merge_keys_work_and_own_keys_win(tmp_path: Path) -> None:
    text = yaml.safe_dump(plain(teachers={}))
    path = written(
        tmp_path,
        text.replace(
            "teachers: {}\n",
            "teachers:\n  arithmetic: &base {path: m/a, dtype: bfloat16}\n  words: {<<: *base, path: m/w}\n",
        ),
    )
    words = load_config(Recipe, path).teachers["words"]
    assert (words.path, words.dtype) == (Path("m/w"), "bfloat16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping at the top level, found NoneType"),
        ("- run\n- student\n", "must hold a mapping at the top level, found list"),
        ("just words\n", "must hold a mapping at the top level, found str"),
        ("run: {steps: 3\n", "is not YAML"),
        ("? [run, steps]\n: 3\n", "a key must be a scalar"),
        ("run: !!python/object/apply:os.getpid []\n", "is not YAML"),
    ],
)
def test_files_that_hold_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"run: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(Recipe, path)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*: (No such file|Is a directory)"):
        load_config(Recipe, tmp_path / name)


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
POSITIVE = st.floats(1e-12, 1e6, allow_nan=False)


@settings(max_examples=30)
@given(
    lr=POSITIVE,
    eps=st.floats(1e-30, 1.0),
    share=POSITIVE,
    weight=POSITIVE,
    seed=st.integers(0, 2**63 - 1),
    name=NAMES,
    system_prompt=st.none() | st.text(st.characters(codec="utf-8"), max_size=30),
    stop=st.lists(st.integers(0, 2**31 - 1), max_size=3),
)
def test_a_recipe_survives_the_way_to_disk_and_back(
    tmp_path_factory: pytest.TempPathFactory,
    lr: float,
    eps: float,
    share: float,
    weight: float,
    seed: int,
    name: str,
    system_prompt: str | None,
    stop: list[int],
) -> None:
    value = plain(optimizer={"lr": lr, "eps": eps, "betas": [0.8, 0.99]}, rollout={"stop_token_ids": stop})
    value["run"] |= {"name": name, "seed": seed}
    value["domains"]["sums"] |= {"share": share, "system_prompt": system_prompt, "teachers": {"arithmetic": weight}}
    recipe = parse_config(Recipe, value, source="test")
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    dump_config(recipe, path)
    assert load_config(Recipe, path) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_parses(path: Path) -> None:
    if "stages" in yaml.safe_load(path.read_text()):
        assert load_config(PipelineRecipe, path).stages
    else:
        assert load_config(Recipe, path).run.steps >= 1


def test_replace_validates_and_leaves_the_original() -> None:
    recipe = parse_config(Recipe, plain(), source="test")
    run = recipe.run.replace(steps=7)
    assert (run.steps, recipe.run.steps) == (7, 3)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        recipe.run.replace(steps=0)
    with pytest.raises(ValidationError, match="did you mean 'steps'"):
        recipe.run.replace(step=1)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.run.steps = 5  # type: ignore[misc]
    # The rules between sections hold for a copy, too.
    with pytest.raises(ValidationError, match="teachers arithmetic mark no domain"):
        recipe.replace(domains={"text": {"jsonl": {"path": "p"}, "teachers": {"words": 1.0}}})


def test_a_teacher_server_needs_a_teacher() -> None:
    assert "teachers: " in str(refusal({"teachers": {}}, TeacherServerConfig))


# --- objectives and optimizers: one of several models, told apart by name -----------------------------------------
CHOICES: list[dict[str, Any]] = [
    {"objective": {"name": "forward_kl", "temperature": 2.0}},
    {"objective": {"name": "jsd", "beta": 0.25}},
    {"objective": {"name": "exopd", "lam": 1.5, "reference": "arithmetic"}},
    {"objective": {"name": "top_k", "k": 8}},
    {"objective": {"name": "sampled_token"}, "optimizer": {"name": "muon", "momentum": 0.9}},
]


@pytest.mark.parametrize("sections", CHOICES, ids=lambda sections: sections["objective"]["name"])
def test_every_objective_survives_the_way_to_disk_and_back(tmp_path: Path, sections: dict[str, Any]) -> None:
    recipe = parse_config(Recipe, plain(**sections), source="r.yaml")
    for section, wanted in sections.items():
        assert getattr(recipe, section).model_dump().items() >= wanted.items()
    dump_config(recipe, tmp_path / "r.yaml")
    assert load_config(Recipe, tmp_path / "r.yaml") == recipe
    assert recipe.replace(objective=recipe.objective.replace(signal="logits")).objective.signal == "logits"


def test_without_a_name_it_is_reverse_kl_by_adamw() -> None:
    recipe = parse_config(Recipe, plain(objective={"temperature": 0.5}, optimizer={"lr": 1e-3}), source="r.yaml")
    assert (recipe.objective.name, recipe.objective.temperature) == ("reverse_kl", 0.5)
    assert (recipe.optimizer.name, recipe.optimizer.lr) == ("adamw", 1e-3)
    assert recipe.reference_id is None


@pytest.mark.parametrize(
    ("sections", "field", "message"),
    [
        ({"objective": {"name": "jds"}}, "objective", "name, one of reverse_kl, forward_kl, jsd"),
        ({"objective": "forward_kl"}, "objective", r"write \{name: …\} with the objective's name"),
        ({"optimizer": {"name": "sgd"}}, "optimizer", "one of adamw, muon"),
        ({"objective": {"name": "jsd", "beta": 1.0}}, "objective.beta", "less than 1"),
        ({"objective": {"name": "jsd", "btea": 0.1}}, "objective.btea", "did you mean 'beta'"),
        ({"objective": {"beta": 0.1}}, "objective.beta", "unknown key 'beta'"),
        ({"objective": {"temperature": float("inf")}}, "objective.temperature", "finite"),
        ({"objective": {"name": "exopd"}}, "objective.reference", "required"),
        (
            {"objective": {"name": "exopd", "reference": "base"}},
            "(top level)",
            r"objective\.reference names 'base', but the ",
        ),
        ({"optimizer": {"betas": [0.9, 1.5]}}, "optimizer.betas.1", "less than 1"),
        ({"optimizer": {"name": "muon", "lr": float("inf")}}, "optimizer.lr", "finite"),
        ({"batch": {"heads_resident": 0}}, "batch.heads_resident", "greater than or equal to 1"),
    ],
)
def test_a_wrong_choice_is_refused_at_its_place(sections: dict[str, Any], field: str, message: str) -> None:
    error = refusal(plain(**sections))
    assert error.field == field
    assert re.search(message, error.message), error.message


def test_a_reference_need_not_mark_a_domain() -> None:
    teachers = plain()["teachers"] | {"base": {"path": "models/base"}}
    recipe = parse_config(
        Recipe, plain(teachers=teachers, objective={"name": "exopd", "reference": "base"}), source="r.yaml"
    )
    assert recipe.reference_id == "base"
    assert refusal(plain(teachers=teachers)).message.count("base")


def test_weights_may_lie_in_a_store_and_the_pool_goes_with_the_teachers(tmp_path: Path) -> None:
    url = "s3://bucket/teachers/math"
    value = plain(teachers={"arithmetic": {"path": url, "adapter": url}, "words": {"path": "models/w"}})
    value["pool"] = {"memory_bytes": "40GiB", "order": "arrival"}
    recipe = parse_config(Recipe, value, source="test")
    dump_config(recipe, tmp_path / "recipe.yaml")
    loaded = load_config(Recipe, tmp_path / "recipe.yaml")
    assert loaded == recipe
    assert (loaded.teachers["arithmetic"].path, loaded.teachers["arithmetic"].adapter) == (url, url)
    assert loaded.teachers["words"].path == Path("models/w")
    served = LocalMesh(loaded, tmp_path)._teacher_config()
    assert served.pool.memory_bytes == 40 * 2**30
    assert served.teachers["arithmetic"].path == url


@pytest.mark.parametrize("text", ["40 apples", "-1", "0"])
def test_a_budget_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"pool\.memory_bytes"):
        parse_config(Recipe, plain(pool={"memory_bytes": text}), source="test")
