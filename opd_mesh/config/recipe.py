"""The recipe of a run: one student, its teachers, the domains that route between them, and how to train."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field, model_validator

from opd_mesh.config.base import Strict
from opd_mesh.config.domains import DomainConfig
from opd_mesh.config.services import (
    ComputeDType,
    Device,
    ModelSource,
    PeerConfig,
    PoolConfig,
    RolloutEngineConfig,
    ServerConfig,
    TeacherConfig,
    TokenLogConfig,
    require_addresses,
)
from opd_mesh.config.training import (
    AdamWConfig,
    ExOpdConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReverseKlConfig,
)


class RunConfig(Strict):
    """Name, length and manner of the run."""

    name: str = Field("opd", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = Field(ge=1)
    # Same seed, same bits: fixed batch composition, one sequence at a time, fixed thread count. Slower.
    deterministic: bool = False
    device: Device = "auto"
    # Threads of the trainer; 0: as torch chooses (1 in deterministic mode unless set).
    threads: int = Field(0, ge=0)


class LoraConfig(Strict):
    """Train a PEFT LoRA adapter instead of all weights."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    # No dropout: the student that writes must be the student that learns.
    target_modules: str | list[str] = "all-linear"


class StudentConfig(Strict):
    """The model that learns."""

    path: Path
    dtype: ComputeDType = "float32"
    lora: LoraConfig | None = None
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _trained_weights_are_float32(self) -> StudentConfig:
        # At the learning rates of distillation an update is less than half a unit in a bfloat16 weight's last place.
        if self.dtype != "float32" and self.lora is None:
            raise ValueError(
                f"dtype: weights trained in {self.dtype} would not move; train in float32, or give lora "
                "(its adapter stays in float32 above a base of any dtype)"
            )
        return self


class TeacherRef(TeacherConfig):
    """A teacher, and the servers that have it; without addresses ``opd run`` serves it from ``path``."""

    path: ModelSource | None = None  # type: ignore[assignment]
    addresses: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _path_or_addresses(self) -> TeacherRef:
        if self.path is None and not self.addresses:
            raise ValueError("give `path` (a checkpoint folder) or `addresses` (servers that have this teacher)")
        require_addresses(self.addresses)
        return self


class RolloutConfig(Strict):
    """How the student writes."""

    temperature: float = Field(1.0, gt=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_new_tokens: int = Field(256, ge=1)
    # Added to the tokenizer's EOS.
    stop_token_ids: list[int] = Field(default_factory=list)
    peers: PeerConfig = PeerConfig()
    engine: RolloutEngineConfig = RolloutEngineConfig()
    # Of the server that `opd run` starts, so not together with `peers.addresses`; unset: in the run's folder, with
    # TokenLogConfig's defaults.
    log: TokenLogConfig | None = None
    # A response that takes longer ends the run (after a checkpoint). It counts from the request; with max_staleness k
    # that may queue behind those of k earlier steps, and has k + 1 times as long.
    timeout_s: float = Field(600.0, gt=0)


class BatchConfig(Strict):
    """The mini-batch of one optimizer step."""

    prompts_per_step: int = Field(8, ge=1)
    responses_per_prompt: int = Field(1, ge=1)
    # Tokens (prompt and response) in one forward and backward pass; gradients accumulate over the passes.
    tokens_per_pass: int = Field(4096, ge=1)
    # Teachers' heads that may be on the device together, besides the reference's. Above 1, a sample's several teachers
    # share one projection of the student; in deterministic mode they do not, so that the bits stay the same.
    heads_resident: int = Field(1, ge=1)
    # Of teachers' answers that wait in the trainer's memory, for instance "8GiB". Beyond it, asking waits until the
    # update has used some up, or answers go to RUN_DIR/spill.
    marks_memory_bytes: ByteSize = Field(ByteSize(2 << 30), ge=1)
    marks_spill: bool = False
    # Trajectories from outside taken into one step, at most.
    max_external_per_step: int = Field(64, ge=0)


class EvaluationConfig(Strict):
    """Held-out reverse KL on fixed responses: a set from the first student, and one from each domain's teacher."""

    prompts_per_domain: int = Field(8, ge=0)
    # Also after so many steps; 0: only before the first step and after the last.
    every_steps: int = Field(0, ge=0)
    teacher_responses: bool = True


class CheckpointConfig(Strict):
    """Durable states of the run."""

    every_steps: int = Field(50, ge=1)
    keep: int = Field(2, ge=1)


class TrainerServiceConfig(Strict):
    """The trainer's own gRPC server."""

    server: ServerConfig = ServerConfig()


class Recipe(Strict):
    """``opd run RECIPE``. Paths are relative to the working directory."""

    run: RunConfig
    student: StudentConfig
    teachers: dict[str, TeacherRef] = Field(min_length=1)
    domains: dict[str, DomainConfig] = Field(min_length=1)
    # Of the teacher server that `opd run` starts for teachers without addresses.
    pool: PoolConfig = PoolConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ReverseKlConfig()
    optimizer: OptimizerConfig = AdamWConfig()
    batch: BatchConfig = BatchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
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
    def reference_id(self) -> str | None:
        """The teacher that is the objective's reference model, where it has one."""
        return self.objective.reference if isinstance(self.objective, ExOpdConfig) else None

    @model_validator(mode="after")
    def _staleness_fits(self) -> Recipe:
        if self.run.deterministic and self.max_staleness:
            raise ValueError(
                "run.deterministic: with max_staleness above 0 it depends on timing which policy writes a token; set "
                "max_staleness to 0, or leave deterministic out"
            )
        if self.objective.importance is not None and (self.rollout.top_p < 1 or self.rollout.top_k):
            raise ValueError(
                "objective.importance: with rollout.top_p below 1 or rollout.top_k a token may be drawn that the "
                "present student would cut off, or the other way round, and has no ratio; set top_p to 1 and top_k to "
                "0, or leave importance out"
            )
        return self

    @model_validator(mode="after")
    def _routing_is_closed(self) -> Recipe:
        for name, domain in self.domains.items():
            for teacher in domain.teachers:
                if teacher not in self.teachers:
                    raise ValueError(
                        f"domains.{name}.teachers names {teacher!r}, but the teachers are {', '.join(self.teachers)}"
                    )
        used = {teacher for domain in self.domains.values() for teacher in domain.teachers}
        if self.reference_id is not None:
            if self.reference_id not in self.teachers:
                raise ValueError(
                    f"objective.reference names {self.reference_id!r}, but the teachers are {', '.join(self.teachers)}"
                )
            used.add(self.reference_id)
        idle = sorted(set(self.teachers) - used)
        if idle:
            raise ValueError(f"teachers {', '.join(idle)} mark no domain; route one to them or take them out")
        return self
