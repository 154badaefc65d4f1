"""The configuration of domains: the documented examples, the way to disk and back, and what is refused where."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from task_cases import SPELL, grade_here, recipe_of
from tiny_models import tiny_tokenizer

from opd_mesh.config.base import dump_config, load_config, parse_config
from opd_mesh.config.domains import DEFAULT_EFFORTS, DomainConfig
from opd_mesh.config.paths import with_absolute_paths
from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import ConfigError
from student_trainer.tasks import Domain

DOCS = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"
EXAMPLES: dict[str, dict[str, Any]] = {
    name: value
    for block in re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name, value in yaml.safe_load(block).items()
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_documented_example_survives_the_way_to_disk_and_back(name: str, tmp_path: Path) -> None:
    domain = parse_config(DomainConfig, EXAMPLES[name], source="docs/tasks.md")
    dump_config(domain, tmp_path / "domain.yaml")
    assert load_config(DomainConfig, tmp_path / "domain.yaml") == domain
    assert domain.replace(share=2.0).replace(share=domain.share) == domain


@pytest.mark.parametrize("name", ["add", "sort", "palindrome"])
def test_the_documented_families_mark_their_gold_answers_right(name: str) -> None:
    recipe = recipe_of({**EXAMPLES[name], "teachers": {"t": 1.0}})
    domain = Domain("d", recipe.domains["d"], recipe, tiny_tokenizer())
    for prompt in [*domain.after(0, 4)[0], *domain.held_out("test", 4)]:
        assert len(prompt.token_ids) < 50
        answer = domain.text(domain.solution(prompt))
        assert grade_here(domain, prompt, answer).score == 1
        assert grade_here(domain, prompt, "0x").score == 0


def test_the_documented_tables_name_what_there_is() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name in ("reasoning_gym", "exact", "number", "python", *DEFAULT_EFFORTS):
        assert f"\n| `{name}` | " in text
    for name in ("text", "regex", "boxed", "last_number", "tag", "linear", "soft_overlong"):
        assert f"`{name}`" in text


JSONL = {"jsonl": {"path": "p"}}


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        ({"verifer": {}}, "verifer", "did you mean 'verifier'"),
        ({"verifier": {"name": "exakt"}}, "verifier", "name, one of reasoning_gym, exact, number, template, python"),
        ({"verifier": {}}, "verifier", "write {name: …} with the verifier's name"),
        ({"verifier": {"name": "number", "tolerence": 1}}, "verifier.tolerence", "did you mean 'tolerance'"),
        ({"verifier": {"name": "number", "tolerance": -1}}, "verifier.tolerance", "greater than or equal to 0"),
        ({"verifier": {"name": "exact", "timeout_s": 0}}, "verifier.timeout_s", "greater than 0"),
        ({"verifier": {"name": "exact", "extract": {"name": "xpath"}}}, "verifier.extract", "one of text, regex"),
        (
            {"verifier": {"name": "exact", "extract": {"name": "regex", "pattern": "("}}},
            "verifier.extract",
            "pattern: missing )",
        ),
        (
            {"verifier": {"name": "exact", "extract": {"name": "regex", "pattern": "a"}}},
            "verifier.extract",
            "the pattern has no group 1, only 0",
        ),
        ({"verifier": {"name": "python", "function": "module.name"}}, "verifier.function", "should match pattern"),
        ({"verifier": {"name": "python"}}, "verifier.function", "required"),
        ({"verifier": {"name": "reasoning_gym"}}, "", "verifier: reasoning_gym scores answers to its own prompts only"),
        ({"splits": {"validation": 0.5, "test": 0.5}}, "splits", "none is left to train on"),
        ({"splits": {"validation": 0}}, "splits.validation", "greater than 0"),
        ({"jsonl": {"path": "p", "heldout": "h"}, "splits": {}}, "", "jsonl.heldout holds prompts out already"),
        ({"share": -1}, "share", "greater than or equal to 0"),
        ({"share": float("inf")}, "share", "finite"),
        ({"length_penalty": {"name": "linear"}}, "length_penalty.per_token", "required"),
        ({"length_penalty": {"name": "square"}}, "length_penalty", "one of linear, soft_overlong"),
        ({"others": {"share": 0.2}}, "others", "name exactly one source: reasoning_gym, jsonl or dataset"),
        ({"others": {"share": 1, **JSONL}}, "others.share", "less than 1"),
        ({"others": {"jsonl": {"path": "p", "heldout": "h"}}}, "others.jsonl", "heldout: nothing is held out"),
        ({"trajectories": {"path": "p"}}, "", "name exactly one source"),
        ({"jsonl": None}, "", "name exactly one source: reasoning_gym, jsonl, dataset, trajectories or judging"),
        ({"jsonl": None, "dataset": {"path": "p"}}, "dataset", "exactly one column for prompts"),
        (
            {"jsonl": None, "trajectories": {"path": "p"}, "prompt": "x"},
            "",
            "prompt: trajectories are token ids and are learned as they are",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_its_place(change: dict[str, Any], place: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(DomainConfig, {**JSONL, "teachers": {"t": 1.0}, **change}, source="test")
    assert message in caught.value.message
    assert caught.value.field == (place or "(top level)")


def test_a_recipe_refuses_a_mistake_in_a_domain_with_its_whole_path() -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_of({**SPELL, "verifier": {"name": "reasoning_gym", "extract": {"name": "tag", "tog": "x"}}})
    assert caught.value.field == "domains.d.verifier.extract.tog"
    assert "did you mean 'tag'" in caught.value.message


def test_every_path_of_a_domain_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {"prompt_field": "p", "split": "train"}
    for source, paths in (
        ({"jsonl": {"path": "a", "heldout": "b"}}, ["a", "b"]),
        ({"dataset": {"path": "c", **fields}}, ["c"]),
        ({"trajectories": {"path": "d"}}, ["d"]),
        ({**SPELL, "others": {"dataset": {"path": "e", **fields}}}, ["e"]),
        ({**SPELL, "others": {"jsonl": {"path": "f"}}}, ["f"]),
        (SPELL, []),
    ):
        domain = parse_config(DomainConfig, source, source="test")
        resolved = yaml.safe_dump(with_absolute_paths(domain).model_dump(mode="json"))
        assert sorted(re.findall(rf"{re.escape(str(tmp_path))}/(\w+)", resolved)) == paths


def test_efforts_survive_the_way_to_disk_and_back(tmp_path: Path) -> None:
    penalty = {"name": "linear", "per_token": 0.001, "free_tokens": 64}
    recipe = recipe_of(
        {**SPELL, "effort": "brief"},
        efforts={"brief": {"closing": "#", "length_penalty": penalty, "max_new_tokens": 9}},
    )
    dump_config(recipe, tmp_path / "r.yaml")
    assert load_config(Recipe, tmp_path / "r.yaml") == recipe
