"""The truth, for tests: whole [T, V] tensors in float64, the formulas as written, gradients by autograd."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from opd_kernels.head import LinearHead
from opd_kernels.inputs import LOGPROB_FLOOR, TAIL_FLOOR, TEACHER_STATS, Divergence, DivergenceInputs, TokenLogprobs
from opd_kernels.objectives import JSD, ExOPD, ForwardKL, ReverseKL, SampledToken, TopK
from opd_kernels.signals import Signal


def compute(inputs: DivergenceInputs) -> Divergence:
    """Every objective, computed in float64, returned in ``inputs.result_dtype``."""
    tau = inputs.temperature
    log_p_TV = _student_log_probs(inputs)
    log_r_TV = None if inputs.reference is None else _log_probs(inputs.reference, tau)
    p_TV, ids_T1 = log_p_TV.exp(), inputs.sampled_ids_T.long()[:, None]

    loss, teachers = torch.zeros((), dtype=torch.float64, device=p_TV.device), []
    for signal, weights_T in zip(inputs.teachers, inputs.token_weights_NT, strict=True):
        log_q_TV = _log_probs(signal, tau) if signal.is_full else None
        value_T, gradient_T = _objective(inputs, signal, log_p_TV, log_q_TV, log_r_TV)
        # Values of the one, gradients of the other.
        loss = loss + (weights_T.double() * (gradient_T + (value_T - gradient_T).detach())).sum()
        stats = {name: torch.full_like(value_T, math.nan) for name in TEACHER_STATS} | {"divergence_T": value_T}
        if signal.token_logprobs_T is not None:
            stats["teacher_logprob_T"] = _floored(signal.token_logprobs_T)
        if log_q_TV is not None:
            in_both_TV = _in_top_k(log_p_TV, inputs.overlap_k) & _in_top_k(log_q_TV, inputs.overlap_k)
            stats |= {
                "kl_T": (p_TV * (log_p_TV - log_q_TV)).sum(-1),
                "teacher_entropy_T": -(log_q_TV.exp() * log_q_TV).sum(-1),
                "teacher_logprob_T": log_q_TV.gather(1, ids_T1)[:, 0],
                "overlap_ratio_T": in_both_TV.sum(-1) / inputs.overlap_k,
                "overlap_mass_T": (p_TV * in_both_TV).sum(-1),
            }
        teachers.append(torch.stack([stats[name] for name in TEACHER_STATS]))
    student_2T = torch.stack([-(p_TV * log_p_TV).sum(-1), log_p_TV.gather(1, ids_T1)[:, 0]])
    dtype = inputs.result_dtype
    return inputs.result(loss.to(dtype), student_2T.detach().to(dtype), torch.stack(teachers, dim=1).detach().to(dtype))


def token_logprobs(inputs: DivergenceInputs) -> TokenLogprobs:
    """Computed in float64, returned in ``inputs.result_dtype``."""
    log_p_TV, dtype = _student_log_probs(inputs), inputs.result_dtype
    logprobs_T = log_p_TV.gather(1, inputs.sampled_ids_T.long()[:, None])[:, 0]
    entropy_T = -(log_p_TV.exp() * log_p_TV).sum(-1)
    return TokenLogprobs(logprobs_T=logprobs_T.to(dtype), entropy_T=entropy_T.detach().to(dtype))


def _objective(
    inputs: DivergenceInputs, signal: Signal, log_p_TV: Tensor, log_q_TV: Tensor | None, log_r_TV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """→ the value of each token [T], and what to differentiate [T]: the same but for the sampled-token estimate."""
    objective, p_TV = inputs.objective, log_p_TV.exp()
    if isinstance(objective, SampledToken):
        log_p_y_T = log_p_TV.gather(1, inputs.sampled_ids_T.long()[:, None])[:, 0]
        if log_q_TV is not None:
            log_q_y_T = log_q_TV.gather(1, inputs.sampled_ids_T.long()[:, None])[:, 0]
        else:
            assert signal.token_logprobs_T is not None
            log_q_y_T = _floored(signal.token_logprobs_T)
        value_T = log_p_y_T - log_q_y_T
        return value_T, value_T.detach() * log_p_y_T
    if isinstance(objective, TopK):
        value_T = _top_k_kl(objective, signal, log_p_TV, log_q_TV)
        return value_T, value_T
    assert log_q_TV is not None
    q_TV = log_q_TV.exp()
    match objective:
        case ReverseKL():
            value_T = (p_TV * (log_p_TV - log_q_TV)).sum(-1)
        case ForwardKL():
            value_T = (q_TV * (log_q_TV - log_p_TV)).sum(-1)
        case JSD(beta):
            log_m_TV = torch.logaddexp(log_q_TV + math.log(beta), log_p_TV + math.log1p(-beta))
            value_T = (beta * q_TV * (log_q_TV - log_m_TV) + (1 - beta) * p_TV * (log_p_TV - log_m_TV)).sum(-1)
        case ExOPD(lam):
            assert log_r_TV is not None
            log_target_TV = torch.log_softmax(lam * log_q_TV + (1 - lam) * log_r_TV, dim=-1)
            value_T = (p_TV * (log_p_TV - log_target_TV)).sum(-1)
    return value_T, value_T


def _top_k_kl(objective: TopK, signal: Signal, log_p_TV: Tensor, log_q_TV: Tensor | None) -> Tensor:
    if log_q_TV is not None:
        ids_TK = log_q_TV.topk(min(objective.k, log_q_TV.shape[1]), dim=-1).indices
        log_q_TK = log_q_TV.gather(1, ids_TK)
        log_q_tail_T = _outside(log_q_TV, ids_TK)
    else:
        assert signal.top_k_ids_TK is not None
        assert signal.top_k_logprobs_TK is not None
        ids_TK = signal.top_k_ids_TK.long()
        log_q_TK = _floored(signal.top_k_logprobs_TK)
        log_q_tail_T = (1 - log_q_TK.exp().sum(-1)).clamp(min=TAIL_FLOOR).log()
    log_p_TK, log_p_tail_T = log_p_TV.gather(1, ids_TK), _outside(log_p_TV, ids_TK)
    inside_T = (log_p_TK.exp() * (log_p_TK - log_q_TK)).sum(-1)
    return inside_T + log_p_tail_T.exp() * (log_p_tail_T - log_q_tail_T)


def _outside(log_p_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """[T]: log of the mass outside the set, not below the floor."""
    tail_T = log_p_TV.exp().scatter(1, ids_TK, 0.0).sum(-1)
    return tail_T.clamp(min=math.exp(LOGPROB_FLOOR)).log()


def _student_log_probs(inputs: DivergenceInputs) -> Tensor:
    logits_TV = _float64(inputs.student_head).logits(inputs.student_hidden_TD.double())
    return torch.log_softmax(logits_TV / inputs.temperature, dim=-1)


def _log_probs(signal: Signal, temperature: float) -> Tensor:
    with torch.no_grad():
        if signal.logits_TV is not None:
            logits_TV = signal.logits_TV.double()
        else:
            assert signal.head is not None
            assert signal.hidden_TE is not None
            logits_TV = _float64(signal.head).logits(signal.hidden_TE.double())
        return torch.log_softmax(logits_TV / temperature, dim=-1)


def _floored(logprobs: Tensor) -> Tensor:
    """Log-probabilities that were given."""
    return logprobs.detach().double().clamp(min=LOGPROB_FLOOR)


def _float64(head: LinearHead) -> LinearHead:
    return replace(head, weight=head.weight.double(), bias=None if head.bias is None else head.bias.double())


def _in_top_k(x_TV: Tensor, k: int) -> Tensor:
    """[T, V] bool: is the entry among its row's k largest."""
    member_TV = torch.zeros_like(x_TV, dtype=torch.bool)
    return member_TV.scatter(1, x_TV.detach().topk(k, dim=-1).indices, True)
