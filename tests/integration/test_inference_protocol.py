"""The Open Inference Protocol on a real teacher server: tritonclient as it is, a client that knows reflection alone.

tritonclient brings modules of its own for the same messages, which cannot live in one process with ours: both clients
run in processes of their own and write down what they got.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mesh import QUICK, serving_teachers, teacher_config
from opd.inference import grpc_service_pb2 as pb
from opd.inference import grpc_service_pb2_grpc
from opd.v1 import teacher_service_pb2
from tiny_models import logits_of, save_tiny_checkpoint, tiny_model, tiny_tokenizer

import opd_mesh
from opd_mesh.clients.teacher import ScoreRequest, TeacherClient
from opd_mesh.errors import (
    DeadlineError,
    InvalidInputError,
    NotFoundError,
    OpdError,
    TokenizerMismatchError,
    TooLongError,
    UnavailableError,
    UnknownTeacherError,
)
from opd_mesh.models.tokenizer import TokenizerRoles, tokenizer_fingerprint
from opd_mesh.rpc.server import MeshServer
from opd_mesh.rpc.status import error_of_rpc
from teacher_server.catalogue import Catalogue
from teacher_server.engine import EngineFacts, ScoreJob, Signal
from teacher_server.inference_service import SERVICE, add_inference_service
from teacher_server.scoring_queue import ScoringQueue
from teacher_server.server import open_catalogue

pytestmark = pytest.mark.asyncio(loop_scope="module")

FINGERPRINT = tokenizer_fingerprint(tiny_tokenizer().get_vocab())
IDS = [5, 9, 12, 40, 41, 42, 17, 88, 3, 60]
N, V, WIDTH = len(IDS), 131, 48
# Of a vocabulary of 1024 in float32, 256 rows are a message of 1 MiB.
LONG, LONG_V, MESSAGE_BYTES = 256, 1024, 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A server of one model in float32, the same in bfloat16, and one of a larger vocabulary."""
    root = tmp_path_factory.mktemp("teachers")
    save_tiny_checkpoint(root / "wide", "llama", 0)
    save_tiny_checkpoint(root / "long", "llama", 1, vocab_size=LONG_V)
    config = teacher_config({"wide": root / "wide", "half": root / "wide", "long": root / "long"})
    teachers = {**config.teachers, "half": config.teachers["half"].replace(dtype="bfloat16")}
    server = config.server.replace(max_message_bytes=MESSAGE_BYTES)
    async with serving_teachers(config.replace(teachers=teachers, server=server)) as address:
        yield address


async def run_client(code: str, address: str, folder: Path) -> dict[str, Any]:
    """What a client, in a process of its own, wrote to ``facts.json`` in ``folder``."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, address, str(folder),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 60)
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode == 0, output.decode()
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    return facts


@asynccontextmanager
async def inference_stub(address: str) -> AsyncIterator[grpc_service_pb2_grpc.GRPCInferenceServiceStub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)


def request_of(model: str, ids: Sequence[int], **fields: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, **fields)
    given = request.inputs.add(name="input_ids", datatype="INT64", shape=[len(ids)])
    given.contents.int64_contents.extend(ids)
    return request


async def error_of_call(call: Any) -> OpdError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_of_rpc(caught.value, target="here")


# --- tritonclient ------------------------------------------------------------------------------------------------
TRITON = """
import concurrent.futures, json, pathlib, sys
import numpy as np
import opd_mesh.clients.teacher  # the SDK lives beside tritonclient; only the server's own modules would not
import tritonclient.grpc as triton
from google.protobuf import descriptor_pb2
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

address, folder = sys.argv[1], pathlib.Path(sys.argv[2])
client = triton.InferenceServerClient(address)
IDS = [5, 9, 12, 40, 41, 42, 17, 88, 3, 60]
arrays, facts = {}, {"dtypes": {}, "answers": {}, "errors": {}}

