"""What is checked before the first step, so that nothing is trained on a misunderstanding."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import numpy as np

from opd_mesh.clients.replica import speaks_of_the_replica
from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import (
    ConfigError,
    DeadlineError,
    OpdError,
    OverloadedError,
    PreconditionError,
    TeacherUnavailableError,
    TokenizerMismatchError,
    UnavailableError,
)
from opd_mesh.models.tokenizer import (
    TokenizerRoles,
    first_difference,
    role_differences,
    tokenizer_fingerprint,
    tokenizer_roles,
)
from opd_mesh.tensors import dtype_name
from student_trainer.student import Student
from student_trainer.teachers import Teachers

log = logging.getLogger("student_trainer")
PROBE_TOKENS = 32
# Between two attempts to find one replica that scores, where it does not say how long.
RETRY_DELAY_S = 0.5
# What may be otherwise in a moment.
PASSING = (OverloadedError, UnavailableError, DeadlineError)


@dataclass(frozen=True)
class Tolerance:
    """What other kernels, devices and thread counts may change in a sound teacher's answer.

    Attributes:
        row: root mean square of a row's difference, over that of the row itself.
        outliers: share of the rows that may differ by more.
    """

    row: float
    outliers: float = 0.0


# SmolLM2-135M's hidden states of these 32 tokens, one attention kernel against another on a CPU: 4e-6 at worst in
# float32; in bfloat16 0.02 in the median row and 0.3 in the worst, which hangs on a rounding. With and without its
# adapter: 0.13 in the median row.
REPLICA_TOLERANCE = {
    "float32": Tolerance(1e-4),
    "float16": Tolerance(0.0125, outliers=1 / 8),
    "bfloat16": Tolerance(0.1, outliers=1 / 8),
}


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


# --- replicas ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Disagreement:
    """The first row in which two replicas' answers differ by more than they may."""

    row: int
    size: float  # root mean square of the difference, over that of the reference's row
    count: int  # of rows that differ so


def first_disagreement(reference: np.ndarray, rows: np.ndarray, tolerance: Tolerance | None) -> Disagreement | None:
    """Compare two answers [R, …], row by row; without a tolerance they must have the same bits."""
    if reference.shape != rows.shape:
        return Disagreement(0, float("inf"), len(reference))
    one, other = (np.asarray(array, dtype=np.float64).reshape(len(array), -1) for array in (reference, rows))
    with np.errstate(invalid="ignore"):  # what is not finite differs from everything
        norms = np.maximum(np.linalg.norm(one, axis=1), np.finfo(np.float32).tiny)
        sizes = np.linalg.norm(one - other, axis=1) / norms
    if tolerance is None:
        wrong = np.array([left.tobytes() != right.tobytes() for left, right in zip(reference, rows, strict=True)])
        allowed = 0
    else:
        wrong = ~(sizes <= tolerance.row)
        allowed = int(tolerance.outliers * len(sizes)) if np.isfinite(sizes).all() else 0
    if wrong.sum() <= allowed:
        return None
    row = int(np.argmax(wrong))
    return Disagreement(row, float(sizes[row]), int(wrong.sum()))


