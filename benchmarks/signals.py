"""What a lower signal costs: bytes, error of the KL, error of the gradient, against the full vocabulary in float64.

The student of a recipe answers its own prompts; its teachers mark the answers. What a teacher server would send is made
by the server's code from the teacher's last hidden states, and what a trainer would make of it by the trainer's kernels
in float32. The truth is the reverse KL over the whole vocabulary, in float64, from the same hidden states, and its
gradient at the student's hidden states. The errors are therefore those of signal, wire and objective alone.

    python benchmarks/signals.py                      # the demo's models; `make demo-models` makes them
    python benchmarks/signals.py --student runs/smollm2-…/student

One JSON object on stdout. Letters: T response tokens, V vocabulary, D hidden size, K ids of a top-k signal.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servers import say
from signal_rows import Refusal, Rows, rows_by_teacher

if TYPE_CHECKING:
    from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads that spin cost dear on a shared machine

CHUNK_TOKENS = 96  # rows of [T, V] in float64 at a time
TOP_KS = (1, 8, 64, 256)
MATCHED_K = 64
# Relative. Both are float64, and add up in another order.
REFERENCE_TOLERANCE = 1e-9
# Relative, of what is exact but for float32.
FULL_TOLERANCE = 1e-4
# Relative, by which rounding may lift a top-k KL above the KL that it is a lower bound of.
BOUND_TOLERANCE = 1e-3


def parse_arguments() -> argparse.Namespace:
    """Before torch is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/smollm2.yaml"))
    parser.add_argument("--student", type=Path, help="checkpoint folder; the recipe's student if not given")
    parser.add_argument("--prompts", type=int, default=16, help="of each domain (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the answers and of the drawn tokens")
    return parser.parse_args()


# --- what is measured --------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Variant:
    """A way to send what the teacher knows. ``chosen_by``: whose top k, "teacher" or "student"."""

    signal: str
    dtype: str
    k: int = 0
    chosen_by: str = ""


FULL = [
    Variant(signal, dtype) for signal in ("hidden_states", "logits") for dtype in ("float32", "bfloat16", "float16")
]
TOP_K = [Variant("top_k_logprobs", "float32", k, chosen_by) for chosen_by in ("teacher", "student") for k in TOP_KS]
SAMPLED = Variant("token_logprobs", "float32")


@dataclass(frozen=True, slots=True)
class Truth:
    """In float64, by the formulas as written: KL = Σ p A with A = log p − log q, and what a drawn token makes of it.

    One token y ~ p gives the estimate A_y of the KL, and A_y (W_y − Σ p W) of its gradient: right in the mean, and the
    mean squared errors follow in closed form. Of tokens that the recipe's own sampling (temperature, top-p) writes,
    the mean itself is another.
    """

    kl_T: Tensor
    gradient_TD: Tensor
    drawn_ids_T: Tensor  # y ~ p
    drawn_squared_norm_T: Tensor  # of the gradient of that draw
    draw_abs_error_T: Tensor  # E |A_y − KL|
    draw_variance_T: Tensor  # E |gradient of a draw − gradient|²
    written_kl_T: Tensor  # E A_y, y as the recipe samples
    written_gradient_TD: Tensor
    student_top_TK: Tensor  # the student's most probable ids

    @classmethod
    def of(cls, rows: Rows, *, temperature: float, top_p: float, generator: Any) -> Truth:
        import torch

        heads = rows.student_head, rows.teacher_head
        if any(head.bias is not None or head.logit_scale != 1.0 or head.soft_cap is not None for head in heads):
            raise Refusal("a head has a bias, a scale or a soft-cap, which the formulas here leave out")
        weight_VD, teacher_VD = (head.weight[: head.vocab_size].double() for head in heads)
        logits_TV = rows.student_TD.double() @ weight_VD.T
        log_p_TV = logits_TV.log_softmax(-1)
        p_TV = log_p_TV.exp()
        advantage_TV = log_p_TV - (rows.teacher_TD.double() @ teacher_VD.T).log_softmax(-1)
        kl_T = (p_TV * advantage_TV).sum(-1)
        gradient_TD = (p_TV * (advantage_TV - kl_T[:, None])) @ weight_VD
        mean_TD = p_TV @ weight_VD
        # |W_y − Σ p W|² for every y.
        reach_TV = (weight_VD**2).sum(-1) - 2 * mean_TD @ weight_VD.T + (mean_TD**2).sum(-1)[:, None]
        squared_TV = advantage_TV**2 * reach_TV
        ids_T1 = torch.multinomial(p_TV, 1, generator=generator)
        written_TV = _as_sampled(logits_TV / temperature, top_p)
        shares_TV = written_TV * advantage_TV
        written_kl_T = shares_TV.sum(-1)
        return cls(
            kl_T=kl_T,
            gradient_TD=gradient_TD,
            drawn_ids_T=ids_T1[:, 0],
            drawn_squared_norm_T=squared_TV.gather(1, ids_T1)[:, 0],
            draw_abs_error_T=(p_TV * (advantage_TV - kl_T[:, None]).abs()).sum(-1),
            draw_variance_T=(p_TV * squared_TV).sum(-1) - (gradient_TD**2).sum(-1),
            written_kl_T=written_kl_T,
            written_gradient_TD=shares_TV @ weight_VD - written_kl_T[:, None] * mean_TD,
            student_top_TK=logits_TV.topk(max(TOP_KS), dim=-1).indices,
        )


