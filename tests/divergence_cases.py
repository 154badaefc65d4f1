"""Cases for the divergences, and how an implementation is compared with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeAlias

import torch
from opd_kernels import (
    JSD,
    Divergence,
    ExOPD,
    ForwardKL,
    LinearHead,
    Objective,
    ReverseKL,
    SampledToken,
    Signal,
    TopK,
    linear_divergence,
)
from opd_kernels.inputs import STUDENT_STATS, TEACHER_STATS
from torch import Tensor

# Arguments of `linear_divergence` by name.
Case: TypeAlias = dict[str, Any]

DIAGNOSTICS = [field.name for field in fields(Divergence)][1:]
assert {*DIAGNOSTICS} == {*STUDENT_STATS, *TEACHER_STATS}

OBJECTIVES: dict[str, Objective] = {
    "reverse": ReverseKL(),
    "forward": ForwardKL(),
    "jsd .1": JSD(0.1),
    "jsd .5": JSD(0.5),
    "jsd .9": JSD(0.9),
    "exopd .5": ExOPD(0.5),
    "exopd 1.25": ExOPD(1.25),
    "top-k": TopK(20),
    "sampled": SampledToken(),
}

# Options of `make_case`.
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"student_form": {"logit_scale": 0.25}, "teacher_form": {"logit_scale": 1.7}},
    "student cap": {"student_form": {"soft_cap": 3.0}},
    "teacher cap": {"teacher_form": {"soft_cap": 3.0}},
    "large caps": {"student_form": {"soft_cap": 1e4}, "teacher_form": {"soft_cap": 1e4}},  # tanh of 1e-4 and less
    "padding": {"student_padding": 31, "teacher_padding": 7},
    "student padding": {"student_padding": 31},
    "widths": {"teacher_width": 33},
    "all": {
        "bias": True,
        "student_padding": 5,
        "teacher_padding": 9,
        "teacher_width": 17,
        "student_form": {"logit_scale": 0.7, "soft_cap": 4.0},
        "teacher_form": {"logit_scale": 1.3, "soft_cap": 5.0},
    },
}


# --- cases -------------------------------------------------------------------------------------------------------
def make_signal(
    tokens: int,
    vocab: int,
    width: int,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
    scale: float = 1.0,
    bias: bool = False,
    padding: int = 0,
    form: dict[str, float] | None = None,
) -> Signal:
    """Hidden states and a head in float64; logits have a standard deviation of about 2 × scale."""
    generator = generator or torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = randn(vocab + padding, width) * (2.0 * scale / width**0.5)
    weight[vocab:] = 1e3  # padding that leaked into a softmax would own it
    head = LinearHead(
        weight,
        bias=randn(vocab + padding) if bias else None,
        valid_vocab_size=vocab if padding else None,
        **(form or {}),  # type: ignore[arg-type]
    )
    return Signal(hidden_TE=randn(tokens, width), head=head)


def make_case(
    tokens: int,
    vocab: int,
    student_width: int = 60,
    teacher_width: int = 60,
    *,
    seed: int = 0,
    scale: float = 1.0,
    bias: bool = False,
    student_padding: int = 0,
    teacher_padding: int = 0,
    student_form: dict[str, float] | None = None,
    teacher_form: dict[str, float] | None = None,
) -> Case:
    """Float64 arguments of one teacher."""
    generator = torch.Generator().manual_seed(seed)
    common: dict[str, Any] = {"generator": generator, "scale": scale, "bias": bias}
    student = make_signal(tokens, vocab, student_width, padding=student_padding, form=student_form, **common)
    teacher = make_signal(tokens, vocab, teacher_width, padding=teacher_padding, form=teacher_form, **common)
    return {
        "student_hidden_TD": student.hidden_TE,
        "student_head": student.head,
        "teacher_hidden_TE": teacher.hidden_TE,
        "teacher_head": teacher.head,
        "sampled_ids_T": torch.randint(vocab, (tokens,), generator=generator),
        "token_weights_T": torch.rand(tokens, generator=generator, dtype=torch.float64),
    }


def logits_case(student_TV: Tensor, teacher_TV: Tensor, **more: Any) -> Case:
    """Through an identity head, so that the student's "hidden states" are its logits."""
    tokens, vocab = student_TV.shape
    return {
        "student_hidden_TD": student_TV,
        "student_head": LinearHead(torch.eye(vocab, dtype=student_TV.dtype, device=student_TV.device)),
        "teachers": Signal(logits_TV=teacher_TV),
        "sampled_ids_T": torch.zeros(tokens, dtype=torch.int64, device=student_TV.device),
        **more,
    }


