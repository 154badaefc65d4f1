"""k8s/base and the images: what is applied is valid, and says of ports, names and times what the servers' code says.

The build is done by a small renderer of the features of kustomize that the base uses, and compared with kubectl's own
where kubectl is installed.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import kubernetes_validate
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opd.v1 import (
    generative_reward_service_pb2,
    rollout_service_pb2,
    teacher_service_pb2,
    trainer_service_pb2,
)
from pydantic import BaseModel, ByteSize, TypeAdapter

from opd_mesh import process
from opd_mesh.config.base import load_config
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.services import GrmServerConfig, RolloutServerConfig, ServerConfig, TeacherServerConfig
from opd_mesh.process import ServiceArguments, parse_arguments
from opd_mesh.rpc.address import require_secure, split_address
from opd_mesh.rpc.server import MeshServer
from student_trainer.__main__ import EXTRA as TRAINER_FLAGS

ROOT = Path(__file__).parents[2]
BASE, IMAGES = ROOT / "k8s" / "base", ROOT / "k8s" / "images"
KUBERNETES = "1.37"
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
# Besides what the configuration names: the forward pass or the update in progress, and the process's own end.
DRAIN_SLACK_S = 10
Object = dict[str, Any]


@dataclass(frozen=True)
class Service:
    """What the code says of a service that the manifests must agree with."""

    module: str
    main: str  # the file with SERVICE and serve()
    config: type[BaseModel]
    descriptor: Any
    flags: dict[str, dict[str, Any]]


SERVICES = {
    "teacher": Service("teacher_server", "server.py", TeacherServerConfig, teacher_service_pb2, {}),
    "rollout": Service("rollout_server", "server.py", RolloutServerConfig, rollout_service_pb2, {}),
    "grm": Service("grm_server", "server.py", GrmServerConfig, generative_reward_service_pb2, {}),
    "trainer": Service("student_trainer", "server.py", Recipe, trainer_service_pb2, TRAINER_FLAGS),
}
each_service = pytest.mark.parametrize("name", SERVICES)


# --- the build -------------------------------------------------------------------------------------------------------
def content_hash(data: dict[str, str]) -> str:
    """The suffix that kustomize gives to a generated ConfigMap. It hashes an empty name."""
    text = json.dumps({"data": data, "kind": "ConfigMap", "name": ""}, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&":  # as Go writes JSON
        text = text.replace(character, f"\\u{ord(character):04x}")
    return hashlib.sha256(text.encode()).hexdigest()[:10].translate(str.maketrans("013ae", "ghkmt"))


def render(folder: Path) -> list[Object]:
    """What `kubectl kustomize` builds of ``folder``, for the features that the base uses; refuses others."""
    spec = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "namespace", "resources", "labels", "images", "configMapGenerator"}
    assert spec.keys() <= known, f"the renderer does not know {spec.keys() - known}: teach it, and compare with kubectl"
    objects: list[Object] = []
    for resource in spec["resources"]:
        path = folder / resource
        objects += render(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for generator in spec.get("configMapGenerator", []):
        data = {file: (folder / file).read_text() for file in generator["files"]}
        unique = f"{generator['name']}-{content_hash(data)}"
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": unique}, "data": data})
        for volume in (volume for one in objects for volume in pod_spec(one).get("volumes", [])):
            if volume.get("configMap", {}).get("name") == generator["name"]:
                volume["configMap"]["name"] = unique
    for labels in spec.get("labels", []):
        assert labels.keys() == {"pairs", "includeTemplates"}
        assert labels["includeTemplates"]
        for one in objects:
            one["metadata"].setdefault("labels", {}).update(labels["pairs"])
            if pod_spec(one):
                one["spec"]["template"]["metadata"]["labels"].update(labels["pairs"])
    for image in spec.get("images", []):
        for container in (container for one in objects for container in pod_spec(one).get("containers", [])):
            if container["image"] == image["name"]:
                container["image"] = f"{image['name']}:{image['newTag']}"
    if "namespace" in spec:
        for one in objects:
            key = "name" if one["kind"] == "Namespace" else "namespace"
            one["metadata"][key] = spec["namespace"]
    return objects


def pod_spec(one: Object) -> Object:
    """Of a Deployment; empty for what has no pods."""
    return one.get("spec", {}).get("template", {}).get("spec", {})


@cache
def built() -> list[Object]:
    return render(BASE)


def get(kind: str, name: str) -> Object:
    (one,) = [one for one in built() if one["kind"] == kind and one["metadata"]["name"] == name]
    return one


def container(name: str) -> Object:
    (one,) = pod_spec(get("Deployment", name))["containers"]
    return one


def mounted_config(name: str) -> Path:
    """The file in the repository that the service's container finds under the path of its --config."""
    volumes = {volume["name"]: volume for volume in pod_spec(get("Deployment", name))["volumes"]}
    (flag,) = [flag for flag in container(name)["args"] if flag.startswith("--config=")]
    inside = Path(flag.removeprefix("--config="))
    (mount,) = [mount for mount in container(name)["volumeMounts"] if mount["mountPath"] == str(inside.parent)]
    config_map = get("ConfigMap", volumes[mount["name"]]["configMap"]["name"])
    file = BASE / name / inside.name
    assert config_map["data"][inside.name] == file.read_text()
    return file