def _as_sampled(logits_TV: Tensor, top_p: float) -> Tensor:
    """[T, V] probabilities after top-p: the fewest ids whose mass reaches it."""
    best_TV, order_TV = logits_TV.softmax(-1).sort(-1, descending=True)
    kept_TV = best_TV * ((best_TV.cumsum(-1) - best_TV) < top_p)
    return (kept_TV / kept_TV.sum(-1, keepdim=True)).gather(1, order_TV.argsort(-1))


@dataclass(frozen=True, slots=True)
class Found:
    """What a trainer makes of a signal. Bytes of all T rows."""

    value_T: Tensor
    gradient_TD: Tensor
    payload_bytes: int
    request_bytes: int


def measure(rows: Rows, variant: Variant, truth: Truth) -> Found:
    """Answer as the server does, then loss and gradient as the trainer does."""
    import opd_kernels
    from opd.v1 import teacher_service_pb2

    from opd_mesh.torch_tensors import from_numpy
    from teacher_server.engine import ScoreJob, Signal
    from teacher_server.signals import finite, tensors_of_logits

    total = len(rows.student_TD)
    asked = truth.student_top_TK[:, : variant.k].flatten().tolist() if variant.chosen_by == "student" else []
    job = ScoreJob(
        token_ids=(0, *truth.drawn_ids_T.tolist()),  # row t speaks of the token behind position t
        predicting_positions=tuple(range(total)),
        signal=Signal(variant.signal),
        dtype=variant.dtype,
        top_k=variant.k,
        candidate_ids=tuple(asked),
    )
    if job.signal is Signal.HIDDEN_STATES:
        sent = {"hidden_states": finite("teacher", job, rows.teacher_TD)}
    else:
        sent = tensors_of_logits("teacher", job, total, lambda part: rows.teacher_head.logits(rows.teacher_TD[part]))
    came = {name: from_numpy(array) for name, array in sent.items()}
    objective: opd_kernels.Objective = opd_kernels.ReverseKL()
    match job.signal:
        case Signal.HIDDEN_STATES:
            signal = opd_kernels.Signal(hidden_TE=came["hidden_states"], head=rows.teacher_head)
        case Signal.LOGITS:
            signal = opd_kernels.Signal(logits_TV=came["logits"])
        case Signal.TOP_K_LOGPROBS:
            signal = opd_kernels.Signal(top_k_ids_TK=came["token_ids"], top_k_logprobs_TK=came["logprobs"])
            objective = opd_kernels.TopK(variant.k)
        case Signal.TOKEN_LOGPROBS:
            signal = opd_kernels.Signal(token_logprobs_T=came["logprobs"])
            objective = opd_kernels.SampledToken()
    leaf_TD = rows.student_TD.clone().requires_grad_()
    result = opd_kernels.linear_divergence(
        leaf_TD, rows.student_head, teachers=signal, sampled_ids_T=truth.drawn_ids_T, objective=objective
    )
    result.loss.backward()
    assert leaf_TD.grad is not None
    return Found(
        value_T=result.divergence_T.double(),
        gradient_TD=leaf_TD.grad.double(),
        payload_bytes=sum(array.nbytes for array in sent.values()),
        request_bytes=teacher_service_pb2.ScoreItem(candidate_token_ids=asked).ByteSize(),
    )


