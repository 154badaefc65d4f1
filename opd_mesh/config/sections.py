"""The sections of a recipe, but for domains, judging, objectives and optimizers, which have modules of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field, model_validator

from opd_mesh.config.base import Strict
from opd_mesh.config.services import (
    ComputeDType,
    Device,
    ModelSource,
    PeerConfig,
    RolloutEngineConfig,
    ServerConfig,
    TeacherConfig,
    TokenLogConfig,
    require_addresses,
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
    # Below 1, or above 0, they cut ids off. For a policy gradient the ids that are left travel with every token, and
    # the present policy is normalized over them, too; top_k bounds how many they are, so it is needed there.
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

    @property
    def truncates(self) -> bool:
        """Unlikely ids are cut off."""
        return self.top_p < 1 or self.top_k > 0


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


class AccuracyConfig(Strict):
    """Answers to held-out prompts, graded by the domains' verifiers."""

    prompts_per_domain: int = Field(100, ge=1)
    split: Literal["validation", "test"] = "validation"
    # 0: greedy.
    temperature: float = Field(0.0, ge=0, le=100)


class EvaluationConfig(Strict):
    """Held-out reverse KL on fixed responses (a set from the first student, and one from each domain's teacher), and
    the accuracy of fresh ones.
    """

    prompts_per_domain: int = Field(8, ge=0)
    # Of every domain that has a verifier; unset: not measured.
    accuracy: AccuracyConfig | None = None
    # Also after so many steps; 0: only before the first step and after the last.
    every_steps: int = Field(0, ge=0)
    teacher_responses: bool = True


class DiagnosticsConfig(Strict):
    """When the known signs of failure are told, with what helps: see ``student_trainer.diagnostics``."""

    # Steps that a mean is taken over; nothing is told before two of them, for at first nothing moves yet.
    window_steps: int = Field(25, ge=1)
    # Overlap of the likeliest tokens below this, that rose by less than `flat_overlap` from one window to the next,
    # while the KL to that teacher stays above `high_kl` (nats a token) and falls by less than the share `flat_kl`.
    low_overlap: float = Field(0.65, ge=0, le=1)
    flat_overlap: float = Field(0.02, ge=0, le=1)
    high_kl: float = Field(0.5, ge=0, allow_inf_nan=False)
    flat_kl: float = Field(0.1, ge=0, le=1)
    # The student's entropy below this share of what it was at first.
    collapsed_entropy: float = Field(0.1, ge=0, lt=1)
    # Responses longer than at first by this factor.
    exploded_length: float = Field(2.0, gt=1, allow_inf_nan=False)


class CheckpointConfig(Strict):
    """Durable states of the run."""

    every_steps: int = Field(50, ge=1)
    keep: int = Field(2, ge=1)


class TrainerServiceConfig(Strict):
    """The trainer's own gRPC server."""

    server: ServerConfig = ServerConfig()
