"""Row mathematics on torch operations: statistics, values and gradients of a block of rows, in place.

With s, t the logits of a row over τ, less their maxima, S = Σ exp(s), Q = Σ exp(t):

    log p = s − log S        KL(p ‖ q) = m − log S + log Q        m = Σ exp(s)(s − t) / S
    ∂KL/∂s_v = exp(s_v)/S · ((s_v − t_v) − m)                     = p_v (log p_v − log q_v − KL), the two logs gone

Nothing here takes the logarithm of a probability, so one that underflows to 0 costs nothing. Gradients are left short
of 1/S, which is a factor of the row. The formulas of the other objectives are in :mod:`opd_kernels.objectives`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.inputs import LOGPROB_FLOOR, TAIL_FLOOR
from opd_kernels.objectives import JSD, ExOPD, ForwardKL, LogLikelihood, Objective, ReverseKL, SampledToken, TopK

TOP_K_GROUP = 64


@dataclass(frozen=True, slots=True)
class Side:
    """One distribution over the rows of a block.

    Attributes:
        shifted_BV, max_B1: logits over τ, less the row's maximum; that maximum.
        sum_B, log_sum_B: of exp(shifted).
        mean_B: Σ_v prob_v · shifted_v; the entropy is log_sum − mean.
        top_ids_Bk, top_exp_Bk: the k largest, and exp(shifted) there.
    """

    shifted_BV: Tensor
    max_B1: Tensor
    sum_B: Tensor
    log_sum_B: Tensor
    mean_B: Tensor
    top_ids_Bk: Tensor
    top_exp_Bk: Tensor

    @classmethod
    def of(cls, logits_BV: Tensor, k: int, shifted_BV: Tensor, exp_BV: Tensor, work_BV: Tensor) -> Side:
        """``shifted_BV`` and ``exp_BV`` are written, ``work_BV`` is overwritten; it may be ``exp_BV``, if that is not
        wanted, and ``shifted_BV`` may be ``logits_BV``."""
        top_Bk, top_ids_Bk = top_k(logits_BV, k)
        max_B1 = top_Bk[:, :1]
        torch.sub(logits_BV, max_B1, out=shifted_BV)
        sum_B = torch.exp(shifted_BV, out=exp_BV).sum(1)
        return cls(
            shifted_BV=shifted_BV,
            max_B1=max_B1,
            sum_B=sum_B,
            log_sum_B=sum_B.log(),
            mean_B=torch.mul(exp_BV, shifted_BV, out=work_BV).sum(1) / sum_B,
            top_ids_Bk=top_ids_Bk,
            top_exp_Bk=(top_Bk - max_B1).exp(),
        )

    def logprob(self, ids_BK: Tensor) -> Tensor:
        """[B, K] ids to their log-probabilities."""
        return self.shifted_BV.gather(1, ids_BK) - self.log_sum_B[:, None]


@dataclass(frozen=True, slots=True)
class Block:
    """What an objective sees of a few rows.

    Attributes:
        exp_BV: exp of the student's shifted logits.
        teacher, top_k_ids_BK, top_k_logprobs_BK, token_logprobs_B: what the teacher's signal tells.
        reference_BV: logits over τ of ExOPD's reference; kept.
        work_BV: scratch.
        grad_BV: written with the gradient to the student's logits over τ, short of 1/S; None where none is wanted.
            May be the memory of ``teacher.shifted_BV``.
    """

    student: Side
    exp_BV: Tensor
    teacher: Side | None
    reference_BV: Tensor | None
    top_k_ids_BK: Tensor | None
    top_k_logprobs_BK: Tensor | None
    token_logprobs_B: Tensor | None
    sampled_ids_B1: Tensor
    work_BV: Tensor
    grad_BV: Tensor | None

    @property
    def full_teacher(self) -> Side:
        assert self.teacher is not None  # checks.py: the objective needs the whole distribution
        return self.teacher


def kl(block: Block) -> Tensor:
    """[B]: KL(p ‖ q), for objectives that do not compute it on their way."""
    student, teacher = block.student, block.full_teacher
    cross_B = torch.mul(block.exp_BV, teacher.shifted_BV, out=block.work_BV).sum(1) / student.sum_B
    return student.mean_B - student.log_sum_B - cross_B + teacher.log_sum_B


def value_and_gradient(objective: Objective | LogLikelihood, block: Block) -> Tensor:
    """[B]: the objective of each row. ``block.grad_BV`` is written; the teacher's logits may be overwritten."""
    match objective:
        case ReverseKL():
            teacher = block.full_teacher
            return _kl_towards(block, teacher.shifted_BV, teacher.log_sum_B)
        case ForwardKL():
            return _forward_kl(block)
        case JSD(beta):
            return _jsd(beta, block)
        case ExOPD(lam):
            return _exopd(lam, block)
        case TopK(k):
            return _top_k_kl(k, block)
        case SampledToken():
            return _sampled_token(block)
        case LogLikelihood():
            _towards_sampled(block, torch.ones_like(block.student.max_B1))
            return block.student.logprob(block.sampled_ids_B1)[:, 0]


