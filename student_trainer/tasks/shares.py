"""How many prompts of a step each domain gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opd_mesh.errors import ConfigError
from student_trainer.tasks.domain import Domain
from student_trainer.tasks.items import Prompt


def allot(shares: Mapping[str, float], count: int, already: Mapping[str, int]) -> dict[str, int]:
    """How many of the next ``count`` prompts each domain gets, so that totals follow the shares at every step.

    A pure function: each prompt goes to the domain furthest behind its share of all prompts so far. A domain of share 0
    gets none.
    """
    given = dict.fromkeys(shares, 0)
    total = sum(shares.values())
    if not total and count:
        raise ConfigError("every domain has share 0, so there is nothing to train on", field="domains")
    drawn = sum(already.get(name, 0) for name in shares)
    for number in range(count):
        so_far = drawn + number + 1
        behind = {name: shares[name] / total * so_far - (already.get(name, 0) + given[name]) for name in shares}
        given[max(behind, key=lambda name: behind[name])] += 1
    return given


def next_prompts(
    domains: Sequence[Domain], count: int, cursors: Mapping[str, int], drawn: Mapping[str, int]
) -> tuple[list[Prompt], dict[str, int], dict[str, int]]:
    """The prompts of one step; returns (prompts, cursors behind them, prompts drawn so far by domain)."""
    portions = allot({domain.name: domain.config.share for domain in domains}, count, drawn)
    prompts: list[Prompt] = []
    new_cursors, new_drawn = dict(cursors), dict(drawn)
    for domain in domains:
        portion = portions[domain.name]
        taken, new_cursors[domain.name] = domain.after(cursors.get(domain.name, 0), portion)
        new_drawn[domain.name] = drawn.get(domain.name, 0) + portion
        prompts.extend(taken)
    return prompts, new_cursors, new_drawn
