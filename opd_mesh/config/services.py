"""Configuration of the servers and of what calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

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


class TeacherConfig(Strict):
    """One frozen teacher."""

    path: Path
    # PEFT adapter folder, merged on load.
    adapter: Path | None = None
    domains: list[str] = Field(default_factory=list)
    engine: Literal["transformers"] = "transformers"
    dtype: ComputeDType = "float32"
    # SHA-256 of the weights; loading others is refused.
    expected_digest: str | None = None
    max_tokens_per_item: int = Field(4096, ge=2)


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
    deterministic: bool = False
    # Threads of the engine; 0: as torch chooses.
    threads: int = Field(0, ge=0)
    server: ServerConfig = ServerConfig()


class RolloutEngineConfig(Strict):
    """The decode loop."""

    dtype: ComputeDType = "float32"
    device: Device = "auto"
    max_slots: int = Field(32, ge=1)
    max_waiting: int = Field(1024, ge=1)
    max_context_tokens: int = Field(4096, ge=2)
    prefill_token_budget: int = Field(2048, ge=1)
    # Finished requests stay readable, so that a client can attach again.
    finished_kept: int = Field(4096, ge=1)
    threads: int = Field(0, ge=0)


class RolloutServerConfig(Strict):
    """``opd serve rollout``."""

    # The student's checkpoint: architecture and tokenizer. Weights are served only once a policy has been given.
    model: Path
    engine: RolloutEngineConfig = RolloutEngineConfig()
    # Unset: the variable OPD_REDIS_URL.
    redis_url: str | None = None
    stream_timeout_s: float = Field(10.0, gt=0)
    deterministic: bool = False
    server: ServerConfig = ServerConfig()


class GrmServerConfig(Strict):
    """``opd serve grm``: the generative reward model, whose calls answer UNIMPLEMENTED in this release."""

    server: ServerConfig = ServerConfig()


class PeerConfig(Strict):
    """Servers that exist already, by address; empty: ``opd run`` starts one."""

    addresses: list[str] = Field(default_factory=list)
    channel: ChannelConfig = ChannelConfig()

    @model_validator(mode="after")
    def _addresses_have_ports(self) -> PeerConfig:
        require_addresses(self.addresses)
        return self
