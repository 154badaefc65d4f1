"""What is minimized, behind one interface: a recipe names one of its values, and the loop never asks which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Protocol

from opd_kernels import LinearHead

from opd_mesh.config.recipe import Recipe
from opd_mesh.config.training import DivergenceConfig, PolicyGradientConfig, SftConfig
from opd_mesh.grammar import Grammars, TokenVocabulary
from student_trainer.batch import Sample
from student_trainer.heads import HeadStore
from student_trainer.passes import OpenPass, TokenMeans
from student_trainer.student import Student


class PassLoss(Protocol):
    """The part of the loss that one forward pass has."""

    def visit(self, shares: Mapping[tuple[str, ...], Sequence[int]]) -> float:
        """Backward of a part of the loss to ``leaf_Rd`` and the head; returns its value.

        Args:
            shares: which teachers mark which samples (by index in the pass) now, see :mod:`student_trainer.batch`;
                empty where no head is needed. Every pass is visited at least once.
        """
        ...

    def close(self) -> None:
        """All visits are over: diagnostics, and whatever is not needed any more."""
        ...


class BatchLoss(Protocol):
    """The loss of one mini-batch."""

    def of_pass(self, current: OpenPass) -> PassLoss:
        """The part of one pass, which has just been opened."""
        ...


class Objective(Protocol):
    """What a run minimizes."""

    def of_batch(self, samples: Sequence[Sample], head: LinearHead, heads: HeadStore, means: TokenMeans) -> BatchLoss:
        """For all samples of a mini-batch.

        Args:
            head: the student's, live.
            means: takes the diagnostics.
        """
        ...


def build_objective(recipe: Recipe, student: Student | None = None) -> Objective:
    """The objective that a recipe names.

    Args:
        student: whose tokenizer the grammars of responses speak of; without it responses with a grammar are refused.
    """
    from student_trainer.distillation import Distillation
    from student_trainer.likelihood import PolicyGradient, Sft

    deterministic = recipe.run.deterministic
    match recipe.objective:
        case DivergenceConfig() as config:
            return Distillation.of(config, deterministic=deterministic)
        case SftConfig() as config:
            return Sft(config.implementation, deterministic)
        case PolicyGradientConfig() as config:
            longest = max(recipe.max_new_tokens(domain) for domain in recipe.trained_domains.values())
            grammars = None if student is None else cache(lambda: _grammars(student))
            return PolicyGradient(config, recipe.rollout.temperature, longest, deterministic, grammars)


def _grammars(student: Student) -> Grammars:
    """A second's work for a large vocabulary. Raises :class:`PreconditionError` where the tokenizer is not for them."""
    return Grammars(TokenVocabulary.of(student.tokenizer, student.vocab_size))