def tensor(ids, dtype="int64"):
    array = np.array(ids, dtype)
    given = triton.InferInput("input_ids", array.shape, dtype.upper())
    given.set_data_from_numpy(array)
    return given

def keep(name, result, *outputs):
    for output in outputs:
        array = result.as_numpy(output)
        facts["dtypes"][name] = str(array.dtype)
        arrays[name] = array.view(np.uint16) if array.dtype.itemsize == 2 else array
    facts["answers"][name] = result.get_response(as_json=True)
    facts["answers"][name].pop("raw_output_contents")

def failing(name, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except InferenceServerException as error:
        facts["errors"][name] = [error.status(), error.message()]

facts["live"], facts["ready"] = client.is_server_live(), client.is_server_ready()
facts["models"] = [client.is_model_ready(*model) for model in
                   [("wide",), ("wide", "1"), ("half",), ("nobody",), ("wide", "2")]]
facts["server"] = client.get_server_metadata(as_json=True)
facts["metadata"] = {name: client.get_model_metadata(name, as_json=True) for name in ("wide", "half")}

before_last = {"position_end": len(IDS) - 1}
keep("half", client.infer("half", [tensor(IDS)], request_id="an id", parameters=before_last), "logits")
keep("narrowed", client.infer("wide", [tensor(IDS)], parameters={"dtype": "BF16", **before_last}), "logits")
keep("all rows", client.infer("wide", [tensor(IDS)]), "logits")
keep("a batch of one", client.infer("wide", [tensor([IDS], "int32")], "1"), "logits")
hidden = [triton.InferRequestedOutput("hidden_states")]
keep("hidden", client.infer("half", [tensor(IDS)], outputs=hidden, parameters=before_last), "hidden_states")
both = [triton.InferRequestedOutput("logprobs"), triton.InferRequestedOutput("logits")]
result = client.infer("wide", [tensor(IDS)], outputs=both, client_timeout=30, timeout=20_000_000)
keep("logprobs", result, "logprobs")
keep("logits beside them", result, "logits")

lengths = (3, 10, 1, 7)
with concurrent.futures.ThreadPoolExecutor(len(lengths)) as threads:
    together = threads.map(lambda n: client.infer("wide", [tensor(IDS[:n])]), lengths)
for n, result in zip(lengths, together):
    keep(f"together {n}", result, "logits")

failing("nobody", client.infer, "nobody", [tensor(IDS)])
failing("version", client.get_model_metadata, "wide", "2")
failing("batch", client.infer, "wide", [tensor([IDS, IDS])])
failing("sequence", client.infer, "wide", [tensor(IDS)], sequence_id=7)
failing("classes", client.infer, "wide", [tensor(IDS)], outputs=[triton.InferRequestedOutput("logits", class_count=3)])
failing("config", client.get_model_config, "wide")
np.savez(folder / "arrays.npz", **arrays)
(folder / "facts.json").write_text(json.dumps(facts))
file = descriptor_pb2.FileDescriptorProto()
service_pb2.DESCRIPTOR.CopyToProto(file)
(folder / "descriptor.binpb").write_bytes(file.SerializeToString())
"""


@dataclass(frozen=True)
class Triton:
    """What tritonclient got. 16-bit floats are held by their bits."""

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]
    descriptor: descriptor_pb2.FileDescriptorProto


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def triton(address: str, tmp_path_factory: pytest.TempPathFactory) -> Triton:
    folder = tmp_path_factory.mktemp("triton")
    facts = await run_client(TRITON, address, folder)
    file = descriptor_pb2.FileDescriptorProto.FromString((folder / "descriptor.binpb").read_bytes())
    return Triton(facts, dict(np.load(folder / "arrays.npz")), file)


async def test_tritonclient_gets_health_and_metadata(triton: Triton) -> None:
    assert (triton.facts["live"], triton.facts["ready"]) == (True, True)
    assert triton.facts["models"] == [True, True, True, False, False]
    assert triton.facts["server"] == {"name": "opd_mesh", "version": opd_mesh.__version__}
    half = triton.facts["metadata"]["half"]
    assert (half["name"], half["versions"], half["platform"]) == ("half", ["1"], "opd_mesh")
    assert half["inputs"] == [{"name": "input_ids", "datatype": "INT64", "shape": ["-1"]}]
    assert half["outputs"] == [
        {"name": "logits", "datatype": "BF16", "shape": ["-1", str(V)]},
        {"name": "hidden_states", "datatype": "BF16", "shape": ["-1", str(WIDTH)]},
        {"name": "logprobs", "datatype": "FP32", "shape": ["-1"]},
    ]
    assert triton.facts["metadata"]["wide"]["outputs"][0]["datatype"] == "FP32"


async def scored(address: str, teacher_id: str, signal: Signal, dtype: str) -> np.ndarray:
    """What our own service says of every token after the first."""
    async with TeacherClient([address]) as client:
        code = getattr(teacher_service_pb2, f"SIGNAL_{signal.name}")
        result = await client.score(ScoreRequest(teacher_id, IDS, [(1, N)], FINGERPRINT, signal=code, dtype=dtype))
    (array,) = result.tensors.values()
    return array


@pytest.mark.parametrize(("name", "teacher_id"), [("half", "half"), ("narrowed", "wide")])
async def test_tritonclient_gets_the_bf16_logits_that_our_client_gets(
    triton: Triton, address: str, name: str, teacher_id: str
) -> None:
    ours = await scored(address, teacher_id, Signal.LOGITS, "bfloat16")
    assert ours.shape == (N - 1, V)
    assert triton.facts["dtypes"][name] == "bfloat16"
    assert np.array_equal(triton.arrays[name], ours.view(np.uint16))  # bit for bit
    assert np.isfinite(ours.astype(np.float32)).all()
    assert ours.astype(np.float32).std() > 1


async def test_hidden_states_and_logprobs_are_ours_too(triton: Triton, address: str) -> None:
    hidden = await scored(address, "half", Signal.HIDDEN_STATES, "bfloat16")
    assert np.array_equal(triton.arrays["hidden"], hidden.view(np.uint16))
    logprobs = await scored(address, "wide", Signal.TOKEN_LOGPROBS, "float32")
    assert triton.arrays["logprobs"].shape == (N - 1,)
    np.testing.assert_allclose(triton.arrays["logprobs"], logprobs, atol=1e-5)


async def test_every_position_has_logits_the_last_one_too(triton: Triton) -> None:
    wanted = logits_of(tiny_model("llama", 0), IDS).numpy()
    for name, shape in (
        ("all rows", (N, V)),
        ("logits beside them", (N, V)),
        ("together 10", (N, V)),
        ("a batch of one", (1, N, V)),
    ):
        assert triton.facts["dtypes"][name] == "float32"
        assert triton.arrays[name].shape == shape
        np.testing.assert_allclose(triton.arrays[name].reshape(N, V), wanted, atol=1e-4)
    for length in (3, 1, 7):  # asked for at once
        np.testing.assert_allclose(triton.arrays[f"together {length}"], wanted[:length], atol=1e-4)


async def test_an_answer_says_where_it_comes_from(triton: Triton, address: str) -> None:
    async with TeacherClient([address]) as client:
        card = await client.get_teacher("half")
    answer = triton.facts["answers"]["half"]
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("half", "1", "an id")
    assert answer["parameters"] == {
        "teacher_digest": {"string_param": card.teacher_digest},
        "head_digest": {"string_param": card.head.digest},
        "tokenizer_fingerprint": {"string_param": card.tokenizer_fingerprint},
    }


async def test_tritonclient_is_told_what_is_wrong(triton: Triton) -> None:
    errors = triton.facts["errors"]
    statuses = {name: status.removeprefix("StatusCode.") for name, (status, _) in errors.items()}
    assert statuses == {
        "nobody": "NOT_FOUND",
        "version": "NOT_FOUND",
        "batch": "INVALID_ARGUMENT",
        "sequence": "INVALID_ARGUMENT",
        "classes": "INVALID_ARGUMENT",
        "config": "UNIMPLEMENTED",
    }
    assert "no teacher 'nobody' here; served are: half, long, wide" in errors["nobody"][1]
    assert "[2, 10]; expected [N] or [1, N]" in errors["batch"][1]


def _fields(messages: Any, prefix: str = "") -> dict[str, Any]:
    """Everything that shapes the bytes of some messages, by name; nested ones included."""
    found: dict[str, Any] = {}
    for message in messages:
        name = prefix + message.name
        for field in message.field:
            oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
            found[f"{name}.{field.name}"] = (field.number, field.type, field.label, field.type_name, oneof)
        found[name] = (message.options.map_entry, len(message.field))
        found |= _fields(message.nested_type, f"{name}.")
    return found


async def test_our_messages_are_those_of_tritonclient(triton: Triton) -> None:
    ours = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(ours)
    assert ours.package == triton.descriptor.package == "inference"
    fields, theirs = _fields(ours.message_type), _fields(triton.descriptor.message_type)
    assert len(fields) > 60
    assert fields == {name: theirs.get(name) for name in fields}

    def methods(file: descriptor_pb2.FileDescriptorProto) -> dict[str, Any]:
        (service,) = (service for service in file.service if service.name == "GRPCInferenceService")
        return {
            rpc.name: (rpc.input_type, rpc.output_type, rpc.client_streaming, rpc.server_streaming)
            for rpc in service.method
        }

    assert len(methods(ours)) == 6
    assert methods(ours).items() <= methods(triton.descriptor).items()


# --- reflection --------------------------------------------------------------------------------------------------
REFLECTION = """
import json, pathlib, sys
import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

address, folder = sys.argv[1], pathlib.Path(sys.argv[2])
channel = grpc.insecure_channel(address)
database = ProtoReflectionDescriptorDatabase(channel)
pool = descriptor_pool.DescriptorPool(database)

def call(service, method, request):
    found = pool.FindServiceByName(service).FindMethodByName(method)
    message = json_format.ParseDict(request, message_factory.GetMessageClass(found.input_type)())
    rpc = channel.unary_unary(
        f"/{service}/{method}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(found.output_type).FromString,
    )
    return json_format.MessageToDict(rpc(message, timeout=30))

facts = {
    "services": sorted(database.get_services()),
    "teacher": call("opd.v1.TeacherService", "GetTeacher", {"teacherId": "wide"}),
    "metadata": call("inference.GRPCInferenceService", "ModelMetadata", {"name": "wide"}),
    "answer": call("inference.GRPCInferenceService", "ModelInfer", {
        "modelName": "wide",
        "inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [3], "contents": {"int64Contents": [5, 9, 12]}}],
        "outputs": [{"name": "logprobs"}],
    }),
}
assert not {"opd", "opd_mesh", "tritonclient"} & sys.modules.keys()
(folder / "facts.json").write_text(json.dumps(facts))
"""


async def test_a_client_that_knows_reflection_alone(address: str, tmp_path: Path) -> None:
    facts = await run_client(REFLECTION, address, tmp_path)
    assert {SERVICE, "opd.v1.TeacherService", "grpc.health.v1.Health"} <= set(facts["services"])
    assert facts["teacher"]["teacher"]["tokenizerFingerprint"] == FINGERPRINT
    assert facts["metadata"]["outputs"][0] == {"name": "logits", "datatype": "FP32", "shape": ["-1", str(V)]}
    answer = facts["answer"]
    (output,) = answer["outputs"]
    assert output == {"name": "logprobs", "datatype": "FP32", "shape": ["2"]}
    import base64

    values = np.frombuffer(base64.b64decode(answer["rawOutputContents"][0]), "<f4")
    wanted = logits_of(tiny_model("llama", 0), IDS[:3]).log_softmax(-1)
    np.testing.assert_allclose(values, [wanted[0, IDS[1]], wanted[1, IDS[2]]], atol=1e-4)


# --- limits and errors -------------------------------------------------------------------------------------------
async def test_an_answer_too_large_for_a_message_is_refused_and_the_rows_named_fit(address: str) -> None:
    ids = [index % LONG_V for index in range(LONG)]
    async with inference_stub(address) as stub:
        error = await error_of_call(stub.ModelInfer(request_of("long", ids)))
        assert isinstance(error, TooLongError)
        assert "256 rows and 1048576 bytes, but a message holds 1048576: 255 rows fit" in error.message
        request = request_of("long", ids)
        request.parameters["position_end"].int64_param = 255
        answer = await stub.ModelInfer(request)
        assert len(answer.raw_output_contents[0]) == 255 * LONG_V * 4
        request = request_of("long", ids)
        request.parameters["dtype"].string_param = "BF16"
        answer = await stub.ModelInfer(request)
        assert np.frombuffer(answer.raw_output_contents[0], ml_dtypes.bfloat16).shape == (LONG * LONG_V,)


async def test_errors_are_those_of_the_mesh(address: str) -> None:
    async with inference_stub(address) as stub:
        error = await error_of_call(stub.ModelInfer(request_of("nobody", IDS)))
        assert isinstance(error, UnknownTeacherError)
        assert error.field == "model_name"
        error = await error_of_call(stub.ModelMetadata(pb.ModelMetadataRequest(name="nobody")))
        assert isinstance(error, UnknownTeacherError)
        assert error.field == "name"
        error = await error_of_call(stub.ModelInfer(request_of("wide", IDS, model_version="3")))
        assert type(error) is NotFoundError
        assert error.field == "model_version"
        error = await error_of_call(stub.ModelInfer(request_of("wide", [5, V])))
        assert isinstance(error, InvalidInputError)
        assert "token id 131 at position 1 is outside the vocabulary of 131" in error.message
        error = await error_of_call(stub.ModelInfer(request_of("wide", [5] * 4097)))
        assert isinstance(error, TooLongError)
        request = request_of("wide", IDS)
        request.parameters["tokenizer_fingerprint"].string_param = "0" * 64
        assert isinstance(await error_of_call(stub.ModelInfer(request)), TokenizerMismatchError)


# --- the life of a request, with an engine that waits to be let go -----------------------------------------------
class WaitingEngine:
    """Gives logits of zeros when told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.entered = threading.Event()
        self.jobs = 0
        self.weight_sets = ()
        self.facts = EngineFacts(
            model_type="waiting", vocab_size=V, hidden_size=4, dtype="float32", teacher_digest="d" * 64, head=None,
            head_error=0.0, signals=(Signal.LOGITS,), note="it waits", batch_layout="lone",
            tokenizer_fingerprint=FINGERPRINT, tokenizer_roles=TokenizerRoles(1, 2, 0, None), vocabulary={},
        )  # fmt: skip

    def score(self, jobs: Sequence[ScoreJob]) -> list[dict[str, np.ndarray] | OpdError]:
        self.entered.set()
        assert self.go.wait(60)
        self.jobs += len(jobs)
        return [{"logits": np.zeros((len(job.predicting_positions), V), np.float32)} for job in jobs]

    def head_tensors(self) -> list[tuple[str, np.ndarray]]:
        return []

    def close(self) -> None:
        self.go.set()


@dataclass
class Waiting:
    """A server in this process, its teacher not installed yet, and its insides."""

    engine: WaitingEngine
    server: MeshServer
    catalogue: Catalogue
    stub: grpc_service_pb2_grpc.GRPCInferenceServiceStub
    channel: grpc.aio.Channel
    queue: ScoringQueue | None = None

    async def install(self) -> ScoringQueue:
        self.queue = open_catalogue(self.catalogue, {"waiting": self.engine})
        await self.server.set_serving(True)
        return self.queue


@asynccontextmanager
async def waiting_server(**server_fields: Any) -> AsyncIterator[Waiting]:
    config = teacher_config({"waiting": Path("nowhere")})
    catalogue = Catalogue(config)
    server = MeshServer(QUICK.replace(drain_grace_s=0.2, **server_fields), services=[SERVICE])
    add_inference_service(server, catalogue)
    address = await server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(address) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        waiting = Waiting(WaitingEngine(), server, catalogue, stub, channel)
        try:
            yield waiting
        finally:
            waiting.engine.go.set()
            await server.drain()
            if waiting.queue is not None:
                await waiting.queue.close()


async def until(condition: Any, timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def readiness(stub: Any) -> tuple[bool, bool, bool]:
    """(live, ready, the model ready)."""
    live = await stub.ServerLive(pb.ServerLiveRequest())
    ready = await stub.ServerReady(pb.ServerReadyRequest())
    model = await stub.ModelReady(pb.ModelReadyRequest(name="waiting"))
    return live.live, ready.ready, model.ready


async def test_readiness_follows_loading_and_draining_as_health_does() -> None:
    async with waiting_server(drain_propagation_s=60.0) as waiting:
        health = health_pb2_grpc.HealthStub(waiting.channel)
        check = health_pb2.HealthCheckRequest(service=SERVICE)
        assert await readiness(waiting.stub) == (True, False, False)
        error = await error_of_call(waiting.stub.ModelMetadata(pb.ModelMetadataRequest(name="waiting")))
        assert isinstance(error, UnavailableError)
        assert error.retry_delay_s
        await waiting.install()
        assert await readiness(waiting.stub) == (True, True, True)
        assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.SERVING
        draining = asyncio.create_task(waiting.server.drain())
        await asyncio.sleep(0.05)
        assert await readiness(waiting.stub) == (True, False, False)
        assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        draining.cancel()
        waiting.server.config = QUICK  # the drain at the end of the test need not wait for load balancers


async def test_a_call_that_is_given_up_leaves_the_queue() -> None:
    async with waiting_server() as waiting:
        queue = await waiting.install()
        first = waiting.stub.ModelInfer(request_of("waiting", IDS))
        await until(waiting.engine.entered.is_set)
        cancelled = waiting.stub.ModelInfer(request_of("waiting", IDS))
        await until(lambda: len(queue._entries) == 1)
        cancelled.cancel()
        await until(lambda: not queue._entries)

        late = waiting.stub.ModelInfer(request_of("waiting", IDS), timeout=0.3)
        await until(lambda: len(queue._entries) == 1)
        assert isinstance(await error_of_call(late), DeadlineError)
        await until(lambda: not queue._entries)

        request = request_of("waiting", IDS)
        request.parameters["timeout"].int64_param = 100_000  # microseconds
        error = await error_of_call(waiting.stub.ModelInfer(request, timeout=30))
        assert isinstance(error, DeadlineError)
        assert error.message == "not computed within 0.1 s"
        assert not queue._entries

        waiting.engine.go.set()
        answer = await first
        assert waiting.engine.jobs == 1
        assert list(answer.outputs[0].shape) == [N, V]
        assert "head_digest" not in answer.parameters


async def test_metadata_names_what_is_offered_alone() -> None:
    async with waiting_server() as waiting:
        await waiting.install()
        metadata = await waiting.stub.ModelMetadata(pb.ModelMetadataRequest(name="waiting"))
        assert [output.name for output in metadata.outputs] == ["logits"]
        request = request_of("waiting", IDS)
        request.outputs.add(name="hidden_states")
        error = await error_of_call(waiting.stub.ModelInfer(request))
        assert "offers logits, not hidden_states. it waits" in error.message
