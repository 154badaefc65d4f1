"""What is minimized, and by which optimizer: one small model per choice, told apart by ``name``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from opd_mesh.config.base import Strict


def _choice(default: str, known: tuple[str, ...], what: str) -> Discriminator:
    def name_of(value: Any) -> Any:
        return value.get("name", default) if isinstance(value, dict) else getattr(value, "name", None)

    return Discriminator(
        name_of,
        custom_error_type="unknown_name",
        custom_error_message=f"write {{name: …}} with the {what}'s name, one of {', '.join(known)}",
    )


# --- objectives ------------------------------------------------------------------------------------------------
class ImportanceConfig(Strict):
    """Weights that correct for responses of older policies: min(truncate_at, p_now(token) / p_then(token)) a token."""

    truncate_at: float = Field(2.0, gt=0, allow_inf_nan=False)


class DivergenceConfig(Strict):
    """What every objective takes; the formulas are in ``opd_kernels.objectives``."""

    # Divides the logits of student and teacher alike.
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    # What teachers are asked for; auto: the first of these that a teacher's card offers and the objective can use. The
    # last two tell less than the whole distribution: top_k_logprobs goes with top_k, token_logprobs with sampled_token.
    signal: Literal["auto", "hidden_states", "logits", "top_k_logprobs", "token_logprobs"] = "auto"
    # On the wire; auto: the teacher's own.
    wire_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    implementation: Literal["auto", "triton", "torch", "reference"] = "auto"
    # Unset: every token counts alike. Useful with max_staleness above 0; needs rollout.top_p 1 and top_k 0.
    importance: ImportanceConfig | None = None

    @model_validator(mode="after")
    def _signal_tells_enough(self) -> Self:
        serves = {"top_k_logprobs": "top_k", "token_logprobs": "sampled_token"}.get(self.signal)
        name = getattr(self, "name", "")
        if serves is not None and serves != name:
            raise ValueError(f"signal: {self.signal} serves the objective {serves} alone, not {name}")
        if serves is not None and self.temperature != 1.0:
            raise ValueError(f"signal: {self.signal} are of temperature 1; set temperature to 1 or another signal")
        return self


class ReverseKlConfig(DivergenceConfig):
    """KL(student ‖ teacher) over the full vocabulary: DeepSeek-V4's objective."""

    name: Literal["reverse_kl"] = "reverse_kl"


class ForwardKlConfig(DivergenceConfig):
    """KL(teacher ‖ student) over the full vocabulary."""

    name: Literal["forward_kl"] = "forward_kl"


class JsdConfig(DivergenceConfig):
    """Generalized Jensen-Shannon divergence: towards forward KL as beta → 0, towards reverse KL as beta → 1."""

    name: Literal["jsd"] = "jsd"
    beta: float = Field(0.5, gt=0, lt=1)


class ExOpdConfig(DivergenceConfig):
    """Reverse KL to teacher^lam · reference^(1 − lam): lam above 1 extrapolates beyond the teacher."""

    name: Literal["exopd"] = "exopd"
    lam: float = Field(1.25, gt=0, allow_inf_nan=False)
    # One of `teachers`, usually the model that the experts were trained from. It marks every response.
    reference: str


class TopKConfig(DivergenceConfig):
    """Reverse KL with all ids but the teacher's top k merged into one; for comparison."""

    name: Literal["top_k"] = "top_k"
    k: int = Field(64, ge=1)


class SampledTokenConfig(DivergenceConfig):
    """Policy gradient of the one-sample reverse KL; for comparison."""

    name: Literal["sampled_token"] = "sampled_token"


_OBJECTIVES = ("reverse_kl", "forward_kl", "jsd", "exopd", "top_k", "sampled_token")
ObjectiveConfig: TypeAlias = Annotated[
    Annotated[ReverseKlConfig, Tag("reverse_kl")]
    | Annotated[ForwardKlConfig, Tag("forward_kl")]
    | Annotated[JsdConfig, Tag("jsd")]
    | Annotated[ExOpdConfig, Tag("exopd")]
    | Annotated[TopKConfig, Tag("top_k")]
    | Annotated[SampledTokenConfig, Tag("sampled_token")],
    _choice("reverse_kl", _OBJECTIVES, "objective"),
]


Beta = Annotated[float, Field(ge=0, lt=1)]


# --- optimizers ------------------------------------------------------------------------------------------------
class ScheduledOptimizerConfig(Strict):
    """Rate, schedule and clipping of any optimizer. Matrices decay; vectors (norms, biases) do not."""

    lr: float = Field(1e-5, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(1.0, gt=0)  # .inf: no clipping
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    # Of the peak, at the end of cosine and linear.
    final_lr_ratio: float = Field(0.1, ge=0, le=1)
    # Of AdamW.
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)


class AdamWConfig(ScheduledOptimizerConfig):
    """AdamW for all parameters."""

    name: Literal["adamw"] = "adamw"


class MuonConfig(ScheduledOptimizerConfig):
    """Muon for the hidden matrices; AdamW for embeddings, the head, vectors and experts that are stacked in one tensor.

    Its updates are scaled to the root mean square of AdamW's (Moonlight, arXiv 2502.16982), so that one learning rate
    and one weight decay serve both.
    """

    name: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    # Newton-Schulz iterations of the orthogonalization.
    ns_steps: int = Field(5, ge=1, le=20)


OptimizerConfig: TypeAlias = Annotated[
    Annotated[AdamWConfig, Tag("adamw")] | Annotated[MuonConfig, Tag("muon")],
    _choice("adamw", ("adamw", "muon"), "optimizer"),
]
