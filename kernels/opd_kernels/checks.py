"""What :func:`linear_divergence` and :func:`token_logprobs` refuse, and how they say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import get_args

import torch
from torch import Tensor

from opd_kernels.head import LinearHead
from opd_kernels.inputs import DivergenceInputs
from opd_kernels.objectives import ExOPD, Objective, SampledToken, TopK
from opd_kernels.signals import Signal


def one_or_more(
    teachers: Signal | Sequence[Signal] | None, hidden_TE: Tensor | None, head: LinearHead | None
) -> tuple[tuple[Signal, ...], bool]:
    """→ the signals, and whether there is one that was not given as a sequence."""
    if (teachers is None) == (hidden_TE is None and head is None):
        raise ValueError("teachers: give either teacher_hidden_TE with teacher_head, or teachers")
    if teachers is None:
        return (Signal(hidden_TE=hidden_TE, head=head),), True
    if isinstance(teachers, Signal):
        return (teachers,), True
    if not teachers:
        raise ValueError("teachers: the sequence is empty; tokens without a teacher have no loss")
    return tuple(teachers), False


def check(inputs: DivergenceInputs) -> None:
    """Raises ValueError where the arguments of ``linear_divergence`` do not fit each other."""
    hidden, objective = inputs.student_hidden_TD, inputs.objective
    kinds = get_args(Objective)
    if type(objective) not in kinds:
        raise ValueError(f"objective: {objective!r} is not a value of {', '.join(kind.__name__ for kind in kinds)}")
    _check_head("student_", hidden, inputs.student_head)
    tokens = hidden.shape[0]
    names = [f"teachers[{i}]" for i in range(len(inputs.teachers))] if len(inputs.teachers) > 1 else ["teacher"]
    _check_devices(inputs, names)
    for name, teacher in zip(names, inputs.teachers, strict=True):
        _check_signal(name, teacher, inputs)
        if teacher.is_full:
            continue
        fits = isinstance(objective, TopK) if teacher.is_top_k else isinstance(objective, SampledToken)
        if not fits:
            told = "top-k log-probabilities" if teacher.is_top_k else "the sampled tokens' log-probabilities"
            raise ValueError(
                f"objective: {type(objective).__name__} needs more than {name} tells, which is {told}; "
                f"they serve {'TopK' if teacher.is_top_k else 'SampledToken'} alone"
            )
        if inputs.temperature != 1.0:
            raise ValueError(
                f"temperature: {inputs.temperature}, but {name} gives log-probabilities, which are of temperature 1 "
                "and cannot be changed to another"
            )
    if (inputs.reference is not None) != isinstance(objective, ExOPD):
        raise ValueError("reference: goes with ExOPD, which needs it; no other objective does")
    if inputs.reference is not None:
        _check_signal("reference", inputs.reference, inputs)
        if not inputs.reference.is_full:
            raise ValueError("reference: needs hidden states and a head, or logits")

    _check_ids("sampled_ids_T", inputs.sampled_ids_T, (tokens,), inputs.vocab_size)
    shape, wanted = tuple(inputs.token_weights_NT.shape), (len(inputs.teachers), tokens)
    if shape != wanted:
        raise ValueError(f"token_weights_T: {shape} weights, expected {wanted} (teachers, tokens)")
    _check_settings(inputs)


def check_token_logprobs(inputs: DivergenceInputs) -> None:
    """Raises ValueError where the arguments of ``token_logprobs`` do not fit each other, under their names there."""
    hidden, head = inputs.student_hidden_TD, inputs.student_head
    _check_head("", hidden, head)
    tensors = {"head: weight": head.weight, "head: bias": head.bias, "token_ids_T:": inputs.sampled_ids_T}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} on {tensor.device}, the hidden states are on {hidden.device}")
    _check_ids("token_ids_T", inputs.sampled_ids_T, (hidden.shape[0],), inputs.vocab_size)
    _check_settings(inputs)


def _check_settings(inputs: DivergenceInputs) -> None:
    if not inputs.temperature > 0:
        raise ValueError(f"temperature: {inputs.temperature} is not above 0")
    if inputs.chunk_tokens is not None and inputs.chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: {inputs.chunk_tokens} is below 1")


def _check_devices(inputs: DivergenceInputs, teacher_names: list[str]) -> None:
    device, head = inputs.student_hidden_TD.device, inputs.student_head
    tensors: dict[str, Tensor | None] = {
        "student_head: weight": head.weight,
        "student_head: bias": head.bias,
        "sampled_ids_T:": inputs.sampled_ids_T,
        "token_weights_T:": inputs.token_weights_NT,
    }
    for name, signal in zip([*teacher_names, "reference"], inputs.signals, strict=False):
        if signal.head is not None:
            tensors |= {f"{name}_head: weight": signal.head.weight, f"{name}_head: bias": signal.head.bias}
        parts = [field.name for field in fields(signal) if field.name != "head"]
        tensors |= {f"{name}_{part}:": getattr(signal, part) for part in parts}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} on {tensor.device}, the student's hidden states are on {device}")


def _check_signal(name: str, signal: Signal, inputs: DivergenceInputs) -> None:
    tokens, vocab_size = inputs.student_hidden_TD.shape[0], inputs.vocab_size
    forms = {
        "hidden_TE and head": (signal.hidden_TE is not None, signal.head is not None),
        "logits_TV": (signal.logits_TV is not None,),
        "top_k_ids_TK and top_k_logprobs_TK": (signal.top_k_ids_TK is not None, signal.top_k_logprobs_TK is not None),
        "token_logprobs_T": (signal.token_logprobs_T is not None,),
    }
    given = [form for form, parts in forms.items() if any(parts)]
    if len(given) != 1:
        raise ValueError(f"{name}: give exactly one of {'; '.join(forms)}, got {'; '.join(given) or 'none'}")
    if not all(forms[given[0]]):
        raise ValueError(f"{name}: {given[0]} go together, and one of them is missing")
    if signal.hidden_TE is not None and signal.head is not None:
        _check_head(f"{name}_", signal.hidden_TE, signal.head)
        if signal.hidden_TE.shape[0] != tokens:
            raise ValueError(f"{name}_hidden: {signal.hidden_TE.shape[0]} rows, the student has {tokens}")
        if signal.head.vocab_size != vocab_size:
            raise ValueError(
                f"{name}_head: {signal.head.vocab_size} valid ids, the student's head has {vocab_size}; "
                "both must speak the same tokenizer (set valid_vocab_size where rows are padding)"
            )
    if signal.logits_TV is not None:
        _check_values(f"{name}_logits_TV", signal.logits_TV, (tokens, vocab_size), "; slice padding off first")
    if signal.token_logprobs_T is not None:
        _check_values(f"{name}_token_logprobs_T", signal.token_logprobs_T, (tokens,))
    if signal.top_k_ids_TK is not None and signal.top_k_logprobs_TK is not None:
        width = signal.top_k_ids_TK.shape[-1] if signal.top_k_ids_TK.dim() == 2 else 1
        if not 1 <= width <= vocab_size:
            raise ValueError(f"{name}_top_k_ids_TK: {width} ids per token, expected 1…{vocab_size}")
        _check_ids(f"{name}_top_k_ids_TK", signal.top_k_ids_TK, (tokens, width), vocab_size)
        _check_values(f"{name}_top_k_logprobs_TK", signal.top_k_logprobs_TK, (tokens, width))


def _check_values(name: str, values: Tensor, shape: tuple[int, ...], remedy: str = "") -> None:
    if tuple(values.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(values.shape)}, expected {shape}{remedy}")
    if not values.is_floating_point():
        raise ValueError(f"{name}: {values.dtype} is not a floating dtype")


def _check_ids(name: str, ids: Tensor, shape: tuple[int, ...], vocab_size: int) -> None:
    if tuple(ids.shape) != shape or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: {ids.dtype} {tuple(ids.shape)}, expected int64 or int32 {shape}")
    # On a GPU this would wait for the device. There, gather's own assertion stops a bad id, and Triton's statistics of
    # a row whose sampled id is bad are NaN.
    if ids.device.type == "cpu" and ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        raise ValueError(f"{name}: ids span {int(ids.min())}…{int(ids.max())}, the vocabulary is 0…{vocab_size - 1}")


def _check_head(prefix: str, hidden: Tensor, head: LinearHead) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"{prefix}hidden: {hidden.dtype} {tuple(hidden.shape)}, expected floating [tokens, width]")
    if head.weight.dim() != 2 or head.weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"{prefix}head: weight {tuple(head.weight.shape)} does not fit hidden {tuple(hidden.shape)}")
    if not 1 <= head.vocab_size <= head.weight.shape[0]:
        raise ValueError(f"{prefix}head: {head.vocab_size} valid ids, but the weight has {head.weight.shape[0]} rows")
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ValueError(f"{prefix}head: bias {tuple(head.bias.shape)}, expected {(head.weight.shape[0],)}")
    if head.soft_cap is not None and not head.soft_cap > 0:
        raise ValueError(f"{prefix}head: soft_cap {head.soft_cap} is not above 0")
