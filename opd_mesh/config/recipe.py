"""The recipe of a run: one student, its teachers, the domains that route between them, and how to train."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from opd_mesh.config.base import Strict
from opd_mesh.config.domains import DEFAULT_EFFORTS, DomainConfig, EffortConfig, with_judged_splits
from opd_mesh.config.judging import GrmConfig
from opd_mesh.config.sections import (
    BatchConfig,
    CheckpointConfig,
    DiagnosticsConfig,
    EvaluationConfig,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherRef,
    TrainerServiceConfig,
)
from opd_mesh.config.services import (
    PeerConfig,
    PoolConfig,
)
from opd_mesh.config.tasks import LengthPenalty, SoftOverlongPenalty
from opd_mesh.config.training import (
    AdamWConfig,
    DivergenceConfig,
    ExOpdConfig,
    ImportanceConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PolicyGradientConfig,
    ReferenceKlConfig,
    ReverseKlConfig,
    SftConfig,
)
from opd_mesh.trajectory import MAX_KEPT_IDS


class Recipe(Strict):
    """``opd run RECIPE``. Paths are relative to the working directory."""

    run: RunConfig
    student: StudentConfig
    # None for sft, and for policy gradients without a reference.
    teachers: dict[str, TeacherRef] = Field(default_factory=dict)
    domains: dict[str, DomainConfig] = Field(min_length=1)
    # How a domain's `effort` is written; those named here replace the ones that are built in.
    efforts: dict[str, EffortConfig] = Field(default_factory=dict, validate_default=True)
    # Of the teacher server that `opd run` starts for teachers without addresses.
    pool: PoolConfig = PoolConfig()
    rollout: RolloutConfig = RolloutConfig()
    # Judges the responses of domains that have a `reward`.
    grm: GrmConfig = GrmConfig()
    objective: ObjectiveConfig = ReverseKlConfig()
    optimizer: OptimizerConfig = AdamWConfig()
    batch: BatchConfig = BatchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    trainer: TrainerServiceConfig = TrainerServiceConfig()
    teacher_channel: PeerConfig = PeerConfig()
    # Same token map but other BOS, EOS, pad or template on a teacher: an error, or the student's roles are used.
    tokenizer_roles: Literal["same", "student"] = "same"
    # How many versions the policy that writes may be behind the one that is trained. Above 0, generation and training
    # overlap: the responses of the next steps are written meanwhile. Our own responses are never too old and never
    # dropped; trajectories from outside that are older are dropped and counted.
    max_staleness: int = Field(0, ge=0, le=64)
    # How long a teacher may be out of reach, or silent beyond item_timeout_per_token_s for every token asked of it,
    # before the run ends with a checkpoint.
    teacher_timeout_s: float = Field(120.0, gt=0)
    # Unset: OPD_REDIS_URL, else an embedded Valkey.
    redis_url: str | None = None
    redis_timeout_s: float = Field(15.0, gt=0)

    @property
    def distils(self) -> bool:
        """Whether teachers mark what the student writes."""
        return isinstance(self.objective, DivergenceConfig)

    @property
    def writes(self) -> bool:
        """Whether the student writes what it learns from."""
        return not isinstance(self.objective, SftConfig)

    @property
    def needs_rollouts(self) -> bool:
        """Whether the student writes at all, if only to be evaluated."""
        return self.writes or self.evaluation.accuracy is not None

    @property
    def policy_gradient(self) -> PolicyGradientConfig | None:
        """The objective where it learns from rewards."""
        return self.objective if isinstance(self.objective, PolicyGradientConfig) else None

    @property
    def judged_domains(self) -> dict[str, DomainConfig]:
        """Those whose rewards come from the generative reward model; empty where nothing is rewarded."""
        if self.policy_gradient is None:
            return {}
        return {name: domain for name, domain in self.trained_domains.items() if domain.reward is not None}

    @property
    def importance(self) -> ImportanceConfig | None:
        """Weights for tokens of older policies, where a divergence is to have them."""
        return self.objective.importance if isinstance(self.objective, DivergenceConfig) else None

    @property
    def keeps_masks(self) -> bool:
        """Responses tell the ids that top_k and top_p left: those that a policy gradient learns from."""
        return self.policy_gradient is not None and self.rollout.truncates

    @property
    def reference_id(self) -> str | None:
        """The teacher that is the objective's reference model, where it has one."""
        match self.objective:
            case ExOpdConfig(reference=reference):
                return reference
            case PolicyGradientConfig(kl=ReferenceKlConfig(reference=reference)):
                return reference
        return None

    def max_new_tokens(self, domain: DomainConfig) -> int:
        """Of a response in a domain: its own, that of its effort, or that of all."""
        effort = None if domain.effort is None else self.efforts[domain.effort].max_new_tokens
        return domain.max_new_tokens or effort or self.rollout.max_new_tokens

    def length_penalty(self, domain: DomainConfig) -> LengthPenalty | None:
        """Of a response in a domain: its own, or that of its effort."""
        return domain.length_penalty or (self.efforts[domain.effort].length_penalty if domain.effort else None)

    @property
    def trained_domains(self) -> dict[str, DomainConfig]:
        """Those whose prompts are trained on."""
        return {name: domain for name, domain in self.domains.items() if domain.share > 0}

    @field_validator("domains", mode="after")
    @classmethod
    def _judged_and_answered_alike(cls, given: dict[str, DomainConfig]) -> dict[str, DomainConfig]:
        return with_judged_splits(given)

    @field_validator("efforts", mode="after")
    @classmethod
    def _with_the_usual_efforts(cls, given: dict[str, EffortConfig]) -> dict[str, EffortConfig]:
        return DEFAULT_EFFORTS | given

    @model_validator(mode="after")
    def _efforts_are_known(self) -> Recipe:
        for name, domain in self.domains.items():
            if domain.effort is not None and domain.effort not in self.efforts:
                raise ValueError(f"domains.{name}.effort: {domain.effort!r} is none of {', '.join(self.efforts)}")
        return self

    @model_validator(mode="after")
    def _responses_fit(self) -> Recipe:
        context = self.rollout.engine.max_context_tokens
        for name, domain in self.domains.items():
            longest = self.max_new_tokens(domain)
            if longest >= context:
                raise ValueError(
                    f"domains.{name}: responses of up to {longest} tokens (max_new_tokens) leave no room for a prompt "
                    f"in rollout.engine.max_context_tokens ({context}); lower the one or raise the other"
                )
            penalty = self.length_penalty(domain)
            if isinstance(penalty, SoftOverlongPenalty) and penalty.buffer_tokens > longest:
                raise ValueError(
                    f"domains.{name}.length_penalty.buffer_tokens: a buffer of {penalty.buffer_tokens} tokens is "
                    f"longer than the longest response ({longest} tokens); lower it or raise max_new_tokens"
                )
        return self

    @model_validator(mode="after")
    def _accuracy_is_to_be_had(self) -> Recipe:
        accuracy = self.evaluation.accuracy
        if accuracy is None:
            return self
        verified = {name: domain for name, domain in self.domains.items() if domain.verifier is not None}
        for name, domain in verified.items():
            if accuracy.split == "test" and not domain.has_test_prompts:
                raise ValueError(
                    f"evaluation.accuracy.split: domain {name} has no test prompts; give it a share of them "
                    f"(domains.{name}.splits.test), or set split to validation"
                )
        return self

    @model_validator(mode="after")
    def _an_answer_is_learned_once(self) -> Recipe:
        if not self.writes and self.batch.responses_per_prompt > 1:
            raise ValueError(
                f"batch.responses_per_prompt: sft learns the one answer that the domain holds, not "
                f"{self.batch.responses_per_prompt}; leave it out, and set batch.prompts_per_step"
            )
        return self

    @model_validator(mode="after")
    def _something_is_trained_on(self) -> Recipe:
        if not self.trained_domains:
            raise ValueError("domains: share is 0 in all of them, so there is nothing to train on")
        return self

    @model_validator(mode="after")
    def _staleness_fits(self) -> Recipe:
        if self.run.deterministic and self.max_staleness:
            raise ValueError(
                "run.deterministic: with max_staleness above 0 it depends on timing which policy writes a token; set "
                "max_staleness to 0, or leave deterministic out"
            )
        if self.importance is not None and self.rollout.truncates:
            raise ValueError(
                "objective.importance: with rollout.top_p below 1 or rollout.top_k a token may be drawn that the "
                "present student would cut off, or the other way round, and has no ratio; set top_p to 1 and top_k to "
                "0, or leave importance out"
            )
        return self

    @model_validator(mode="after")
    def _rewards_are_to_be_had(self) -> Recipe:
        objective = self.policy_gradient
        if objective is None:
            return self
        name = self.objective.name
        if self.keeps_masks and not 1 <= self.rollout.top_k <= MAX_KEPT_IDS:
            raise ValueError(
                f"rollout.top_k: {name} compares p_now with p_then of every token over the ids that top_p and top_k "
                f"leave, and these travel with the token, so top_k has to bound them: set it from 1 to {MAX_KEPT_IDS}, "
                f"not {self.rollout.top_k}, or set top_p to 1 and top_k to 0"
            )
        if self.keeps_masks and self.rollout.engine.engine == "vllm":
            raise ValueError(
                f"rollout.engine.engine: vllm does not tell the ids that top_p and top_k leave, which {name} needs; "
                "choose transformers, or set top_p to 1 and top_k to 0"
            )
        if self.keeps_masks and objective.kl is not None:
            raise ValueError(
                "objective.kl: the reference's log-probabilities are over all ids, and rollout.top_p or rollout.top_k "
                "leaves some; set kl to null, or top_p to 1 and top_k to 0"
            )
        if self.batch.responses_per_prompt < 2:
            raise ValueError(
                f"batch.responses_per_prompt: {name} compares the responses to one prompt with each other, so there "
                f"must be several, not {self.batch.responses_per_prompt}; 8 is usual"
            )
        for domain_name, domain in self.trained_domains.items():
            if not domain.is_rewarded:
                raise ValueError(
                    f"domains.{domain_name}.verifier: {name} needs rewards; name a verifier, or a reward by a GRM"
                )
            if domain.others is not None:
                raise ValueError(
                    f"domains.{domain_name}.others: {name} needs rewards, and other prompts are never verified; leave "
                    "them out"
                )
        if objective.kl is not None and self.rollout.temperature != 1:
            raise ValueError(
                "rollout.temperature: the reference's log-probabilities are of temperature 1, so objective.kl needs "
                f"that, not {self.rollout.temperature:g}"
            )
        if objective.dynamic_sampling is not None and self.max_staleness:
            raise ValueError(
                "objective.dynamic_sampling: what replaces a dropped group cannot be written ahead; set max_staleness "
                "to 0, or dynamic_sampling to null"
            )
        return self

    @model_validator(mode="after")
    def _judging_fits(self) -> Recipe:
        for name, domain in self.domains.items():
            if domain.judging is None or not domain.judging.constrained:
                continue
            if self.rollout.engine.engine == "vllm":
                raise ValueError(
                    f"rollout.engine.engine: vllm takes no grammars, and verdicts of domain {name} are constrained; "
                    "choose transformers, or set judging.constrained to false"
                )
            if domain.effort is not None and self.efforts[domain.effort].closing:
                raise ValueError(
                    f"domains.{name}.effort: {domain.effort} reasons first, and a constrained verdict has no room for "
                    "that; choose another effort, or set judging.constrained to false"
                )
            objective = self.policy_gradient
            if objective is not None and objective.kl is not None and domain.share > 0:
                raise ValueError(
                    f"objective.kl: domain {name} writes under a grammar, which the reference's log-probabilities do "
                    "not know; set kl to null, or judging.constrained to false"
                )
            if self.importance is not None and domain.share > 0:
                raise ValueError(
                    f"objective.importance: domain {name} writes under a grammar, which the teachers' marks do not "
                    "know; leave importance out, or set judging.constrained to false"
                )
        return self

    @model_validator(mode="after")
    def _grm_fits(self) -> Recipe:
        for name, domain in self.judged_domains.items():
            if domain.reward is not None:
                self.grm.check(domain.reward, f"domains.{name}.reward", self.rollout.engine)
        return self

    @model_validator(mode="after")
    def _routing_is_closed(self) -> Recipe:
        for name, domain in self.domains.items():
            for teacher in domain.teachers:
                if not self.distils:
                    raise ValueError(
                        f"domains.{name}.teachers: under {self.objective.name} teachers mark nothing; take them out"
                    )
                if teacher not in self.teachers:
                    known = ", ".join(self.teachers) or "none"
                    raise ValueError(f"domains.{name}.teachers names {teacher!r}, but the teachers are {known}")
            if self.distils and domain.share > 0 and not domain.teachers:
                raise ValueError(
                    f"domains.{name}.teachers: name at least one, or set share to 0 for a domain that is only evaluated"
                )
        used = {teacher for domain in self.domains.values() for teacher in domain.teachers}
        if self.reference_id is not None:
            if self.reference_id not in self.teachers:
                key = "objective.reference" if self.distils else "objective.kl.reference"
                raise ValueError(
                    f"{key} names {self.reference_id!r}, but the teachers are {', '.join(self.teachers) or 'none'}"
                )
            used.add(self.reference_id)
        idle = sorted(set(self.teachers) - used)
        if idle:
            raise ValueError(f"teachers {', '.join(idle)} mark no domain; route one to them or take them out")
        return self
