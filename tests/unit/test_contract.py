"""The contract: names that clients, manifests and checks rely on, and which package may know which."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.descriptor import ServiceDescriptor
from opd.v1 import generative_reward_service_pb2, rollout_service_pb2, teacher_service_pb2, trainer_service_pb2

from opd_mesh.clients import reward, rollout, scoring_stream, teacher, trainer
from opd_mesh.rpc.channel import IDEMPOTENT, service_config

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("teacher_server", "rollout_server", "grm_server", "student_trainer")

# DESIGN §4: (name, requests are a stream, responses are a stream).
CONTRACT = {
    "opd.v1.TeacherService": {
        ("ListTeachers", False, False),
        ("GetTeacher", False, False),
        ("GetHead", False, True),
        ("ScoreTrajectories", True, True),
    },
    "opd.v1.RolloutService": {
        ("GetPolicy", False, False),
        ("Generate", False, True),
        ("GenerateBatch", True, True),
        ("CancelGeneration", False, False),
        ("UpdatePolicy", True, False),
        ("PauseGeneration", False, False),
        ("ResumeGeneration", False, False),
    },
    "opd.v1.GenerativeRewardService": {
        ("GetJudge", False, False),
        ("Judge", False, False),
        ("JudgeBatch", True, True),
    },
    "opd.v1.TrainerService": {
        ("GetRun", False, False),
        ("WatchRun", False, True),
        ("SubmitTrajectories", True, False),
        ("PauseRun", False, False),
        ("ResumeRun", False, False),
        ("SaveCheckpoint", False, False),
    },
}
CLIENTS: dict[str, tuple[type, ModuleType]] = {
    "opd.v1.TeacherService": (teacher.TeacherClient, teacher),
    "opd.v1.RolloutService": (rollout.RolloutClient, rollout),
    "opd.v1.GenerativeRewardService": (reward.RewardClient, reward),
    "opd.v1.TrainerService": (trainer.TrainerClient, trainer),
}
# A client method bears the name of its RPC in snake case, but for these, where the client's class says the rest.
SHORTER = {
    "GenerateBatch": "generate",
    "JudgeBatch": "judge_many",
    "ScoreTrajectories": "score",
    "CancelGeneration": "cancel",
    "PauseGeneration": "pause",
    "ResumeGeneration": "resume",
}


def descriptors() -> dict[str, ServiceDescriptor]:
    """Every service of the generated modules, by full name."""
    modules = (generative_reward_service_pb2, rollout_service_pb2, teacher_service_pb2, trainer_service_pb2)
    return {service.full_name: service for module in modules for service in module.DESCRIPTOR.services_by_name.values()}


RPCS = [(service, name) for service, rpcs in CONTRACT.items() for name, _, _ in sorted(rpcs)]


def test_services_and_rpcs_are_the_ones_of_the_design() -> None:
    found = {
        name: {(method.name, method.client_streaming, method.server_streaming) for method in service.methods}
        for name, service in descriptors().items()
    }
    assert found == CONTRACT


@pytest.mark.parametrize(("service", "name"), RPCS)
def test_every_rpc_has_a_client_method(service: str, name: str) -> None:
    client, module = CLIENTS[service]
    method = SHORTER.get(name) or re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
    assert callable(getattr(client, method, None)), f"{client.__name__}.{method} for {name}"
    assert getattr(client, method).__doc__, f"{client.__name__}.{method} says nothing of itself"
    # By the stub, or by the method's path where the messages are not read by protobuf.
    sources = "".join(map(inspect.getsource, (module, scoring_stream)))
    called = re.search(rf"stub\.{name}\(", sources) or f'"/{service}/{name}"' in sources
    assert called, f"{module.__name__} never calls {name}"
    assert client.__module__ == module.__name__
    assert service == module.SERVICE


def test_shorter_names_are_of_rpcs_that_exist() -> None:
    assert set(SHORTER) <= {name for _, name in RPCS}


def test_what_may_be_repeated_exists() -> None:
    for service, names in IDEMPOTENT.items():
        assert set(names) <= {name for name, _, _ in CONTRACT[service]}
        assert len(set(names)) == len(names)
        # A request stream cannot be sent again by gRPC.
        assert not {name for name, requests_stream, _ in CONTRACT[service] if requests_stream} & set(names)
    assert IDEMPOTENT.keys() == CONTRACT.keys()


@pytest.mark.parametrize("service", CONTRACT)
def test_only_idempotent_calls_are_retried(service: str) -> None:
    config = json.loads(service_config(service, max_attempts=3))
    (retried,) = config["methodConfig"]
    assert retried["name"] == [{"service": service, "method": name} for name in IDEMPOTENT[service]]
    assert retried["retryPolicy"]["maxAttempts"] == 3
    assert retried["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    assert "methodConfig" not in json.loads(service_config(service, max_attempts=1))


@pytest.mark.parametrize("path", sorted((ROOT / "protos" / "opd" / "v1").glob("*.proto")), ids=lambda path: path.name)
def test_every_rpc_and_service_is_commented_and_rpcs_speak_of_repetition(path: Path) -> None:
    lines = path.read_text().splitlines()
    declared = [index for index, line in enumerate(lines) if re.match(r"\s*(rpc|service) ", line)]
    assert bool(declared) == path.name.endswith("_service.proto")
    for index in declared:
        assert lines[index - 1].strip().startswith("//"), f"{path.name}:{index + 1}: {lines[index].strip()}"


# --- the tree -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("folder", ["protos", "kernels"])
def test_source_roots_are_no_packages(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_folder_of_the_tests_shadows_hugging_faces_kernels() -> None:
    assert not [path for path in (ROOT / "tests").rglob("kernels") if path.is_dir()]


def imported_by(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


FORBIDDEN = {
    "opd_mesh": {*SERVICES},
    "protos": {*SERVICES, "opd_mesh", "opd_kernels"},
    "kernels": {*SERVICES, "opd_mesh", "opd"},
    **{service: {other for other in SERVICES if other != service} for service in SERVICES},
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_dependencies_point_downwards(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(ROOT)): sorted(known)
        for path in files
        if (known := imported_by(path) & FORBIDDEN[package])
    }
    assert wrong == {}


def test_the_scan_sees_imports_inside_functions(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from rollout_server.engine import g\n    import torch.nn as nn\nfrom . import h\n")
    assert imported_by(path) == {"rollout_server", "torch"}


HEAVY = {"torch", "transformers", "safetensors", "peft"}


@pytest.mark.parametrize("module", ["opd_mesh.cli.main", "opd_mesh.config.recipe", "opd_mesh.clients.teacher"])
def test_what_has_to_be_light_reaches_nothing_heavy(module: str) -> None:
    """Follows the imports at the top of our own modules; ``test_imports.py`` asks a fresh interpreter as well."""
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        base = ROOT / name.replace(".", "/")
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if name in seen or not path.exists():
            continue
        seen.add(name)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # the top alone: functions may be heavy
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            assert not {each.partition(".")[0] for each in names} & HEAVY, f"{name} imports {names}"
            waiting += [each for each in names if each.startswith("opd_mesh")]
    assert len(seen) > 1