@cache
def config_of(name: str) -> Any:
    return load_config(SERVICES[name].config, mounted_config(name))


def server_config(name: str) -> ServerConfig:
    config = config_of(name)
    return config.trainer.server if name == "trainer" else config.server


def port_of(name: str) -> int:
    (port,) = container(name)["ports"]
    return port["containerPort"]


def code_of(name: str) -> ast.Module:
    """Of the file that serves; read and not imported, for torch takes seconds."""
    return ast.parse((ROOT / SERVICES[name].module / SERVICES[name].main).read_text())


def constant(name: str, constant_name: str) -> Any:
    """A module-level constant of the file that serves."""
    for node in code_of(name).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == constant_name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{SERVICES[name].main} has no {constant_name}")


def num_bytes(quantity: str) -> int:
    """A Kubernetes quantity such as 16Gi."""
    return TypeAdapter(ByteSize).validate_python(quantity + "B" if quantity.endswith("i") else quantity)


def num_cores(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def mount_of(name: str, path: Path | str) -> Object:
    """The innermost volume mount that holds ``path``."""
    mounts = [mount for mount in container(name)["volumeMounts"] if Path(path).is_relative_to(mount["mountPath"])]
    assert mounts, f"{name}: {path} lies on no volume, and the root file system is read-only"
    return max(mounts, key=lambda mount: len(mount["mountPath"]))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_builds_the_same() -> None:
    text = subprocess.run(["kubectl", "kustomize", BASE], check=True, capture_output=True, text=True).stdout

    def by_name(objects: list[Object]) -> dict[tuple[str, str], Object]:
        return {(one["kind"], one["metadata"]["name"]): one for one in objects}

    assert by_name(list(yaml.safe_load_all(text))) == by_name(built())


def test_every_object_validates_strictly() -> None:
    for one in built():
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    assert {one["kind"] for one in built()} == {
        "ConfigMap", "Deployment", "Namespace", "NetworkPolicy", "PersistentVolumeClaim", "PodDisruptionBudget",
        "Service",
    }  # fmt: skip


def test_a_misspelt_key_is_not_valid() -> None:
    broken = copy.deepcopy(get("Deployment", "teacher"))
    broken["spec"]["template"]["spec"]["terminationGracePeriod"] = 30
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


# --- what the servers say --------------------------------------------------------------------------------------------
def arguments_of(name: str, monkeypatch: pytest.MonkeyPatch) -> ServiceArguments[Any]:
    """What the server makes of the container's arguments; exits where it would."""
    container_config = next(flag for flag in container(name)["args"] if flag.startswith("--config="))
    argv = [
        f"--config={mounted_config(name)}" if flag == container_config else flag for flag in container(name)["args"]
    ]
    monkeypatch.setattr("sys.argv", [name, *argv])
    monkeypatch.setattr(process, "configure_telemetry", lambda _: None)
    monkeypatch.setattr(process.logging, "basicConfig", lambda **_: None)
    return parse_arguments(name, SERVICES[name].config, extra=SERVICES[name].flags)


@each_service
def test_the_server_takes_its_arguments_and_listens_where_probes_and_peers_ask(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = arguments_of(name, monkeypatch)
    host, port = split_address(arguments.listen)
    require_secure(arguments.listen, tls=server_config(name).tls is not None, insecure=arguments.insecure)
    assert host == "0.0.0.0"
    assert port == port_of(name)
    assert "command" not in container(name)  # the image's entry point is the server
    for probe in PROBES:
        how = container(name)[probe]
        assert how.get("grpc", {}).get("port", port) == port
        assert how.get("tcpSocket", {"port": "grpc"}) == {"port": "grpc"}
        assert ("grpc" in how) != ("tcpSocket" in how)
    (named,) = container(name)["ports"]
    assert named["name"] == "grpc"
    service = get("Service", name)["spec"]
    # The name of a headless Service resolves to pods: clients dial the container's port, whatever the Service says.
    assert service["clusterIP"] == "None"
    (service_port,) = service["ports"]
    assert service_port == {"name": "grpc", "protocol": "TCP", "port": port, "targetPort": "grpc"}


@each_service
async def test_probes_ask_for_a_service_that_health_knows(name: str) -> None:
    server = MeshServer(server_config(name), services=[constant(name, "SERVICE")])
    address = await server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        asked = {
            container(name)[probe]["grpc"].get("service", "") for probe in PROBES if "grpc" in container(name)[probe]
        }
        assert asked == {next(iter(SERVICES[name].descriptor.DESCRIPTOR.services_by_name.values())).full_name}
        for serving in (False, True):
            await server.set_serving(serving)
            for service in asked:
                answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
                expected = "SERVING" if serving else "NOT_SERVING"
                assert health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == expected
    await server.grpc.stop(None)


@each_service
def test_only_readiness_waits_for_what_others_must_do(name: str) -> None:
    """A gRPC probe takes NOT_SERVING for a failure: startup and liveness may use it only where serve() itself says
    SERVING, and not where a peer must first do something, or nobody ever does."""
    serves_by_itself = any(
        isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") == "set_serving"
        and ast.unparse(node.args[0]) == "True"
        for node in ast.walk(code_of(name))
    )
    assert "grpc" in container(name)["readinessProbe"]
    for probe in ("startupProbe", "livenessProbe"):
        assert ("grpc" in container(name)[probe]) == serves_by_itself
    # The rollout server becomes ready by what the trainer sends it, so the trainer must find it before.
    assert get("Service", name)["spec"]["publishNotReadyAddresses"] == (name == "rollout")


@each_service
def test_a_pod_may_drain_to_the_end(name: str) -> None:
    server, config = server_config(name), config_of(name)
    drain_s = server.drain_propagation_s + server.drain_grace_s + DRAIN_SLACK_S
    if name == "rollout":
        drain_s += config.stream_timeout_s  # finished responses are still published
    if name == "trainer":
        drain_s += constant(name, "STEP_GRACE_S") + 120  # update, checkpoint, student, report
    assert pod_spec(get("Deployment", name))["terminationGracePeriodSeconds"] > drain_s
    # Longer than a readiness probe needs to notice, where clients choose among replicas.
    ready = container(name)["readinessProbe"]
    if get("Deployment", name)["spec"]["replicas"] > 1:
        assert server.drain_propagation_s >= ready["periodSeconds"] >= 3


@each_service
def test_a_slow_start_is_not_a_failed_one(name: str) -> None:
    deployment = get("Deployment", name)["spec"]
    startup = container(name)["startupProbe"]
    allowed_s = startup["periodSeconds"] * startup["failureThreshold"]
    assert allowed_s < deployment.get("progressDeadlineSeconds", 600)
    if name in ("teacher", "trainer"):  # those whose weights must be loaded first
        assert allowed_s >= 600
    if name == "teacher":
        assert config_of("trainer").teacher_channel.channel.connect_timeout_s >= allowed_s


# --- what the parts say of each other --------------------------------------------------------------------------------
def test_the_recipe_names_servers_that_are_there() -> None:
    recipe = config_of("trainer")
    teachers = config_of("teacher")
    for teacher_id, teacher in recipe.teachers.items():
        assert teacher.addresses == [f"teacher:{port_of('teacher')}"]
        assert teachers.teachers[teacher_id].max_tokens_per_item >= recipe.rollout.engine.max_context_tokens
    assert recipe.rollout.peers.addresses == [f"rollout:{port_of('rollout')}"]
    rollout = config_of("rollout")
    assert rollout.model == recipe.student.path
    assert rollout.engine.max_context_tokens == recipe.rollout.engine.max_context_tokens
    # The student judges: its tokenizer here, its policy there.
    grm = config_of("grm")
    assert grm.judge.addresses == recipe.rollout.peers.addresses
    assert grm.model == rollout.model
    assert grm.item_timeout_s > grm.judge.channel.connect_timeout_s


def test_one_rollout_server_and_one_trainer_at_a_time() -> None:
    for name in ("rollout", "trainer"):
        spec = get("Deployment", name)["spec"]
        assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


@pytest.mark.parametrize(("name", "reader"), [("rollout", "server.py"), ("trainer", "rollouts.py")])
def test_redis_comes_by_address_from_a_secret(name: str, reader: str) -> None:
    (variable,) = container(name)["env"]
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "opd-redis", "key": "url"}}
    code = (ROOT / SERVICES[name].module / reader).read_text()
    assert f'.redis_url or os.environ.get("{variable["name"]}")' in code
    assert config_of(name).redis_url is None  # or it would be taken instead