def check_truth(rows: Rows, truth: Truth) -> None:
    """The first gate: the formulas above against those of the kernels' reference."""
    import opd_kernels

    leaf_TD = rows.student_TD.double().requires_grad_()
    result = opd_kernels.linear_divergence(
        leaf_TD,
        rows.student_head,
        rows.teacher_TD.double(),
        rows.teacher_head,
        sampled_ids_T=truth.drawn_ids_T,
        implementation="reference",
    )
    result.loss.backward()
    assert leaf_TD.grad is not None
    for what, ours, theirs in (
        ("KL", truth.kl_T, result.kl_T),
        ("gradient", truth.gradient_TD, leaf_TD.grad),
    ):
        require(f"the {what} against opd_kernels' reference", _relative(ours, theirs), REFERENCE_TOLERANCE)


def require(what: str, error: float, tolerance: float) -> None:
    """Raises :class:`Refusal`, also for NaN."""
    if not error <= tolerance:
        raise Refusal(f"{what}: a relative error of {error:.1e}, above {tolerance:.0e}")


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- figures -----------------------------------------------------------------------------------------------------
def figures(variant: Variant, found: Found, truth: Truth) -> dict[str, Any]:
    """The entry of a variant; KL in nats, means over tokens."""
    import torch

    kl, total = float(truth.kl_T.mean()), len(truth.kl_T)
    bias = float(found.value_T.mean()) - kl
    return {
        "signal": variant.signal,
        "dtype": variant.dtype,
        **({"k": variant.k, "chosen_by": variant.chosen_by} if variant.k else {}),
        "payload_bytes_per_token": found.payload_bytes / total,
        "request_bytes_per_token": round(found.request_bytes / total, 1),
        "kl_bias": bias,
        "kl_bias_relative": bias / kl,
        "kl_mean_abs_error": float((found.value_T - truth.kl_T).abs().mean()),
        "gradient_error": _relative(found.gradient_TD, truth.gradient_TD),
        "gradient_cosine": float(
            torch.cosine_similarity(found.gradient_TD.flatten(), truth.gradient_TD.flatten(), dim=0)
        ),
    }


def sampled_figures(entry: dict[str, Any], truth: Truth, matched: dict[str, Any]) -> dict[str, Any]:
    """The entry of one drawn token: expectations, beside what this one draw happened to give."""
    one_draw = {name: entry.pop(name) for name in list(entry) if name.startswith(("kl_", "gradient_"))}
    squared = float(truth.draw_variance_T.sum() / (truth.gradient_TD**2).sum())
    return entry | {
        "kl_bias_relative": 0.0,
        "kl_mean_abs_error": float(truth.draw_abs_error_T.mean()),
        "gradient_error": squared**0.5,
        f"draws_per_token_for_the_error_of_top_{MATCHED_K}": squared / matched["gradient_error"] ** 2,
        "this_draw": one_draw,
    }


