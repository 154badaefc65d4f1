"""The truth, for tests: whole [T, V] tensors in float64, the formula as written, gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from opd_kernels.divergence import Divergence, DivergenceInputs
from opd_kernels.head import LinearHead


def reverse_kl(inputs: DivergenceInputs) -> Divergence:
    """Σ_t weight_t Σ_v p_v (log p_v − log q_v), computed in float64, returned in ``inputs.result_dtype``."""
    student_logits_TV = _float64(inputs.student_head).logits(inputs.student_hidden_TD.double())
    with torch.no_grad():
        if inputs.teacher_logits_TV is not None:
            teacher_logits_TV = inputs.teacher_logits_TV.double()
        else:
            assert inputs.teacher_head is not None
            assert inputs.teacher_hidden_TE is not None
            teacher_logits_TV = _float64(inputs.teacher_head).logits(inputs.teacher_hidden_TE.double())

    log_p_TV = torch.log_softmax(student_logits_TV / inputs.temperature, dim=-1)
    log_q_TV = torch.log_softmax(teacher_logits_TV / inputs.temperature, dim=-1)
    p_TV, q_TV = log_p_TV.exp(), log_q_TV.exp()
    kl_T = (p_TV * (log_p_TV - log_q_TV)).sum(-1)
    loss = (inputs.token_weights_T.double() * kl_T).sum()

    ids_T1 = inputs.sampled_ids_T.long()[:, None]
    in_both_TV = _in_top_k(log_p_TV, inputs.overlap_k) & _in_top_k(log_q_TV, inputs.overlap_k)

    def result(x: Tensor) -> Tensor:
        return x.detach().to(inputs.result_dtype)

    return Divergence(
        loss=loss.to(inputs.result_dtype),
        kl_T=result(kl_T),
        student_entropy_T=result(-(p_TV * log_p_TV).sum(-1)),
        teacher_entropy_T=result(-(q_TV * log_q_TV).sum(-1)),
        student_logprob_T=result(log_p_TV.gather(1, ids_T1)[:, 0]),
        teacher_logprob_T=result(log_q_TV.gather(1, ids_T1)[:, 0]),
        overlap_ratio_T=result(in_both_TV.sum(-1) / inputs.overlap_k),
        overlap_mass_T=result((p_TV * in_both_TV).sum(-1)),
    )


def _float64(head: LinearHead) -> LinearHead:
    return replace(head, weight=head.weight.double(), bias=None if head.bias is None else head.bias.double())


def _in_top_k(x_TV: Tensor, k: int) -> Tensor:
    """[T, V] bool: is the entry among its row's k largest."""
    member_TV = torch.zeros_like(x_TV, dtype=torch.bool)
    return member_TV.scatter(1, x_TV.detach().topk(k, dim=-1).indices, True)


OBJECTIVES: dict[str, Callable[[DivergenceInputs], Divergence]] = {"reverse_kl": reverse_kl}