async def check_replicas(recipe: Recipe, teachers: Teachers) -> None:
    """One fixed sequence, scored by every teacher on every replica: the answers must agree, or there is no run.

    To the bit in deterministic mode, else to :data:`REPLICA_TOLERANCE`. A replica that does not answer is left out with
    a warning as long as another does; it, and whoever joins or comes back later, is asked the same before its first
    item.

    Raises:
        PreconditionError: names the teacher, both replicas, the first differing position, and by how much.
        TeacherUnavailableError: no replica of a teacher answers within ``teacher_timeout_s``.
    """
    references: dict[str, tuple[str, np.ndarray]] = {}
    silent: dict[str, dict[str, OpdError]] = {}

    async def probe(teacher_id: str, address: str) -> None:
        reference_address, reference = references[teacher_id]
        rows = await teachers.rows_at(teacher_id, address, _probe_ids(teachers, teacher_id))
        card, wire = teachers.cards[teacher_id], teachers.wire_dtype
        dtypes = {dtype_name(card.dtype), dtype_name(card.dtype) if wire == "auto" else wire}
        tolerance = (
            None
            if recipe.run.deterministic
            else max((REPLICA_TOLERANCE[dtype] for dtype in dtypes), key=lambda each: each.row)
        )
        found = first_disagreement(reference, rows, tolerance)
        if found is not None:
            allowed = f"{tolerance.row:g} is allowed" if tolerance else "run.deterministic asks for the same bits"
            raise PreconditionError(
                f"replica {address} of teacher {teacher_id!r} does not say what replica {reference_address} says of "
                f"the same sequence: they differ first at position {found.row} (which predicts token {found.row + 1}), "
                f"by {found.size:.2g} of its size, where {allowed}; in all at {found.count} of {len(reference)} "
                "positions. The weights are the same by digest, so it is how they compute: compare versions, devices, "
                "dtypes, threads and `deterministic` of both servers, or take one out of the addresses",
                field=f"teachers.{teacher_id}.addresses",
                metadata={"teacher_id": teacher_id, "replica": address, "position": str(found.row)},
            )

    for teacher_id in teachers.cards:
        if not teachers.has_one_address(teacher_id):
            address, rows, silent[teacher_id] = await _first_answer(teachers, teacher_id, recipe.teacher_timeout_s)
            references[teacher_id] = address, rows
    # Between these two lines nothing can happen: who serves by now was admitted without a question and is listed here,
    # who is admitted from now on is asked. A question without its reference would let a newcomer in unasked.
    teachers.probe_newcomers(probe)
    unasked = {
        teacher_id: [
            each for each in teachers.replicas_of(teacher_id) if each != first and each not in silent[teacher_id]
        ]
        for teacher_id, (first, _) in references.items()
    }
    for teacher_id, others in unasked.items():
        answers = await asyncio.gather(*(probe(teacher_id, each) for each in others), return_exceptions=True)
        for address, answer in zip(others, answers, strict=True):
            if isinstance(answer, OpdError):
                _keep_if_silent(answer, address, silent[teacher_id])
            elif answer is not None:
                raise answer
        for address, why in silent[teacher_id].items():
            log.warning("replica %s of teacher %s is left out until it scores: %s", address, teacher_id, why)
            teachers.leave_out(teacher_id, address, why)


async def _first_answer(
    teachers: Teachers, teacher_id: str, timeout_s: float
) -> tuple[str, np.ndarray, dict[str, OpdError]]:
    """The first replica that scores the sequence, what it says, and what is the matter with those asked before it.

    Each is asked again, no sooner than it says, while anything may be different in a moment.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    ids = _probe_ids(teachers, teacher_id)
    silent: dict[str, OpdError] = {}
    due: dict[str, float] = {}
    while True:
        for address in teachers.replicas_of(teacher_id):
            if due.get(address, 0.0) > loop.time():
                continue
            silent.pop(address, None)
            try:
                async with asyncio.timeout_at(deadline):
                    return address, await teachers.rows_at(teacher_id, address, ids), silent
            except TimeoutError:
                silent[address] = DeadlineError(f"no answer within {timeout_s:g} s")
            except OpdError as error:
                _keep_if_silent(error, address, silent)
                due[address] = loop.time() + (error.retry_delay_s or RETRY_DELAY_S)
        left_s = max(0.0, deadline - loop.time())
        if not left_s or (silent and not any(isinstance(error, PASSING) for error in silent.values())):
            said = "; ".join(f"{address}: {why}" for address, why in silent.items()) or "none serves"
            raise TeacherUnavailableError(
                f"no replica of teacher {teacher_id!r} scores a sequence, asked for {timeout_s - left_s:.3g} s ({said})"
            )
        waits = [due[address] - loop.time() for address in teachers.replicas_of(teacher_id) if address in due]
        await asyncio.sleep(max(0.0, min([*waits, RETRY_DELAY_S, left_s])))


def _keep_if_silent(error: OpdError, address: str, silent: dict[str, OpdError]) -> None:
    if not speaks_of_the_replica(error):
        raise error
    silent[address] = error


def _probe_ids(teachers: Teachers, teacher_id: str) -> list[int]:
    """The same ids in every run, all over the vocabulary."""
    card = teachers.cards[teacher_id]
    length = min(PROBE_TOKENS, card.limits.max_tokens_per_item or PROBE_TOKENS)
    return [(7 + 2_654_435_761 * place) % card.vocab_size for place in range(length)]
