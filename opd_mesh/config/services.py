"""Configuration of the servers and of what calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, ByteSize, Field, model_validator

from opd_mesh.config.base import Strict
from opd_mesh.errors import ConfigError
from opd_mesh.rpc.address import split_address


def require_addresses(addresses: list[str]) -> None:
    """Raises :class:`ValueError`, as a pydantic validator should, for what is not host:port."""
    for address in addresses:
        try:
            split_address(address)
        except ConfigError as error:
            raise ValueError(f"{address!r} is not host:port") from error


def _path_or_url(value: Any) -> Any:
    return value if not isinstance(value, str) or "://" in value else Path(value)


# A local folder, or the URL of one in a store that fsspec reads (``s3://bucket/teachers/math``).
ModelSource: TypeAlias = Annotated[Path | str, BeforeValidator(_path_or_url)]
ComputeDType = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


class TlsConfig(Strict):
    """PEM files. With ``client_ca_file`` a server asks every client for a certificate (mutual TLS)."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None


class ClientTlsConfig(Strict):
    """PEM files for a channel: the CA that signed the server, and our own certificate for mutual TLS."""

    ca_file: Path
    cert_file: Path | None = None
    key_file: Path | None = None
    # Where the certificate bears another name than the address.
    server_name: str | None = None

    @model_validator(mode="after")
    def _certificate_and_key(self) -> ClientTlsConfig:
        if (self.cert_file is None) != (self.key_file is None):  # gRPC's core would abort the process
            raise ValueError("cert_file and key_file go together: give both for mutual TLS, or neither")
        return self


class ServerConfig(Strict):
    """Limits and manners of one gRPC server."""

    tls: TlsConfig | None = None
    max_message_bytes: int = Field(8 << 20, ge=1 << 20, le=64 << 20)
    max_concurrent_rpcs: int = Field(256, ge=1)
    # After NOT_SERVING, before the port closes: time for load balancers to notice.
    drain_propagation_s: float = Field(0.2, ge=0)
    # For calls in flight, after that.
    drain_grace_s: float = Field(20.0, ge=0)
    # A stream without traffic for so long is ended.
    stream_idle_timeout_s: float = Field(600.0, gt=0)


class ChannelConfig(Strict):
    """How a client reaches a server."""

    tls: ClientTlsConfig | None = None
    # Unary calls.
    timeout_s: float = Field(30.0, gt=0)
    # How long to wait for a server to come up or come back before giving up.
    connect_timeout_s: float = Field(60.0, gt=0)
    max_message_bytes: int = Field(8 << 20, ge=1 << 20, le=64 << 20)
    # gRPC wants at least a minute, or the server must allow less.
    keepalive_s: float = Field(60.0, ge=10)
    max_attempts: int = Field(4, ge=1, le=5)

    # --- a teacher's replicas: see docs/replicas.md. With one address there is nothing to choose, and none of it holds.
    # "rendezvous" keeps a teacher's items together, "round_robin" spreads them; "auto": rendezvous where a replica
    # lists several teachers.
    balance: Literal["auto", "round_robin", "rendezvous"] = "auto"
    # Items in flight at one replica, or as many as it grants if that is fewer; the others wait for whoever is free.
    max_in_flight: int = Field(64, ge=1)
    # Rendezvous: with so many in flight at its first choice a teacher's items go to the next.
    spill_in_flight: int = Field(32, ge=1)
    # An item must be answered within item_timeout_s, and item_timeout_per_token_s for each token (prompt and response)
    # that we have in flight at the replica, itself included; else it is asked of another. The first is for a pool that
    # loads the teacher from disk, the second for the slowest CPU that is worth waiting for (20 tokens a second).
    item_timeout_s: float = Field(60.0, gt=0)
    item_timeout_per_token_s: float = Field(0.05, ge=0)
    # A health check so often, which must be answered in the given time: what notices a frozen process.
    health_interval_s: float = Field(1.0, gt=0)
    health_timeout_s: float = Field(3.0, gt=0)
    # Failures in a row that open a replica's circuit (a missed deadline or a lost connection does at once), how long
    # until the first trial, and what doubling that after each failed trial stops at.
    circuit_failures: int = Field(3, ge=1)
    circuit_cool_down_s: float = Field(1.0, gt=0)
    circuit_max_cool_down_s: float = Field(30.0, gt=0)
    # Host names are resolved again so often, and after a failure: every address record is a replica.
    resolve_interval_s: float = Field(30.0, gt=0)


