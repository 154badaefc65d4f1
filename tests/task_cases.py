"""Domains for tests of tasks, and verifiers that misbehave."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny_models import tiny_tokenizer

from opd_mesh.config.base import parse_config
from opd_mesh.config.recipe import Recipe
from student_trainer.tasks import Domain, Grade, Prompt
from student_trainer.tasks.verifiers import Verification

SPELL = {"reasoning_gym": {"task": "spell_backward", "params": {"min_word_len": 3, "max_word_len": 4}}}


def recipe_of(domain: dict[str, Any], *, heldout: int = 3, seed: int = 0, **sections: Any) -> Recipe:
    """A recipe of one domain, ``d``."""
    value = {
        "run": {"steps": 1, "seed": seed},
        "student": {"path": "s"},
        "teachers": {"t": {"path": "t"}},
        "domains": {"d": {"teachers": {"t": 1.0}, **domain}},
        "evaluation": {"prompts_per_domain": heldout},
        **sections,
    }
    return parse_config(Recipe, value, source="test")


def domain_of(recipe: Recipe, *, max_prompt_tokens: int = 400, name: str = "d", tokenizer: Any = None) -> Domain:
    """Its domain, under a name."""
    tokenizer = tokenizer or tiny_tokenizer()
    return Domain(name, recipe.domains["d"], recipe, tokenizer, max_prompt_tokens=max_prompt_tokens)


def make_domain(
    domain: dict[str, Any], *, heldout: int = 3, seed: int = 0, tokenizer: Any = None, **more: Any
) -> Domain:
    """A domain of a configuration."""
    recipe = recipe_of(domain, heldout=heldout, seed=seed, **more)
    return domain_of(recipe, tokenizer=tokenizer, max_prompt_tokens=2000)


def jsonl(path: Path, lines: Sequence[Any]) -> Path:
    """A file of them."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def think_tokenizer() -> Any:
    """A tokenizer whose effort marks are special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    return tokenizer


def behave(answer: str, item: Mapping[str, Any]) -> Any:
    """Does what the answer says."""
    match answer:
        case "hang":
            time.sleep(3600)
        case "crash":
            os._exit(3)
        case "raise":
            raise ValueError("as asked")
        case "write":  # the beginning of a line into every pipe that is open, then hangs
            for descriptor in range(3, 64):
                with contextlib.suppress(OSError):
                    os.write(descriptor, b"\0\0\1\0[1.0, ")
            time.sleep(3600)
        case "exit":
            raise SystemExit(0)
        case "nothing":
            return None
        case "text":
            return "1.0"
        case "true":
            return True
        case "gold":
            return float(item["answer"] == "g" and item["metadata"] == {"level": 2} and item["question"] == "q")
    return float(answer)


NOT_A_FUNCTION = 3


def grade_here(domain: Domain, prompt: Prompt, text: str) -> Grade:
    """Grade in this process."""
    return Verification(domain.verifier_spec).grade(domain.item(prompt), text)