def written_figures(truth: Truth, *, temperature: float, top_p: float) -> dict[str, Any]:
    """The mean of the sampled-token estimate where tokens are written as the recipe samples them."""
    return {
        "temperature": temperature,
        "top_p": top_p,
        "kl_bias_relative": float(truth.written_kl_T.mean() / truth.kl_T.mean()) - 1,
        "gradient_error": _relative(truth.written_gradient_TD, truth.gradient_TD),
    }


def check_figures(entries: list[dict[str, Any]], found: dict[Variant, Found], truth: Truth) -> None:
    """The second gate."""
    for entry in entries:
        if entry["signal"] in ("hidden_states", "logits") and entry["dtype"] == "float32":
            for name in ("kl_bias_relative", "gradient_error"):
                require(f"{entry['signal']} in float32: {name}", abs(entry[name]), FULL_TOLERANCE)
    for variant in TOP_K:
        excess = float((found[variant].value_T - truth.kl_T).max() / truth.kl_T.mean())
        require(f"{variant} above the KL that it is a lower bound of", excess, BOUND_TOLERANCE)
    drawn = (found[SAMPLED].gradient_TD ** 2).sum(-1)
    require("a draw's gradient, by kernel and formula", _relative(drawn, truth.drawn_squared_norm_T), FULL_TOLERANCE)


# --- all of it ---------------------------------------------------------------------------------------------------
def joined(parts: list[Any]) -> Any:
    """One dataclass of several: tensors one after the other, numbers added."""
    import torch

    def join(values: list[Any]) -> Any:
        return torch.cat(values) if isinstance(values[0], torch.Tensor) else sum(values)

    return type(parts[0])(*(join([getattr(part, name) for part in parts]) for name in parts[0].__slots__))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements."""
    import torch

    from opd_mesh.config.base import load_config
    from opd_mesh.config.recipe import Recipe

    started = time.monotonic()
    recipe = load_config(Recipe, arguments.recipe)
    if arguments.student is not None:
        recipe = recipe.replace(student=recipe.student.replace(path=arguments.student))
    if recipe.rollout.top_k:
        raise Refusal("rollout.top_k is not taken into account here")
    sampling = {"temperature": recipe.rollout.temperature, "top_p": recipe.rollout.top_p}
    rows_of = rows_by_teacher(recipe, arguments.prompts, arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    truths: dict[str, list[Truth]] = {name: [] for name in rows_of}
    parts: dict[Variant, list[Found]] = {variant: [] for variant in (*FULL, *TOP_K, SAMPLED)}
    for name, rows in rows_of.items():
        say(f"{name}: {len(rows.student_TD)} tokens")
        for chunk in rows.chunks(CHUNK_TOKENS):
            truth = Truth.of(chunk, generator=generator, **sampling)
            check_truth(chunk, truth)
            truths[name].append(truth)
            for variant, found in parts.items():
                found.append(measure(chunk, variant, truth))
    truth = joined([part for chunks in truths.values() for part in chunks])
    found_by = {variant: joined(found) for variant, found in parts.items()}
    entries = {variant: figures(variant, found, truth) for variant, found in found_by.items()}
    check_figures(list(entries.values()), found_by, truth)
    matched = entries[Variant("top_k_logprobs", "float32", MATCHED_K, "teacher")]
    entries[SAMPLED] = sampled_figures(entries[SAMPLED], truth, matched)
    head = next(iter(rows_of.values())).student_head
    return {
        "student": str(recipe.student.path),
        "tokens": len(truth.kl_T),
        "vocab_size": head.vocab_size,
        "hidden_size": head.weight.shape[1],
        "kl": float(truth.kl_T.mean()),
        "kl_by_teacher": {name: float(joined(chunks).kl_T.mean()) for name, chunks in truths.items()},
        "signals": list(entries.values()),
        "token_logprobs_as_written": written_figures(truth, **sampling),
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    """Print the figures, or say why not."""
    arguments = parse_arguments()
    try:
        print(json.dumps(run(arguments)))
    except Refusal as refusal:
        sys.exit(f"refusing to report: {refusal}")


if __name__ == "__main__":
    main()