class TensorRtConfig(Strict):
    """What ``engine: tensorrt_llm`` needs to know beyond the teacher: see docs/engines.md."""

    # GPUs that share the weights.
    tensor_parallel_size: int = Field(1, ge=1)
    # Tokens in one forward pass; longer items go alone. Their logits are on the device, 4 bytes × vocabulary a token.
    max_batch_tokens: int = Field(8192, ge=1)
    # Of the memory that the weights leave free, for the KV cache, which takes no more than a batch needs.
    free_gpu_memory_fraction: float = Field(0.9, gt=0, lt=1)
    # Wrap TensorRT-LLM's model so that it returns them. Tried only on one GPU, where the model lives in our process.
    hidden_states: bool = False

    @model_validator(mode="after")
    def _hidden_states_on_one_gpu(self) -> TensorRtConfig:
        if self.hidden_states and self.tensor_parallel_size > 1:
            raise ValueError("hidden_states needs tensor_parallel_size: 1; with more GPUs logits are the signal")
        return self


class TeacherConfig(Strict):
    """One frozen teacher."""

    path: ModelSource
    # PEFT adapter folder. LoRA adapters that leave head and embeddings alone share their base in memory; others are
    # merged into a copy of it.
    adapter: ModelSource | None = None
    domains: list[str] = Field(default_factory=list)
    engine: Literal["transformers", "tensorrt_llm"] = "transformers"
    dtype: ComputeDType = "float32"
    # SHA-256 of the weights; loading others is refused.
    expected_digest: str | None = None
    max_tokens_per_item: int = Field(4096, ge=2)
    tensorrt_llm: TensorRtConfig = TensorRtConfig()


class PoolConfig(Strict):
    """Which teachers' weights are in memory, and whose turn it is."""

    # Of weights in memory (of the device, where there is one), for instance "40GiB"; unset: all stay. Activations and
    # answers come on top. Room for two teachers lets the next one load while the present one computes.
    memory_bytes: ByteSize | None = Field(None, ge=1)
    # For weights from a URL, and for those that must be converted before they can be mapped (cast, merged). It may be
    # shared by servers of one machine. Unset: opd_mesh in XDG_CACHE_HOME.
    cache_dir: Path | None = None
    # Load the next teacher's weights while the present one computes.
    prefetch: bool = True
    # "teacher": items of one teacher are computed together, whoever came first; "arrival": first come, first served.
    order: Literal["teacher", "arrival"] = "teacher"
    # A teacher's turn, in tokens, while others wait.
    turn_tokens: int = Field(16384, ge=1)


class TeacherServerConfig(Strict):
    """``opd serve teacher``."""

    teachers: dict[str, TeacherConfig] = Field(min_length=1)
    device: Device = "auto"
    # Tokens (prompt and response) in one forward pass; longer items go alone.
    batch_tokens: int = Field(2048, ge=1)
    max_items_in_flight: int = Field(64, ge=1)
    # Items waiting for the engine, over all streams.
    max_queue_items: int = Field(1024, ge=1)
    # Of answers computed and not yet taken by their reader, per stream: full logits of a large vocabulary are big.
    max_unsent_bytes: int = Field(256 << 20, ge=1 << 20)
    default_item_timeout_s: float = Field(300.0, gt=0)
    max_top_k: int = Field(256, ge=1)
    pool: PoolConfig = PoolConfig()
    deterministic: bool = False
    # Threads of the engine; 0: as torch chooses.
    threads: int = Field(0, ge=0)
    server: ServerConfig = ServerConfig()


class VllmConfig(Strict):
    """What ``engine: vllm`` needs to know beyond the decode loop's settings: see docs/engines.md."""

    # GPUs that share the weights.
    tensor_parallel_size: int = Field(1, ge=1)
    # Unset: keys and values take `cache_bytes`. Set: the share of each GPU's memory that vLLM takes for everything, and
    # what is left of it after the weights holds keys and values.
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    # No CUDA graphs: starts sooner, decodes more slowly.
    enforce_eager: bool = False
    # Where a policy is written for vLLM's workers to read: two of them at a time. Unset: /dev/shm where it has the
    # room, else the folder for temporary files.
    weights_dir: Path | None = None
    # To stop what runs, read new weights and go on.
    swap_timeout_s: float = Field(600.0, gt=0)