@each_service
def test_selectors_select(name: str) -> None:
    deployment = get("Deployment", name)["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    for selector in (deployment["selector"]["matchLabels"], get("Service", name)["spec"]["selector"]):
        assert selector.items() <= labels
        others = [
            get("Deployment", other)["spec"]["template"]["metadata"]["labels"] for other in SERVICES if other != name
        ]
        assert not any(selector.items() <= other.items() for other in others)
    policy = get("NetworkPolicy", "mesh-only")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels
    (rule,) = policy["ingress"]
    assert rule == {"from": [{"podSelector": policy["podSelector"]}], "ports": [{"protocol": "TCP", "port": "grpc"}]}


@each_service
def test_volumes_and_claims_exist(name: str) -> None:
    volumes = {volume["name"]: volume for volume in pod_spec(get("Deployment", name))["volumes"]}
    assert volumes.keys() == {mount["name"] for mount in container(name)["volumeMounts"]}
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            get("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
        elif "emptyDir" in volume:
            assert num_bytes(volume["emptyDir"]["sizeLimit"]) > 0


def test_what_is_read_is_on_the_weights_and_what_is_written_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    read = [("teacher", teacher.path) for teacher in config_of("teacher").teachers.values()]
    read += [("rollout", config_of("rollout").model), ("trainer", config_of("trainer").student.path)]
    read += [("grm", config_of("grm").model)]
    for name, path in read:
        mount = mount_of(name, path)
        assert mount == {"name": "weights", "mountPath": "/weights", "readOnly": True}
        (volume,) = [volume for volume in pod_spec(get("Deployment", name))["volumes"] if volume["name"] == "weights"]
        assert volume["persistentVolumeClaim"] == {"claimName": "weights", "readOnly": True}
    assert get("PersistentVolumeClaim", "weights")["spec"]["accessModes"] == ["ReadOnlyMany"]
    run_dir = arguments_of("trainer", monkeypatch).extra["run_dir"]
    for name, path in [("teacher", config_of("teacher").pool.cache_dir), ("trainer", run_dir)]:
        assert not mount_of(name, path).get("readOnly", False)
    for name in SERVICES:
        assert not mount_of(name, "/tmp").get("readOnly", False)


def test_a_restarted_trainer_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments_of("trainer", monkeypatch).extra["resume"] is True
    volumes = {volume["name"]: volume for volume in pod_spec(get("Deployment", "trainer"))["volumes"]}
    assert "persistentVolumeClaim" in volumes[mount_of("trainer", "/runs/opd")["name"]]


def test_the_teacher_pool_survives_nodes_and_updates() -> None:
    spec = get("Deployment", "teacher")["spec"]
    budget = get("PodDisruptionBudget", "teacher")["spec"]
    assert spec["replicas"] == 2
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert budget["minAvailable"] == 1  # fewer than replicas, or no node could be drained
    (spread,) = pod_spec(get("Deployment", "teacher"))["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert budget["selector"] == spread["labelSelector"] == spec["selector"]


def test_the_teacher_pool_fits_its_container() -> None:
    limits = container("teacher")["resources"]["limits"]
    # A quarter at least for activations, answers on their way and the process.
    assert config_of("teacher").pool.memory_bytes <= 0.75 * num_bytes(limits["memory"])
    volumes = pod_spec(get("Deployment", "teacher"))["volumes"]
    written = sum(num_bytes(volume["emptyDir"]["sizeLimit"]) for volume in volumes if "emptyDir" in volume)
    assert written < num_bytes(limits["ephemeral-storage"])


@each_service
def test_resources_are_stated_and_threads_fit_them(name: str) -> None:
    resources = container(name)["resources"]
    for which in ("requests", "limits"):
        assert {"cpu", "memory"} <= resources[which].keys()
    assert num_bytes(resources["requests"]["memory"]) <= num_bytes(resources["limits"]["memory"])
    config = config_of(name)
    threads = {"teacher": "threads", "rollout": "engine.threads", "trainer": "run.threads"}.get(name)
    if threads is not None:
        for part in threads.split("."):
            config = getattr(config, part)
        assert 1 <= config <= num_cores(resources["limits"]["cpu"])


# --- security and images ---------------------------------------------------------------------------------------------
@each_service
def test_pods_meet_the_restricted_standard(name: str) -> None:
    pod = pod_spec(get("Deployment", name))
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == security["runAsGroup"] == 65532
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["shareProcessNamespace"] is True  # or SIGTERM would do nothing while a model is being loaded
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    namespace = get("Namespace", "opd-mesh")["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"


@each_service
def test_the_image_starts_the_server_as_that_user(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    text = (IMAGES / f"{name}.Containerfile").read_text()
    lines = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert container(name)["image"] == f"opd-mesh/{name}:{project['project']['version']}"
    assert container(name)["image"] in text

    def last(instruction: str) -> str:
        return [rest for word, rest in lines if word == instruction][-1]

    security = pod_spec(get("Deployment", name))["securityContext"]
    assert last("USER") == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert f"--uid {security['runAsUser']} " in text
    python, flag, module = json.loads(last("ENTRYPOINT"))
    assert (python, flag, module) == ("python", "-m", SERVICES[name].module)
    assert importlib.util.find_spec(f"{module}.__main__") is not None
    extra = re.search(r'pip install [^"]*"/src(?:\[([a-z-]+)\])?"', text)
    assert extra is not None
    roles = project["project"]["optional-dependencies"]
    assert extra[1] == (name if name in roles else None)
    copied = {
        Path(rest.split()[-2]) for word, rest in lines if word == "COPY" and rest.endswith(f"/src/{rest.split()[0]}")
    }
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert any(Path(package).is_relative_to(folder) for folder in copied), f"{package} is not copied"
    sources = [
        source for word, rest in lines if word == "COPY" and "--from" not in rest for source in rest.split()[:-1]
    ]
    assert all((ROOT / source).exists() for source in sources)
    assert {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]} <= set(sources)
    assert all(rest.startswith("python:3.11-slim") for word, rest in lines if word == "FROM")
