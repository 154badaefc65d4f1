"""What is minimized, and by which optimizer: one small model per choice, told apart by ``name``."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, Tag, model_validator

from opd_mesh.config.base import Strict, choice


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


class LikelihoodConfig(Strict):
    """What the objectives of stage one share: they weigh the student's own log-probabilities."""

    implementation: Literal["auto", "triton", "torch", "reference"] = "auto"


class SftConfig(LikelihoodConfig):
    """Cross entropy of the answers that the domains hold, a mean over answer tokens. The student writes nothing."""

    name: Literal["sft"] = "sft"


class ReferenceKlConfig(Strict):
    """A penalty for leaving a reference model, which a teacher server holds."""

    # One of `teachers`, usually the model that training began with.
    reference: str
    coefficient: float = Field(0.001, gt=0, allow_inf_nan=False)
    # "unbiased": that of DeepSeek-V3.2 (arXiv 2512.02556), k3 weighted by p_now / p_then; "k3": as in the GRPO paper.
    estimator: Literal["unbiased", "k3"] = "unbiased"


class DynamicSamplingConfig(Strict):
    """DAPO's: groups whose scores are all equal, whatever their lengths cost, are dropped, and more prompts are asked
    for in their place."""

    # Of further prompts in one step; what is still missing then makes the step smaller.
    max_rounds: int = Field(3, ge=1)


class PolicyGradientConfig(LikelihoodConfig):
    """The clipped policy gradient with group advantages, and what its variants choose differently.

    The formulas are in ``student_trainer.policy_gradient``.
    """

    # What advantages R − mean(R) of a group are divided by.
    advantage_scale: Literal["group_std", "none"] = "group_std"
    # The ratio p_now / p_then counts within [1 − clip_low, 1 + clip_high].
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0, allow_inf_nan=False)
    # "sequence_mean": the mean over responses of the mean over their tokens; "token_mean": over all tokens;
    # "constant_length": the sum over a response's tokens by `length`, the mean over responses.
    aggregation: Literal["sequence_mean", "token_mean", "constant_length"] = "sequence_mean"
    # Of constant_length; unset: the longest response that the recipe allows.
    length: int | None = Field(None, ge=1)
    kl: ReferenceKlConfig | None = None
    # DeepSeek-V3.2's sequence mask: a response with a negative advantage whose mean of log p_then − log p_now exceeds
    # this teaches nothing, for it has become too unlikely to tell about the present policy.
    mask_above: float | None = Field(None, gt=0, allow_inf_nan=False)
    dynamic_sampling: DynamicSamplingConfig | None = None

    @model_validator(mode="after")
    def _length_is_used(self) -> Self:
        if self.length is not None and self.aggregation != "constant_length":
            raise ValueError(f"length: {self.aggregation} does not use it; leave it out, or choose constant_length")
        return self


class GrpoConfig(PolicyGradientConfig):
    """Shao et al., DeepSeekMath, arXiv 2402.03300."""

    name: Literal["grpo"] = "grpo"


class DapoConfig(PolicyGradientConfig):
    """Yu et al., DAPO, arXiv 2503.14476: token mean, a higher upper clip, dynamic sampling, no KL.

    Its soft overlong punishment is a domain's ``length_penalty``.
    """

    name: Literal["dapo"] = "dapo"
    clip_high: float = Field(0.28, gt=0, allow_inf_nan=False)
    aggregation: Literal["sequence_mean", "token_mean", "constant_length"] = "token_mean"
    dynamic_sampling: DynamicSamplingConfig | None = DynamicSamplingConfig()


class DrGrpoConfig(PolicyGradientConfig):
    """Liu et al., "Understanding R1-Zero-Like Training", arXiv 2503.20783: no division by std or by length."""

    name: Literal["dr_grpo"] = "dr_grpo"
    advantage_scale: Literal["group_std", "none"] = "none"
    aggregation: Literal["sequence_mean", "token_mean", "constant_length"] = "constant_length"


_OBJECTIVES = (
    "reverse_kl",
    "forward_kl",
    "jsd",
    "exopd",
    "top_k",
    "sampled_token",
    "sft",
    "grpo",
    "dapo",
    "dr_grpo",
)
ObjectiveConfig: TypeAlias = Annotated[
    Annotated[ReverseKlConfig, Tag("reverse_kl")]
    | Annotated[ForwardKlConfig, Tag("forward_kl")]
    | Annotated[JsdConfig, Tag("jsd")]
    | Annotated[ExOpdConfig, Tag("exopd")]
    | Annotated[TopKConfig, Tag("top_k")]
    | Annotated[SampledTokenConfig, Tag("sampled_token")]
    | Annotated[SftConfig, Tag("sft")]
    | Annotated[GrpoConfig, Tag("grpo")]
    | Annotated[DapoConfig, Tag("dapo")]
    | Annotated[DrGrpoConfig, Tag("dr_grpo")],
    choice("reverse_kl", _OBJECTIVES, "objective"),
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
    choice("adamw", ("adamw", "muon"), "optimizer"),
]