def extreme_case(soft_cap: float | None = None) -> Case:
    """Logits of ±1e4, V = 50: probabilities underflow to 0 on all sides, their logarithms must not."""
    student, teacher, reference = (torch.full((5, 50), -1e4, dtype=torch.float64) for _ in range(3))
    student[0, 3] = teacher[0, 7] = 1e4  # sure of different tokens: KL = 2e4
    student[1, 3] = teacher[1, 3] = 1e4  # of the same: 0
    student[2] = 0.0  # undecided against sure
    teacher[2, 7] = 1e4
    student[3, 3] = 1e4  # sure against undecided
    teacher[3] = 0.0
    student[4, :25] = teacher[4, 25:] = 1e4  # disjoint halves
    reference[:, 11] = 1e4
    # Which of equal logits are among the largest is left open; these steps are a float32's at 1e4.
    for logits in (student, teacher, reference):
        logits -= 2.0**-6 * torch.arange(50)
    case = logits_case(student, teacher, reference=Signal(logits_TV=reference))
    head = replace(case["student_head"], soft_cap=soft_cap)
    return {**case, "student_head": head, "sampled_ids_T": torch.full((5,), 11)}


def underflow_case() -> Case:
    """Teacher and reference give 0, in float32, to the sampled token and to others, one of them dear to the student."""
    case = make_case(6, 97)
    student, teacher, reference = (
        torch.randn(6, 97, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(3)
    )
    sampled = case["sampled_ids_T"]
    for row, logit in enumerate((-200.0, -200.0, -1000.0, -1000.0, -200.0, -200.0)):
        teacher[row, sampled[row]] = logit
        teacher[row, 40:60] = logit
        reference[row, 50:70] = logit
    student[2:, 45] = 8.0
    student[4:, sampled[4:]] = -300.0  # lost on both sides
    given = {"teachers": Signal(logits_TV=teacher), "reference": Signal(logits_TV=reference)}
    return logits_case(student, teacher) | given | {"sampled_ids_T": sampled}


# --- signals -----------------------------------------------------------------------------------------------------
def teacher_of(case: Case) -> Signal:
    """The one teacher, however it was given."""
    given = case.get("teachers")
    if given is None:
        return Signal(hidden_TE=case["teacher_hidden_TE"], head=case["teacher_head"])
    assert isinstance(given, Signal)
    return given


def without_teacher(case: Case) -> Case:
    return {name: value for name, value in case.items() if not name.startswith("teacher")}


def logits_of(signal: Signal) -> Tensor:
    """[T, V], in the dtype of the signal."""
    if signal.logits_TV is not None:
        return signal.logits_TV
    assert signal.head is not None
    assert signal.hidden_TE is not None
    return signal.head.logits(signal.hidden_TE)


def logprobs_of(signal: Signal) -> Tensor:
    """[T, V] in float64, at temperature 1."""
    return torch.log_softmax(logits_of(signal).double(), -1)


def given_logits(case: Case) -> Case:
    """The teacher's logits in place of its hidden states."""
    return {**without_teacher(case), "teachers": Signal(logits_TV=logits_of(teacher_of(case)))}


def top_k_signal(signal: Signal, k: int) -> Signal:
    """The k most probable ids, unsorted, with their log-probabilities in float64."""
    logprobs_TK, ids_TK = logprobs_of(signal).topk(k, dim=-1)
    return Signal(top_k_ids_TK=ids_TK.flip(1), top_k_logprobs_TK=logprobs_TK.flip(1))


def given_top_k(case: Case, k: int = 20) -> Case:
    return {**without_teacher(case), "teachers": top_k_signal(teacher_of(case), k)}


def token_logprob_signal(signal: Signal, sampled_ids_T: Tensor) -> Signal:
    return Signal(token_logprobs_T=logprobs_of(signal).gather(1, sampled_ids_T[:, None])[:, 0])


def given_token_logprobs(case: Case) -> Case:
    return {**without_teacher(case), "teachers": token_logprob_signal(teacher_of(case), case["sampled_ids_T"])}


def several_teachers(case: Case, objective: Objective | None = None) -> Case:
    """The case's teacher, one of another width, one's logits, and what narrower signal the objective can take."""
    tokens, vocab = case["student_hidden_TD"].shape[0], case["student_head"].vocab_size
    second = make_signal(tokens, vocab, 23, seed=101, padding=3, form={"logit_scale": 0.8})
    third = make_signal(tokens, vocab, 31, seed=102, bias=True)
    teachers = [teacher_of(case), second, Signal(logits_TV=logits_of(third))]
    if isinstance(objective, TopK):
        teachers.append(top_k_signal(make_signal(tokens, vocab, 19, seed=103), min(20, vocab)))
    if isinstance(objective, SampledToken):
        teachers.append(token_logprob_signal(make_signal(tokens, vocab, 19, seed=103), case["sampled_ids_T"]))
    generator = torch.Generator().manual_seed(104)
    weights_NT = torch.rand(len(teachers), tokens, generator=generator, dtype=torch.float64)
    return {**without_teacher(case), "teachers": teachers, "token_weights_T": weights_NT}


def make_reference(case: Case, width: int = 41, **options: Any) -> Signal:
    """ExOPD's reference model for a case, of another width than student and teacher."""
    tokens, vocab = case["student_hidden_TD"].shape[0], case["student_head"].vocab_size
    signal = make_signal(tokens, vocab, width, seed=105, **options)
    return cast(signal, case["student_hidden_TD"].dtype)


def fitted(case: Case, objective: Objective | None) -> Case:
    """With a reference where the objective needs one (the case's own if it has one), without where it does not."""
    if isinstance(objective, ExOPD):
        return {"reference": make_reference(case), **case}
    return {name: value for name, value in case.items() if name != "reference"}


# How a teacher's whole distribution can be given.
FULL_SIGNALS: dict[str, Callable[[Case, Objective], Case]] = {
    "hidden": lambda case, objective: case,
    "logits": lambda case, objective: given_logits(case),
    "several": several_teachers,
}


def rows_of(case: Case, index: Tensor) -> Case:
    """The case of these tokens, in this order."""

    def pick(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            return value[..., index] if name == "token_weights_T" else value[index]
        if isinstance(value, Signal):
            parts = {field.name: getattr(value, field.name) for field in fields(value)}
            return Signal(**{name: part if name == "head" else pick(part, name) for name, part in parts.items()})
        if isinstance(value, list):
            return [pick(item, name) for item in value]
        return value

    return {name: pick(value, name) for name, value in case.items()}


# --- running -----------------------------------------------------------------------------------------------------
def cast(value: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Cases, signals, heads, tensors: floating ones in the dtype, but log-probabilities at least in float32."""

    def to(value: Any, name: str = "") -> Any:
        if isinstance(value, Tensor):
            wanted = torch.promote_types(dtype, torch.float32) if "logprob" in name else dtype
            return value.to(device, wanted) if value.is_floating_point() else value.to(device)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{field.name: to(getattr(value, field.name), field.name) for field in fields(value)})
        if isinstance(value, dict):
            return {name: to(item, name) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(to(item) for item in value)
        return value

    return to(value)


def with_leaves(case: Case, frozen: tuple[str, ...] = ()) -> tuple[Case, dict[str, Tensor]]:
    """The case with fresh leaves for what may have a gradient, and those leaves by name."""
    head = case["student_head"]
    leaves = {"hidden": case["student_hidden_TD"].detach().clone(), "weight": head.weight.detach().clone()}
    if head.bias is not None:
        leaves["bias"] = head.bias.detach().clone()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    head = replace(head, weight=leaves["weight"], bias=leaves.get("bias"))
    return {**case, "student_hidden_TD": leaves["hidden"], "student_head": head}, leaves


def run(case: Case, *, factor: float = 1.0, **options: Any) -> tuple[Divergence, dict[str, Tensor]]:
    """Result, and gradients of ``factor · loss`` by leaf."""
    case, leaves = with_leaves(case)
    result = linear_divergence(**{**case, **options})
    (result.loss * factor).backward()
    return result, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Error against the largest entry: gradients hold tiny entries beside large ones. NaN just where it is expected."""
    assert actual.shape == expected.shape, name
    known = ~expected.isnan()
    assert torch.equal(actual.isnan(), ~known), f"{name}: NaN"
    assert torch.isfinite(actual[known]).all(), name
    if known.any():
        actual, expected = actual.detach()[known].double(), expected.detach()[known].double()
        bound = tolerance * max(float(expected.abs().max()), 1e-3)
        error = float((actual - expected).abs().max())
        assert error <= bound, f"{name}: error {error:.3g} above {bound:.3g}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_matches_reference(
    case: Case,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-5,
    *,
    implementation: str = "torch",
    device: torch.device | str = "cpu",
    objective: Objective | None = None,
    **options: Any,
) -> None:
    """``dtype`` arguments through the implementation, against the same values in float64 through "reference"."""
    narrow = cast(fitted(case, objective), dtype)
    with poisoned_memory():
        actual, actual_grads = run(
            cast(narrow, dtype, device), factor=0.5, implementation=implementation, objective=objective, **options
        )
    for name in ("chunk_tokens", "deterministic"):
        options.pop(name, None)
    wide = cast(narrow, torch.float64)
    expected, expected_grads = run(wide, factor=0.5, implementation="reference", objective=objective, **options)
    statistics = torch.promote_types(dtype, torch.float32)
    for name in ("loss", *DIAGNOSTICS):
        value = getattr(actual, name)
        assert value.dtype == statistics, name
        assert_near(value.cpu(), getattr(expected, name), tolerance, name)
    assert actual_grads.keys() == expected_grads.keys() >= {"hidden", "weight"}
    for name, grad in actual_grads.items():
        assert grad.dtype == dtype
        # A gradient is handed back in the dtype of its tensor: half precision rounds it once.
        assert_near(grad.cpu(), expected_grads[name], max(tolerance, torch.finfo(dtype).eps), name)


def assert_rows_match_reference(
    case: Case, objective: Objective, *, implementation: str, device: torch.device | str = "cpu"
) -> None:
    """In float32, row by row, against what is large in the row: other rows' thousands must not hide an error."""
    narrow = cast(fitted(case, objective), torch.float32)
    expected, expected_grads = run(cast(narrow, torch.float64), objective=objective, implementation="reference")
    actual, actual_grads = run(cast(narrow, torch.float32, device), objective=objective, implementation=implementation)
    assert all(torch.isfinite(grad).all() for grad in actual_grads.values())
    for field in ("loss", *DIAGNOSTICS):
        assert_near(getattr(actual, field).cpu(), getattr(expected, field), 1e-6, field)
    values = zip(actual.divergence_T.cpu(), expected.divergence_T, strict=True)
    gradients = zip(actual_grads["hidden"].cpu(), expected_grads["hidden"], strict=True)
    for row, ((value, wanted), (grad_V, wanted_V)) in enumerate(zip(values, gradients, strict=True)):
        scale = max(1.0, float(wanted.abs()), float(wanted_V.abs().max()))
        assert float((value.double() - wanted).abs()) <= 1e-6 * scale, row
        assert float((grad_V.double() - wanted_V).abs().max()) <= 1e-5 * scale, row