def _kl_towards(block: Block, target_BV: Tensor, log_sum_B: Tensor) -> Tensor:
    """KL(p ‖ softmax(target)); ``target_BV`` is overwritten."""
    student = block.student
    difference_BV = torch.sub(student.shifted_BV, target_BV, out=target_BV)
    mean_B = torch.mul(block.exp_BV, difference_BV, out=block.work_BV).sum(1) / student.sum_B
    if block.grad_BV is not None:
        torch.mul(difference_BV.sub_(mean_B[:, None]), block.exp_BV, out=block.grad_BV)
    return mean_B - student.log_sum_B + log_sum_B


def _exopd(lam: float, block: Block) -> Tensor:
    assert block.reference_BV is not None
    # Of normalized or shifted logits alike: what differs is a constant of the row.
    target_BV = block.full_teacher.shifted_BV.mul_(lam)
    target_BV.add_(block.reference_BV - block.reference_BV.amax(1, keepdim=True), alpha=1.0 - lam)
    target_BV.sub_(target_BV.amax(1, keepdim=True))
    log_sum_B = torch.exp(target_BV, out=block.work_BV).sum(1).log_()
    return _kl_towards(block, target_BV, log_sum_B)


def _forward_kl(block: Block) -> Tensor:
    student, teacher = block.student, block.full_teacher
    teacher_exp_BV = torch.exp(teacher.shifted_BV, out=block.work_BV)
    cross_B = (teacher_exp_BV * student.shifted_BV).sum(1) / teacher.sum_B
    if block.grad_BV is not None:  # p − q, short of 1/S
        ratio_B1 = (student.sum_B / teacher.sum_B)[:, None]
        torch.addcmul(block.exp_BV, teacher_exp_BV, ratio_B1, value=-1.0, out=block.grad_BV)
    return teacher.mean_B - teacher.log_sum_B - cross_B + student.log_sum_B


def _jsd(beta: float, block: Block) -> Tensor:
    """With δ = log p − log q: log p − log m = n + min(δ, 0) and log q − log m = n − max(δ, 0), where
    n = −log(1 + c (e^−|δ| − 1)) ≥ 0 and c = β where δ ≥ 0, 1 − β elsewhere. Nothing overflows or cancels."""
    student, teacher = block.student, block.full_teacher
    q_BV = torch.exp(teacher.shifted_BV, out=block.work_BV).div_(teacher.sum_B[:, None])
    difference_BV = torch.sub(student.shifted_BV, teacher.shifted_BV, out=teacher.shifted_BV)
    difference_BV.sub_((student.log_sum_B - teacher.log_sum_B)[:, None])
    share_BV = torch.full_like(difference_BV, 1.0 - beta).masked_fill_(difference_BV >= 0, beta)
    gain_BV = difference_BV.abs().neg_().expm1_().mul_(share_BV).log1p_().neg_()
    teacher_part_B = (q_BV * (gain_BV - difference_BV.clamp(min=0))).sum(1)
    log_p_m_BV = gain_BV.add_(difference_BV.clamp_(max=0))
    student_part_B = torch.mul(block.exp_BV, log_p_m_BV, out=block.work_BV).sum(1) / student.sum_B
    if block.grad_BV is not None:
        torch.mul(log_p_m_BV.sub_(student_part_B[:, None]), block.exp_BV, out=block.grad_BV).mul_(1.0 - beta)
    return beta * teacher_part_B + (1.0 - beta) * student_part_B


