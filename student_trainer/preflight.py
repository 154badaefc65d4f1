"""What is checked before the first step, so that nothing is trained on a misunderstanding."""

from __future__ import annotations

from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import ConfigError, PreconditionError, TokenizerMismatchError
from opd_mesh.models.tokenizer import (
    TokenizerRoles,
    first_difference,
    role_differences,
    tokenizer_fingerprint,
    tokenizer_roles,
)
from student_trainer.student import Student
from student_trainer.teachers import Teachers


async def check_tokenizers(recipe: Recipe, student: Student, teachers: Teachers) -> list[str]:
    """Same token map everywhere, or no run; other roles only where the recipe says how to treat them.

    Returns:
        Sentences on roles that differ and are overridden by the student's.

    Raises:
        TokenizerMismatchError: names both sides and the first differing token.
        PreconditionError: roles differ and ``tokenizer_roles`` is "same".
    """
    vocabulary = student.tokenizer.get_vocab()
    fingerprint = tokenizer_fingerprint(vocabulary)
    roles = tokenizer_roles(student.tokenizer)
    notes: list[str] = []
    for teacher_id, card in teachers.cards.items():
        if card.tokenizer_fingerprint != fingerprint:
            theirs = await teachers.get_vocabulary(teacher_id)
            difference = first_difference(
                vocabulary, theirs, name_a=f"the student ({recipe.student.path})", name_b=f"teacher {teacher_id!r}"
            )
            raise TokenizerMismatchError(
                f"student and teacher {teacher_id!r} have different tokenizers: {difference}. A teacher marks token "
                "ids, so both must come from the same base; choose another teacher or another student",
                field=f"teachers.{teacher_id}",
                metadata={"student": fingerprint, "teacher": card.tokenizer_fingerprint},
            )
        sent = card.tokenizer_roles
        theirs_roles = TokenizerRoles(
            bos_token_id=sent.bos_token_id if sent.HasField("bos_token_id") else None,
            eos_token_id=sent.eos_token_id if sent.HasField("eos_token_id") else None,
            pad_token_id=sent.pad_token_id if sent.HasField("pad_token_id") else None,
            chat_template_sha256=sent.chat_template_digest or None,
        )
        differing = role_differences(roles, theirs_roles)
        if differing and recipe.tokenizer_roles == "same":
            raise PreconditionError(
                f"student and teacher {teacher_id!r} have the same tokens in other roles: {'; '.join(differing)} "
                "(student against teacher). A base student under an instruct teacher never learns to stop where it "
                "should. Make them alike, or set tokenizer_roles: student to use the student's throughout",
                field="tokenizer_roles",
            )
        notes.extend(f"teacher {teacher_id}: {line} (the student's is used)" for line in differing)
    return notes


def check_lengths(recipe: Recipe, teachers: Teachers) -> None:
    """Every teacher must take the longest trajectory that can be written. Raises :class:`PreconditionError`."""
    longest = recipe.rollout.engine.max_context_tokens
    for teacher_id, card in teachers.cards.items():
        limit = card.limits.max_tokens_per_item
        if limit < longest:
            raise PreconditionError(
                f"teacher {teacher_id!r} takes {limit} tokens, but the student may write up to {longest}: raise "
                f"teachers.{teacher_id}.max_tokens_per_item or lower rollout.engine.max_context_tokens",
                field=f"teachers.{teacher_id}.max_tokens_per_item",
            )


def check_vocabularies(student: Student, teachers: Teachers) -> None:
    """Heads must have a row for every token. Raises :class:`PreconditionError`."""
    for teacher_id, card in teachers.cards.items():
        if card.vocab_size != student.vocab_size:
            raise PreconditionError(
                f"teacher {teacher_id!r} has {card.vocab_size} ids, the student {student.vocab_size}",
                field=f"teachers.{teacher_id}",
            )


def check_implementation(recipe: Recipe, device: str) -> None:
    """Raises :class:`ConfigError` where the kernels that the recipe asks for do not compile for the device."""
    if recipe.objective.implementation == "triton" and not device.startswith("cuda"):
        raise ConfigError(
            f"'triton' compiles for GPUs, and the trainer is on {device}: leave it out, or say 'torch'",
            field="objective.implementation",
        )
