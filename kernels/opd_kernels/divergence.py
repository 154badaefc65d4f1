"""The one entry to all divergences: what goes in, what comes out, and who computes it.

Letters in names: T response tokens, V ids of the vocabulary (padding left out), D the student's hidden width, E the
teacher's, C rows of a chunk.

The maths, for one token with student distribution p = softmax(z/τ) and teacher distribution q = softmax(y/τ):

    reverse KL      KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)         (DeepSeek-V4 report, arXiv 2606.19348, Eq. 29)
    its gradient    ∂KL/∂(z_v/τ) = p_v (log p_v − log q_v − KL)     (derived; the report prints none)

Derivation: ∂p_u/∂z_v = p_u (1[u=v] − p_v), hence ∂KL/∂z_v = Σ_u ∂p_u/∂z_v (log p_u − log q_u + 1), in which the
"+ 1" cancels because Σ_u ∂p_u/∂z_v = 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.head import LinearHead

OVERLAP_K = 16  # "Rethinking OPD", arXiv 2604.13016

# name → module. A module offers OBJECTIVES: objective → function(DivergenceInputs) -> Divergence. Imported when
# asked for, so that an implementation may need a package (Triton) that this machine lacks.
IMPLEMENTATIONS: dict[str, str] = {
    "chunked": "opd_kernels.chunked",
    "reference": "opd_kernels.reference",
}


@dataclass(frozen=True, slots=True)
class Divergence:
    """Loss and diagnostics. All are float32, or float64 where the student's hidden states or head are.

    Attributes:
        loss: scalar, Σ_t weight_t · divergence_t; differentiable in the student's hidden states, head weight and bias.
        kl_T: KL(p ‖ q), not weighted. This and all that follow are detached.
        student_entropy_T: H(p) in nats.
        teacher_entropy_T: H(q) in nats.
        student_logprob_T: log p of the sampled id.
        teacher_logprob_T: log q of the sampled id.
        overlap_ratio_T: |top-k(p) ∩ top-k(q)| / k with k = min(16, V). Among equal logits, which enter the
            top k is left open.
        overlap_mass_T: the student's probability on that intersection, Σ p_v over v ∈ top-k(p) ∩ top-k(q).
    """

    loss: Tensor
    kl_T: Tensor
    student_entropy_T: Tensor
    teacher_entropy_T: Tensor
    student_logprob_T: Tensor
    teacher_logprob_T: Tensor
    overlap_ratio_T: Tensor
    overlap_mass_T: Tensor


@dataclass(frozen=True, slots=True)
class DivergenceInputs:
    """What an implementation gets: checked by :func:`linear_divergence`, and nothing left to default but the chunk.

    Exactly one of ``teacher_logits_TV`` and the pair (``teacher_hidden_TE``, ``teacher_head``) is set.
    """

    student_hidden_TD: Tensor
    student_head: LinearHead
    teacher_hidden_TE: Tensor | None
    teacher_head: LinearHead | None
    teacher_logits_TV: Tensor | None
    sampled_ids_T: Tensor
    token_weights_T: Tensor
    temperature: float
    chunk_tokens: int | None

    @property
    def vocab_size(self) -> int:
        """V: ids that both sides have, without padding."""
        return self.student_head.vocab_size

    @property
    def overlap_k(self) -> int:
        return min(OVERLAP_K, self.vocab_size)

    @property
    def result_dtype(self) -> torch.dtype:
        """Of statistics, accumulators and results."""
        wide = torch.promote_types(self.student_hidden_TD.dtype, self.student_head.weight.dtype)
        return torch.float64 if wide == torch.float64 else torch.float32


def linear_divergence(
    student_hidden_TD: Tensor,
    student_head: LinearHead,
    teacher_hidden_TE: Tensor | None = None,
    teacher_head: LinearHead | None = None,
    *,
    teacher_logits_TV: Tensor | None = None,
    sampled_ids_T: Tensor,
    token_weights_T: Tensor | None = None,
    objective: str = "reverse_kl",
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    implementation: str = "auto",
) -> Divergence:
    """The divergence of student from teacher over the whole vocabulary, summed over tokens with weights.

    Args:
        student_hidden_TD: [T, D] floating; row t predicts response token t.
        student_head: weight [≥V, D].
        teacher_hidden_TE: [T, E] floating; E may differ from D. No gradient flows to the teacher.
        teacher_head: weight [≥V, E]; the same ``vocab_size`` as the student's, padding may differ.
        teacher_logits_TV: [T, V] final logits (scale and soft-cap applied), finite; instead of hidden states and head.
        sampled_ids_T: [T] integer, the response tokens, each below V.
        token_weights_T: [T], detached; None means 1 for every token. Divide by the real tokens of the whole batch
            here, so that no mean of means arises.
        objective: "reverse_kl".
        temperature: divides the logits of both sides, after scale and soft-cap.
        chunk_tokens: rows projected at a time; None lets the implementation choose from V alone.
        implementation: "auto", or a key of ``IMPLEMENTATIONS``.

    Raises:
        ValueError: the arguments do not fit each other; the message names the one to mend.
    """
    inputs = DivergenceInputs(
        student_hidden_TD=student_hidden_TD,
        student_head=student_head,
        teacher_hidden_TE=teacher_hidden_TE,
        teacher_head=teacher_head,
        teacher_logits_TV=teacher_logits_TV,
        sampled_ids_T=sampled_ids_T,
        token_weights_T=(
            torch.ones(student_hidden_TD.shape[:1], device=student_hidden_TD.device)
            if token_weights_T is None
            else token_weights_T.detach()
        ),
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    compute = _implementation(implementation, objective)
    _check(inputs)
    return compute(inputs)


def _implementation(name: str, objective: str) -> Callable[[DivergenceInputs], Divergence]:
    if name == "auto":
        name = "chunked"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: {name!r} is unknown; choose one of {['auto', *IMPLEMENTATIONS]}")
    objectives = importlib.import_module(IMPLEMENTATIONS[name]).OBJECTIVES
    if objective not in objectives:
        raise ValueError(f"objective: {objective!r} is not offered by {name!r}; choose one of {sorted(objectives)}")
    return objectives[objective]


def _check(inputs: DivergenceInputs) -> None:
    hidden, head = inputs.student_hidden_TD, inputs.student_head
    _check_head("student", hidden, head)
    tokens, vocab_size = hidden.shape[0], inputs.vocab_size

    if inputs.teacher_logits_TV is not None:
        if inputs.teacher_hidden_TE is not None or inputs.teacher_head is not None:
            raise ValueError("teacher_logits_TV: give either logits or hidden states and a head, not both")
        if inputs.teacher_logits_TV.shape != (tokens, vocab_size):
            raise ValueError(
                f"teacher_logits_TV: shape {tuple(inputs.teacher_logits_TV.shape)}, expected {(tokens, vocab_size)}; "
                "slice padding off first"
            )
        if not inputs.teacher_logits_TV.is_floating_point():
            raise ValueError(f"teacher_logits_TV: {inputs.teacher_logits_TV.dtype} is not a floating dtype")
    elif inputs.teacher_hidden_TE is not None and inputs.teacher_head is not None:
        _check_head("teacher", inputs.teacher_hidden_TE, inputs.teacher_head)
        if inputs.teacher_hidden_TE.shape[0] != tokens:
            raise ValueError(f"teacher_hidden: {inputs.teacher_hidden_TE.shape[0]} rows, the student has {tokens}")
        if inputs.teacher_head.vocab_size != vocab_size:
            raise ValueError(
                f"teacher_head: {inputs.teacher_head.vocab_size} valid ids, the student's head has {vocab_size}; "
                "both must speak the same tokenizer (set valid_vocab_size where rows are padding)"
            )
    else:
        raise ValueError("teacher: give teacher_hidden_TE and teacher_head, or teacher_logits_TV")

    ids = inputs.sampled_ids_T
    if ids.shape != (tokens,) or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"sampled_ids_T: {ids.dtype} {tuple(ids.shape)}, expected int64 or int32 ({tokens},)")
    # On a GPU this would wait for the device; there, gather's own assertion stops a bad id.
    if ids.device.type == "cpu" and tokens and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        raise ValueError(
            f"sampled_ids_T: ids span {int(ids.min())}…{int(ids.max())}, the vocabulary is 0…{vocab_size - 1}"
        )
    if inputs.token_weights_T.shape != (tokens,):
        raise ValueError(f"token_weights_T: shape {tuple(inputs.token_weights_T.shape)}, expected ({tokens},)")
    if not inputs.temperature > 0:
        raise ValueError(f"temperature: {inputs.temperature} is not above 0")
    if inputs.chunk_tokens is not None and inputs.chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: {inputs.chunk_tokens} is below 1")


def _check_head(side: str, hidden: Tensor, head: LinearHead) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"{side}_hidden: {hidden.dtype} {tuple(hidden.shape)}, expected floating [tokens, width]")
    if head.weight.dim() != 2 or head.weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"{side}_head: weight {tuple(head.weight.shape)} does not fit hidden {tuple(hidden.shape)}")
    if not 1 <= head.vocab_size <= head.weight.shape[0]:
        raise ValueError(f"{side}_head: {head.vocab_size} valid ids, but the weight has {head.weight.shape[0]} rows")
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ValueError(f"{side}_head: bias {tuple(head.bias.shape)}, expected {(head.weight.shape[0],)}")
    if head.soft_cap is not None and not head.soft_cap > 0:
        raise ValueError(f"{side}_head: soft_cap {head.soft_cap} is not above 0")