def _top_k_kl(k: int, block: Block) -> Tensor:
    student, exp_BV, teacher = block.student, block.exp_BV, block.teacher
    if teacher is not None:
        _, ids_BK = top_k(teacher.shifted_BV, min(k, exp_BV.shape[1]))
        log_q_BK = teacher.logprob(ids_BK)
        outside_B = torch.exp(teacher.shifted_BV, out=block.work_BV).scatter_(1, ids_BK, 0.0).sum(1)
        log_q_tail_B = (outside_B.log() - teacher.log_sum_B).clamp(min=LOGPROB_FLOOR)
    else:
        assert block.top_k_ids_BK is not None
        assert block.top_k_logprobs_BK is not None
        ids_BK = block.top_k_ids_BK
        log_q_BK, log_q_tail_B = given_top_k(block.top_k_logprobs_BK, exp_BV.dtype)
    exp_BK = exp_BV.gather(1, ids_BK)
    outside_B = exp_BV.scatter_(1, ids_BK, 0.0).sum(1)
    log_p_tail_B = (outside_B.log() - student.log_sum_B).clamp(min=LOGPROB_FLOOR)
    ratio_BK, tail_ratio_B = student.logprob(ids_BK) - log_q_BK, log_p_tail_B - log_q_tail_B
    value_B = ((exp_BK * ratio_BK).sum(1) + outside_B * tail_ratio_B) / student.sum_B
    if block.grad_BV is not None:
        torch.mul(exp_BV, (tail_ratio_B - value_B)[:, None], out=block.grad_BV)
        block.grad_BV.scatter_(1, ids_BK, exp_BK * (ratio_BK - value_B[:, None]))
    return value_B


def given_top_k(logprobs_BK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probabilities that a teacher gave, [B, K], floored, and that of all other ids together, [B]."""
    log_q_BK = logprobs_BK.to(dtype).clamp(min=LOGPROB_FLOOR)
    # They may leave little of 1: what they do must not drown in the rounding of their sum.
    return log_q_BK, (1.0 - log_q_BK.double().exp().sum(1)).clamp(min=TAIL_FLOOR).log().to(dtype)


def _sampled_token(block: Block) -> Tensor:
    student, ids_B1 = block.student, block.sampled_ids_B1
    if block.teacher is not None:
        log_q_B1 = block.teacher.logprob(ids_B1)
    else:
        assert block.token_logprobs_B is not None
        log_q_B1 = block.token_logprobs_B.to(block.exp_BV.dtype).clamp(min=LOGPROB_FLOOR)[:, None]
    value_B1 = student.logprob(ids_B1) - log_q_B1
    _towards_sampled(block, value_B1)
    return value_B1[:, 0]


def _towards_sampled(block: Block, advantage_B1: Tensor) -> None:
    """Writes the gradient A (1[v = y] − p_v), short of 1/S, where one is wanted."""
    if block.grad_BV is not None:
        torch.mul(block.exp_BV, -advantage_B1, out=block.grad_BV)
        block.grad_BV.scatter_add_(1, block.sampled_ids_B1, advantage_B1 * block.student.sum_B[:, None])


def top_k(x_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their ids, [B, k] each, sorted: ``torch.topk`` at a twentieth of its time.

    The row is dealt into groups. The k largest entries lie in at most k groups, and the k groups with the largest
    maxima hold them (or their equals), so only k groups need a closer look.
    """
    vocab_size = x_BV.shape[1]
    groups = vocab_size // TOP_K_GROUP
    if groups <= 2 * k:
        values, ids = x_BV.topk(k, dim=1)
        return values, ids
    # Strided groups (ids g, g + groups, …): the maximum then runs over contiguous memory.
    dealt = groups * TOP_K_GROUP
    group_max_BG = x_BV[:, :dealt].unflatten(1, (TOP_K_GROUP, groups)).amax(1)
    group_Bk = group_max_BG.topk(k, dim=1).indices
    ids_BN = (group_Bk[:, :, None] + torch.arange(0, dealt, groups, device=x_BV.device)).flatten(1)
    rest_BN = torch.arange(dealt, vocab_size, device=x_BV.device).expand(x_BV.shape[0], -1)
    ids_BN = torch.cat([ids_BN, rest_BN], dim=1)
    values, where = x_BV.gather(1, ids_BN).topk(k, dim=1)
    return values, ids_BN.gather(1, where)