class RolloutEngineConfig(Strict):
    """The decode loop."""

    engine: Literal["transformers", "vllm"] = "transformers"
    dtype: ComputeDType = "float32"
    device: Device = "auto"
    max_slots: int = Field(32, ge=1)
    max_waiting: int = Field(1024, ge=1)
    max_context_tokens: int = Field(4096, ge=2)
    # Prompt tokens read per step at most, so that requests that decode are not held up: a longer prompt takes several.
    prefill_token_budget: int = Field(2048, ge=1)
    # Memory for keys and values, prompts kept for their siblings included. Requests that do not fit wait.
    cache_bytes: ByteSize = Field(ByteSize(4 << 30), ge=1)
    # Keys and values of before an update are kept, not made anew under the new weights. Inexact: later tokens then
    # come from a mixture that no policy is.
    keep_kv_on_update: bool = False
    # Finished requests stay readable, so that a client can attach again.
    finished_kept: int = Field(4096, ge=1)
    threads: int = Field(0, ge=0)
    vllm: VllmConfig = VllmConfig()


class TokenLogConfig(Strict):
    """The write-ahead log of a rollout server: see docs/token-log.md."""

    # A folder of its own. On a volume that another machine can mount, another server can take the log over.
    path: Path
    # What a token survives before a client sees it. "os": the end of the process. "interval": also that of the machine,
    # but for the newest `sync_interval_s`. "always": all of it.
    durability: Literal["os", "interval", "always"] = "interval"
    sync_interval_s: float = Field(0.2, gt=0)
    # A segment is closed at this size.
    segment_bytes: ByteSize = Field(ByteSize(64 << 20), ge=4096)
    # Compact when more than this is on the disk and less than half of it is of requests that are still known.
    compact_above_bytes: ByteSize = Field(ByteSize(256 << 20), ge=4096)
    # With Redis at hand, ownership is a lease there: another server takes the log over when it has run out.
    lease_s: float = Field(10.0, gt=0)
    # On SIGTERM also save keys and values of unfinished requests, so that they need not be read again.
    save_kv: bool = False


class RolloutServerConfig(Strict):
    """``opd serve rollout``."""

    # The student's checkpoint: architecture and tokenizer. Weights are served only once a policy has been given.
    model: Path
    # The checkpoint's own weights are the policy, from the start and for good: a judge, or whoever else must not learn.
    frozen: bool = False
    engine: RolloutEngineConfig = RolloutEngineConfig()
    # Unset: nothing survives the process.
    log: TokenLogConfig | None = None
    # Unset: the variable OPD_REDIS_URL.
    redis_url: str | None = None
    stream_timeout_s: float = Field(10.0, gt=0)
    deterministic: bool = False
    server: ServerConfig = ServerConfig()


class PeerConfig(Strict):
    """Servers that exist already, by address; empty: ``opd run`` starts one."""

    addresses: list[str] = Field(default_factory=list)
    channel: ChannelConfig = ChannelConfig()

    @model_validator(mode="after")
    def _addresses_have_ports(self) -> PeerConfig:
        require_addresses(self.addresses)
        return self


class JudgeSamplingConfig(Strict):
    """How verdicts are drawn where the item does not say."""

    # 0: greedy, one vote.
    temperature: float = Field(0.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)


class GrmServerConfig(Strict):
    """``opd serve grm``: the generative reward model, see docs/grm.md."""

    # The judge's checkpoint, of which the tokenizer and its chat template are read, and no weights.
    model: Path
    # Rollout servers that hold the policy that judges. An item goes to one of several by its digest.
    judge: PeerConfig = PeerConfig()
    # Folder of YAML rubrics that items may name; unset: rubrics come with the items.
    rubrics: Path | None = None
    # A rubric's template is a program in Jinja's sandbox, which bounds what it reaches and not how long it runs, and
    # all items wait for it: True takes them from requests, of clients that are trusted.
    inline_templates: bool = False
    # Votes for each answer, or pair in each order, where the item does not say.
    samples: int = Field(1, ge=1, le=64)
    sampling: JudgeSamplingConfig = JudgeSamplingConfig()
    seed: int = Field(0, ge=0, lt=1 << 64)
    # Verdicts are decoded under a grammar, so that each parses. Where the judge's engine takes none they are written
    # freely, which GetJudge says.
    constrained: bool = True
    max_verdict_tokens: int = Field(512, ge=1)
    # Longer ones are refused, never cut: the item for its prompt or reference, the one answer for itself.
    max_prompt_chars: int = Field(32768, ge=1)
    max_answer_chars: int = Field(32768, ge=1)
    system_prompt: str | None = None
    # Where the item does not say.
    item_timeout_s: float = Field(600.0, gt=0)
    # Unanswered at once, per stream.
    max_items: int = Field(256, ge=1)
    # Judgements kept in memory; 0: none.
    cache_entries: int = Field(4096, ge=0)
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _votes_differ(self) -> GrmServerConfig:
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"samples: at sampling.temperature 0 all {self.samples} votes are the same: set a temperature above 0, "
                "or samples to 1"
            )
        return self
