"""The teacher server over real sockets: what it serves is what the model says, and one bad item harms nobody else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mesh import QUICK, teacher_config
from opd.v1 import common_pb2, teacher_service_pb2, teacher_service_pb2_grpc
from opd_kernels import LinearHead
from tiny_models import logits_of, save_tiny_checkpoint, tiny_model, tiny_tokenizer

import teacher_server.transformers_engine as engine_module
from opd_mesh.clients.teacher import ScoreRequest, TeacherClient
from opd_mesh.config.services import ChannelConfig, TeacherServerConfig
from opd_mesh.errors import (
    CancelledByCallerError,
    ConfigError,
    CorruptWeightsError,
    DeadlineError,
    DivergedError,
    HeadMismatchError,
    InternalError,
    InvalidInputError,
    OpdError,
    OverloadedError,
    SignalNotOfferedError,
    TokenizerMismatchError,
    TooLongError,
    TrajectoryError,
    UnavailableError,
    UnknownTeacherError,
)
from opd_mesh.models.tokenizer import TokenizerRoles, tokenizer_fingerprint
from opd_mesh.rpc.server import MeshServer
from opd_mesh.rpc.status import error_of
from opd_mesh.tensors import byte_view
from student_trainer.heads import head_of
from teacher_server.catalogue import Catalogue
from teacher_server.engine import EngineFacts, HeadFacts, ScoreJob, Signal, TeacherEngine
from teacher_server.scoring_queue import ScoringQueue
from teacher_server.server import load_engines, open_catalogue
from teacher_server.service import TeacherServicer

pytestmark = pytest.mark.asyncio(loop_scope="module")

pb = teacher_service_pb2
HIDDEN, LOGITS = pb.SIGNAL_HIDDEN_STATES, pb.SIGNAL_LOGITS
TOP_K, TOKENS = pb.SIGNAL_TOP_K_LOGPROBS, pb.SIGNAL_TOKEN_LOGPROBS
ONE_ATTEMPT = ChannelConfig(max_attempts=1, timeout_s=10)
FINGERPRINT = tokenizer_fingerprint(tiny_tokenizer().get_vocab())
VALID, PADDED = 131, 140
IDS = [5, 9, 12, 40, 41, 42, 17, 88, 3, 60]
SPANS = [(2, 4), (7, 10)]
ROWS = [1, 2, 6, 7, 8]  # what predicts tokens 2, 3, 7, 8 and 9


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@dataclass
class Served:
    """A teacher server in this process, and its insides."""

    address: str
    queue: ScoringQueue
    server: MeshServer
    client: TeacherClient = field(init=False)

    def request(self, teacher_id: str = "llama", **fields: Any) -> ScoreRequest:
        base = ScoreRequest(teacher_id, IDS, SPANS, FINGERPRINT, timeout_s=20)
        return replace(base, **fields)


@asynccontextmanager
async def serving(
    engines: dict[str, TeacherEngine], config: TeacherServerConfig, servicer: TeacherServicer | None = None
) -> AsyncIterator[Served]:
    server = MeshServer(QUICK.replace(drain_grace_s=0.2), services=["opd.v1.TeacherService"])
    servicer = servicer or TeacherServicer(Catalogue(config))
    teacher_service_pb2_grpc.add_TeacherServiceServicer_to_server(servicer, server.grpc)
    address = await server.start("127.0.0.1:0")
    queue = open_catalogue(servicer.catalogue, engines)
    await server.set_serving(True)
    served = Served(address, queue, server)
    async with TeacherClient([address], ONE_ATTEMPT) as client:
        served.client = client
        try:
            yield served
        finally:
            await server.drain()
            await queue.close()


# --- real teachers, loaded once ----------------------------------------------------------------------------------
def _save_adapter(base: Path, folder: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def _models() -> dict[str, Any]:
    return {
        "llama": tiny_model("llama", 0),
        "phi": tiny_model("phi", 1),  # its head has a bias
        "padded": tiny_model("gemma2", 2, vocab_size=PADDED),  # its head has a soft cap
        "cohere": tiny_model("cohere", 3),
        "loud": tiny_model("llama", 4, logit_std=2e5),
    }


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """What the teachers compute, here."""
    return _models()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    save_tiny_checkpoint(root / "llama", "llama", 0)
    save_tiny_checkpoint(root / "phi", "phi", 1)
    save_tiny_checkpoint(root / "padded", "gemma2", 2, vocab_size=PADDED, tokenizer_vocab_size=VALID)
    save_tiny_checkpoint(root / "cohere", "cohere", 3)
    save_tiny_checkpoint(root / "loud", "llama", 4, logit_std=2e5)
    _save_adapter(root / "llama", root / "adapter")
    return root


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(folder: Path) -> AsyncIterator[Served]:
    names = ("llama", "phi", "padded", "cohere", "loud")
    config = teacher_config({name: folder / name for name in names}, max_items_in_flight=16, batch_tokens=64)
    teachers = dict(config.teachers)
    teachers["llama"] = teachers["llama"].replace(domains=["math", "code"], max_tokens_per_item=48)
    teachers["adapted"] = teachers["llama"].replace(adapter=folder / "adapter")
    config = config.replace(teachers=teachers)
    extract = engine_module.extract_head

    def extract_forgetting_cohere(model: Any, valid_vocab_size: int | None = None) -> LinearHead:
        head = extract(model, valid_vocab_size=valid_vocab_size)
        return replace(head, logit_scale=1.0) if model.config.model_type == "cohere" else head

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "extract_head", extract_forgetting_cohere)
        engines = await asyncio.to_thread(load_engines, config)
    async with serving(engines, config) as served:
        yield served


def hidden_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return states


def as_float(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float32))


# --- cards -------------------------------------------------------------------------------------------------------
async def test_cards_say_what_is_served(real: Served) -> None:
    cards = {card.teacher_id: card for card in await real.client.list_teachers()}
    assert list(cards) == ["llama", "phi", "padded", "cohere", "loud", "adapted"]
    llama = cards["llama"]
    assert list(llama.domains) == ["math", "code"]
    assert (llama.model_type, llama.vocab_size, llama.hidden_size) == ("llama", VALID, 48)
    assert llama.dtype == common_pb2.D_TYPE_FLOAT32
    assert llama.tokenizer_fingerprint == FINGERPRINT
    assert list(llama.signals) == [HIDDEN, LOGITS, TOP_K, TOKENS]
    assert (llama.limits.max_tokens_per_item, llama.limits.max_items_in_flight) == (48, 16)
    assert cards["phi"].limits.max_tokens_per_item == 4096
    assert llama.tokenizer_roles.eos_token_id == 2
    assert llama.tokenizer_roles.HasField("bos_token_id")
    assert len(llama.tokenizer_roles.chat_template_digest) == 64
    assert llama.engine == "transformers"
    assert all(card.head_error < 1e-4 for name, card in cards.items() if name != "cohere")  # "loud", too
    assert cards["cohere"].head_error > 0.1
    assert llama.note == ""

    assert not llama.head.has_bias
    assert cards["phi"].head.has_bias
    padded = cards["padded"]
    assert (padded.vocab_size, padded.head.vocab_size, padded.head.padded_vocab_size) == (VALID, VALID, PADDED)
    assert padded.head.HasField("soft_cap")
    assert not llama.head.HasField("soft_cap")
    assert padded.head.soft_cap == 24.0

    assert await real.client.get_teacher("phi") == cards["phi"]
    assert await real.client.get_vocabulary("phi") == tiny_tokenizer().get_vocab()
    with pytest.raises(UnknownTeacherError, match=r"no teacher 'nobody' here.*adapted.*llama") as caught:
        await real.client.get_teacher("nobody")
    assert caught.value.field == "teacher_id"


async def test_an_adapter_stands_above_its_base_and_shares_its_head(real: Served, folder: Path) -> None:
    import peft

    cards = {card.teacher_id: card for card in await real.client.list_teachers()}
    assert cards["adapted"].head.digest == cards["llama"].head.digest
    assert cards["adapted"].teacher_digest != cards["llama"].teacher_digest
    result = await real.client.score(real.request("adapted", signal=LOGITS))
    unmerged = peft.PeftModel.from_pretrained(tiny_model("llama", 0), str(folder / "adapter")).eval()
    wanted = logits_of(unmerged, IDS)[ROWS]
    assert torch.allclose(as_float(result.tensors["logits"]), wanted, atol=1e-4)
    assert not torch.allclose(logits_of(tiny_model("llama", 0), IDS)[ROWS], wanted, atol=0.1)


async def test_a_head_that_cannot_be_proved_leaves_logits(real: Served, models: dict[str, Any]) -> None:
    card = await real.client.get_teacher("cohere")
    assert list(card.signals) == [LOGITS, TOP_K, TOKENS]
    assert not card.HasField("head")
    assert "hidden states are not offered" in card.note
    assert "logit scale differs" in card.note
    with pytest.raises(SignalNotOfferedError, match=r"offers LOGITS, .*not HIDDEN_STATES.*logit scale") as caught:
        await real.client.score(real.request("cohere"))
    assert caught.value.field == "signal"
    with pytest.raises(SignalNotOfferedError, match="no head to give"):
        await real.client.get_head("cohere")
    result = await real.client.score(real.request("cohere", signal=LOGITS))
    # The scale that the extracted head lacks is there: these are the model's own logits.
    assert torch.allclose(as_float(result.tensors["logits"]), logits_of(models["cohere"], IDS)[ROWS], atol=1e-4)
    assert result.head_digest == ""


# --- heads -------------------------------------------------------------------------------------------------------
async def head_bytes(served: Served, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[Any, bytes, list[int]]:
    """(manifest, bytes, offsets of the chunks) of one GetHead call, in chunks of 1000 bytes."""
    monkeypatch.setattr("teacher_server.service.CHUNK_BYTES", 1000)
    stub = teacher_service_pb2_grpc.TeacherServiceStub(served.client._channel)
    responses = [response async for response in stub.GetHead(pb.GetHeadRequest(teacher_id="phi", **fields))]
    assert responses[0].WhichOneof("payload") == "manifest"
    chunks = [response.chunk for response in responses[1:]]
    return responses[0].manifest, b"".join(chunk.data for chunk in chunks), [chunk.offset for chunk in chunks]


async def test_a_head_is_resumed_at_any_offset(
    real: Served, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, whole, offsets = await head_bytes(real, monkeypatch)
    output = models["phi"].get_output_embeddings()
    weight, bias = output.weight.detach().numpy(), output.bias.detach().numpy()
    assert whole == bytes(byte_view(weight)) + bytes(byte_view(bias))
    assert [header.name for header in manifest.tensors] == ["weight", "bias"]
    assert manifest.total_bytes == len(whole)
    assert len(offsets) > 20
    for start in (1, 999, 1000, 12_345, weight.nbytes, weight.nbytes + 17, len(whole)):
        again, rest, starts = await head_bytes(real, monkeypatch, offset=start, digest=manifest.form.digest)
        assert rest == whole[start:], start
        assert starts[:1] == ([start] if start < len(whole) else [])
        assert again == manifest
    for start in (-1, len(whole) + 1):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await head_bytes(real, monkeypatch, offset=start)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(HeadMismatchError, match=manifest.form.digest):
        await real.client.get_head("phi", digest="0" * 64)


async def test_a_downloaded_head_is_checked_against_its_digest(real: Served, models: dict[str, Any]) -> None:
    for teacher_id in ("phi", "padded"):
        data = await real.client.get_head(teacher_id)
        head = head_of(data)
        hidden = hidden_of(models[teacher_id], IDS)
        assert torch.allclose(head.logits(hidden), logits_of(models[teacher_id], IDS)[:, :VALID], atol=1e-4)
        data.tensors["weight"].view(np.uint8)[3, 5] ^= 1
        with pytest.raises(CorruptWeightsError, match="hashes to"):
            head_of(data)
        data.tensors["weight"].view(np.uint8)[3, 5] ^= 1
        data.form.logit_scale = 1.5  # the form is part of the digest
        with pytest.raises(CorruptWeightsError, match="hashes to"):
            head_of(data)


async def test_a_broken_download_goes_on_where_it_broke(real: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_server.service.CHUNK_BYTES", 1000)
    offsets: list[int] = []
    serve_head = TeacherServicer.GetHead

    async def break_twice(self: TeacherServicer, request: Any, context: Any) -> AsyncIterator[Any]:
        offsets.append(request.offset)
        sent = 0
        async for response in serve_head(self, request, context):
            if sent == 4 and len(offsets) <= 2:
                raise UnavailableError("the network broke")
            sent += 1
            yield response

    engines, config = real.queue._engines, teacher_config({"phi": Path("phi")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherServicer, "GetHead", break_twice)
        async with serving({"phi": engines["phi"]}, config, TeacherServicer(Catalogue(config))) as broken:
            data = await broken.client.get_head("phi", timeout_s=30)
            broken.queue._engines = {}  # the engine belongs to the other server
    assert offsets == [0, 3000, 6000]
    head_of(data)


# --- signals -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("teacher_id", ["llama", "phi", "padded"])
async def test_signals_are_a_local_forward_pass(
    real: Served, models: dict[str, Any], teacher_id: str, dtype: str
) -> None:
    """Row r comes from the position before the r-th scored token, over several spans."""
    wanted = {"hidden_states": hidden_of(models[teacher_id], IDS), "logits": logits_of(models[teacher_id], IDS)}
    wanted["logits"] = wanted["logits"][:, :VALID]
    ulp = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for name, signal in (("hidden_states", HIDDEN), ("logits", LOGITS)):
        result = await real.client.score(real.request(teacher_id, signal=signal, dtype=dtype))
        got = result.tensors[name]
        assert got.dtype.name == dtype
        assert list(result.tensors) == [name]
        assert torch.allclose(as_float(got), wanted[name][ROWS], rtol=1.01 * ulp, atol=1e-4), name
        rounded = wanted[name][ROWS].to(getattr(torch, dtype)).float()
        # Rounded once, to nearest: rounding downwards would be half of them off by a step.
        assert dtype == "float32" or float((as_float(got) == rounded).float().mean()) > 0.98
        shifted = wanted[name][[row + 1 for row in ROWS]]
        assert not torch.allclose(as_float(got), shifted, rtol=0.1, atol=0.1)


async def test_many_items_of_two_teachers_and_bad_ones_among_them(real: Served, models: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    requests = []
    for number in range(40):
        length = int(torch.randint(4, 40, (1,), generator=generator))
        ids = torch.randint(4, VALID, (length,), generator=generator).tolist()
        start = int(torch.randint(1, length, (1,), generator=generator))
        teacher_id = ("llama", "phi")[number % 2]
        requests.append(real.request(teacher_id, token_ids=ids, scored_spans=[(start, length)]))
    bad: dict[int, tuple[dict[str, Any], type[OpdError]]] = {
        3: ({"token_ids": [5, 6, VALID, 7]}, TrajectoryError),
        8: ({"scored_spans": []}, TrajectoryError),
        13: ({"teacher_id": "nobody"}, UnknownTeacherError),
        22: ({"tokenizer_fingerprint": "f" * 64}, TokenizerMismatchError),
    }
    for number, (changes, _) in bad.items():
        requests[number] = replace(requests[number], **changes)
    async with real.client.scoring_stream() as stream:
        answers = await asyncio.gather(*(stream.score(request) for request in requests), return_exceptions=True)
        assert stream.broken is None
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        if number in bad:
            assert isinstance(answer, bad[number][1]), number
            continue
        assert not isinstance(answer, BaseException), number
        assert answer.teacher_id == request.teacher_id
        start, end = request.scored_spans[0]
        wanted = hidden_of(models[request.teacher_id], request.token_ids)[start - 1 : end - 1]
        assert torch.allclose(as_float(answer.tensors["hidden_states"]), wanted, atol=1e-4), number


BAD_ITEMS: dict[str, tuple[dict[str, Any], type[OpdError], str, str]] = {
    "unknown teacher": ({"teacher_id": "nobody"}, UnknownTeacherError, "teacher_id", "no teacher 'nobody'"),
    "empty response": ({"scored_spans": []}, TrajectoryError, "scored_spans", "response is empty"),
    "nothing at all": ({"token_ids": [], "scored_spans": []}, TrajectoryError, "scored_spans", "response is empty"),
    "empty span": ({"scored_spans": [(3, 3)]}, TrajectoryError, "scored_spans[0]", "is empty"),
    "span from 0": ({"scored_spans": [(0, 2)]}, TrajectoryError, "scored_spans[0]", "no prediction"),
    "span beyond": ({"scored_spans": [(1, 2), (5, 11)]}, TrajectoryError, "scored_spans[1]", "beyond the 10"),
    "overlap": ({"scored_spans": [(1, 5), (4, 6)]}, TrajectoryError, "scored_spans[1]", "overlaps"),
    "id outside": ({"token_ids": [*IDS[:-1], VALID]}, TrajectoryError, "token_ids", "131 at position 9 is outside"),
    "negative id": ({"token_ids": [*IDS[:-1], -1]}, TrajectoryError, "token_ids", "-1 is negative"),
    "padding row": (
        {"teacher_id": "padded", "token_ids": [*IDS[:-1], 135]}, TrajectoryError, "token_ids", "vocabulary of 131",
    ),
    "too long": ({"token_ids": IDS * 5}, TooLongError, "token_ids", "50 tokens, but at most 48"),
    "no fingerprint": ({"tokenizer_fingerprint": ""}, InvalidInputError, "tokenizer_fingerprint", "required"),
    "no signal": ({"signal": 0}, InvalidInputError, "signal", "name a signal"),
    "no such signal": ({"signal": 77}, InvalidInputError, "signal", "name a signal"),
    "not offered": ({"teacher_id": "cohere"}, SignalNotOfferedError, "signal", "offers LOGITS, TOP_K_LOGPROBS"),
    "no k": ({"signal": TOP_K}, InvalidInputError, "top_k", "from 1 to 131 .*got 0"),
    "large k": ({"signal": TOP_K, "top_k": 132}, InvalidInputError, "top_k", "from 1 to 131"),
    "k of logits": ({"signal": LOGITS, "top_k": 3}, InvalidInputError, "top_k", "goes with TOP_K_LOGPROBS alone"),
    "wire dtype": ({"dtype": "int64"}, InvalidInputError, "dtype", "float32, bfloat16 or float16"),
    "teacher digest": (
        {"expected_teacher_digest": "0" * 64}, HeadMismatchError, "expected_teacher_digest", "is served",
    ),
    "head digest": ({"expected_head_digest": "0" * 64}, HeadMismatchError, "expected_head_digest", "is served"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ITEMS)
async def test_a_bad_item_is_told_what_is_wrong(real: Served, case: str) -> None:
    changes, error, name, message = BAD_ITEMS[case]
    with pytest.raises(error, match=message.replace("[", r"\[")) as caught:
        await real.client.score(real.request(**changes))
    assert caught.value.field == name
    assert (await real.client.score(real.request())).tensors["hidden_states"].shape == (5, 48)


async def test_another_tokenizer_is_refused_and_both_are_named(real: Served) -> None:
    with pytest.raises(TokenizerMismatchError, match=f"aaaaaaaaaaaaaaaa….*'llama' has {FINGERPRINT[:16]}") as caught:
        await real.client.score(real.request(tokenizer_fingerprint="a" * 64))
    assert caught.value.metadata["teacher_fingerprint"] == FINGERPRINT


async def test_right_digests_are_answered_with_them(real: Served) -> None:
    card = await real.client.get_teacher("phi")
    digests = {"expected_teacher_digest": card.teacher_digest, "expected_head_digest": card.head.digest}
    result = await real.client.score(real.request("phi", **digests))
    assert (result.teacher_digest, result.head_digest) == (card.teacher_digest, card.head.digest)


async def test_what_a_narrow_dtype_cannot_hold_is_an_error_of_that_item(real: Served, models: dict[str, Any]) -> None:
    wide = real.request("loud", signal=LOGITS)
    answers = await asyncio.gather(
        *(real.client.score(replace(wide, dtype=dtype)) for dtype in ("float32", "float16", "bfloat16")),
        return_exceptions=True,
    )
    assert isinstance(answers[1], DivergedError)
    assert "'loud' gave NaN or infinity for this sequence as float16" in answers[1].message
    for answer in (answers[0], answers[2]):
        assert not isinstance(answer, BaseException)
        assert float(as_float(answer.tensors["logits"]).abs().max()) > 65504


async def test_a_tokenizer_larger_than_the_model_is_refused_on_load(tmp_path: Path) -> None:
    path = save_tiny_checkpoint(tmp_path / "small", "llama", vocab_size=100, tokenizer_vocab_size=VALID)
    with pytest.raises(ConfigError, match=r"'small'.*131.*100"):
        await asyncio.to_thread(load_engines, teacher_config({"small": path}))


# --- the life of an item, with an engine that waits to be let go -------------------------------------------------
class SlowEngine:
    """Answers when told to; row r of an item is filled with its first token."""

    def __init__(self, rows_width: int = 4) -> None:
        self.go = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[ScoreJob]] = []
        self.failure: Exception | None = None
        self._width = rows_width
        self.facts = EngineFacts(
            model_type="slow",
            vocab_size=VALID,
            hidden_size=4,
            dtype="float32",
            teacher_digest="d" * 64,
            head=HeadFacts("e" * 64, VALID, 4, "float32", False, 1.0, None),
            head_error=0.0,
            signals=(Signal.HIDDEN_STATES,),
            note="",
            batch_layout="lone",
            tokenizer_fingerprint=FINGERPRINT,
            tokenizer_roles=TokenizerRoles(1, 2, 0, None),
            vocabulary={},
        )
        self.weight_sets = ()

    def head_tensors(self) -> list[tuple[str, np.ndarray]]:
        return [("weight", np.zeros((VALID, 4), np.float32))]

    def score(self, jobs: Sequence[ScoreJob]) -> list[dict[str, np.ndarray] | OpdError]:
        self.batches.append(list(jobs))
        self.entered.set()
        if not self.go.wait(60):
            raise TimeoutError("the test never let the engine go")
        if self.failure is not None:
            raise self.failure
        return [
            {"hidden_states": np.full((len(job.predicting_positions), self._width), job.token_ids[0], np.float32)}
            for job in jobs
        ]

    def close(self) -> None:
        self.go.set()

    @property
    def seen(self) -> list[int]:
        """First tokens of the jobs that reached the engine."""
        return [job.token_ids[0] for batch in self.batches for job in batch]


class RawStream:
    """One ScoreTrajectories stream without our client's manners."""

    def __init__(self, served: Served) -> None:
        self.channel = grpc.aio.insecure_channel(served.address)
        self.call = teacher_service_pb2_grpc.TeacherServiceStub(self.channel).ScoreTrajectories()

    async def send(self, item_id: str, token: int = 5, *, length: int = 4, **fields: Any) -> None:
        await self.call.write(pb.ScoreTrajectoriesRequest(item=self.item(item_id, token, length=length, **fields)))

    async def send_many(self, items: Sequence[pb.ScoreItem]) -> None:
        await self.call.write(pb.ScoreTrajectoriesRequest(items=pb.ScoreItems(items=items)))

    def item(self, item_id: str, token: int = 5, *, length: int = 4, **fields: Any) -> pb.ScoreItem:
        item = pb.ScoreItem(
            item_id=item_id,
            teacher_id=fields.pop("teacher_id", "slow"),
            token_ids=[token, *[7] * (length - 1)],
            scored_spans=[common_pb2.Span(start=1, end=length)],
            signal=HIDDEN,
            tokenizer_fingerprint=FINGERPRINT,
            **fields,
        )
        if (timeout_s := fields.get("timeout_s")) is not None:
            item.timeout.FromNanoseconds(int(timeout_s * 1e9))
        return item

    async def cancel(self, item_id: str) -> None:
        await self.call.write(pb.ScoreTrajectoriesRequest(cancel_item_id=item_id))

    async def read(self) -> Any:
        async with asyncio.timeout(20):
            return await self.call.read()

    async def status(self) -> tuple[str, OpdError | None]:
        """(item id, error or None) of the next item that ends."""
        while True:
            response = await self.read()
            assert response is not grpc.aio.EOF, "the stream ended"
            if response.WhichOneof("payload") == "status":
                return response.item_id, error_of(response.status) if response.status.code else None

    async def close(self) -> None:
        self.call.cancel()
        await self.channel.close()


@asynccontextmanager
async def slow_server(**fields: Any) -> AsyncIterator[tuple[SlowEngine, Served, RawStream]]:
    config = teacher_config({"slow": Path("nowhere"), "other": Path("nowhere")}, **fields)
    engine = SlowEngine()
    async with serving({"slow": engine, "other": engine}, config) as served:
        stream = RawStream(served)
        try:
            first = await stream.read()
            assert first.credits == config.max_items_in_flight
            yield engine, served, stream
        finally:
            engine.go.set()
            await stream.close()


async def test_items_beyond_the_credits_are_refused_alone() -> None:
    async with slow_server(max_items_in_flight=2) as (engine, _, stream):
        for name in ("a", "b", "c", "d"):
            await stream.send(name)
        for name in ("c", "d"):
            ended, error = await stream.status()
            assert ended == name
            assert isinstance(error, OverloadedError)
            assert error.retry_delay_s == 1.0
        engine.go.set()
        assert {await stream.status(), await stream.status()} == {("a", None), ("b", None)}
        await stream.send("c")  # the credits are back
        assert await stream.status() == ("c", None)


async def test_items_sent_together_are_answered_together_each_with_its_own_status() -> None:
    async with slow_server(max_items_in_flight=4) as (engine, _, stream):
        names = ["a", "b", "twice", "twice", "strange", "beyond"]
        items = [stream.item(name, 10 + index) for index, name in enumerate(names)]
        items[4].teacher_id = "nobody"
        await stream.send_many(items)
        answers = []
        while len(answers) < 3:
            response = await stream.read()
            assert response.WhichOneof("payload") == "answers"
            answers += response.answers.answers
        refused = {answer.item_id: error_of(answer.status) for answer in answers}
        assert {name: type(error) for name, error in refused.items()} == {
            "twice": InvalidInputError, "strange": UnknownTeacherError, "beyond": OverloadedError,
        }  # fmt: skip
        engine.go.set()
        while len(answers) < 5:
            answers += (await stream.read()).answers.answers
        whole = {answer.item_id: answer for answer in answers[3:]}
        assert whole.keys() == {"a", "b"}
        for answer in whole.values():
            assert answer.HasField("status")
            assert answer.status.code == 0
            assert sum(len(chunk.data) for chunk in answer.chunks) == sum(
                header.byte_size for header in answer.header.tensors
            )
        await stream.send("alone", 20)  # in a message of its own: in messages of its own
        kinds = [(await stream.read()).WhichOneof("payload") for _ in range(3)]
        assert kinds == ["header", "chunk", "status"]


async def test_a_full_queue_refuses_items_of_all_streams() -> None:
    async with slow_server(max_queue_items=1) as (engine, served, stream):
        await stream.send("in the engine", 10)
        await until(engine.entered.is_set)
        await stream.send("waiting", 11)
        await until(lambda: len(served.queue._entries) == 1)
        second = RawStream(served)
        await second.read()
        await second.send("too many", 12)
        ended, error = await second.status()
        assert ended == "too many"
        assert isinstance(error, OverloadedError)
        assert error.retry_delay_s
        await second.close()
        engine.go.set()
        assert {await stream.status(), await stream.status()} == {("in the engine", None), ("waiting", None)}
        assert engine.seen == [10, 11]


async def test_a_cancelled_item_leaves_the_queue() -> None:
    async with slow_server() as (engine, served, stream):
        await stream.send("a", 10)
        await until(engine.entered.is_set)
        for name, token in (("b", 11), ("c", 12)):
            await stream.send(name, token)
        await until(lambda: len(served.queue._entries) == 2)
        await stream.cancel("b")
        await stream.cancel("never heard of")
        ended, error = await stream.status()  # before the engine is let go
        assert ended == "b"
        assert isinstance(error, CancelledByCallerError)
        assert len(served.queue._entries) == 1
        await stream.cancel("a")  # in the engine already: its answer is not waited for
        ended, error = await stream.status()
        assert ended == "a"
        assert isinstance(error, CancelledByCallerError)
        engine.go.set()
        assert await stream.status() == ("c", None)
        assert engine.seen == [10, 12]


async def test_our_client_gives_an_item_up_at_the_server_too() -> None:
    async with slow_server() as (engine, served, _):
        request = served.request("slow", scored_spans=[(1, 3)])
        first = asyncio.create_task(served.client.score(request))
        await until(engine.entered.is_set)
        second = asyncio.create_task(served.client.score(request))
        await until(lambda: len(served.queue._entries) == 1)
        second.cancel()
        await until(lambda: not served.queue._entries)
        engine.go.set()
        assert (await first).tensors["hidden_states"].tolist() == [[5.0] * 4] * 2
        with pytest.raises(asyncio.CancelledError):
            await second
        assert len(engine.seen) == 1


async def test_an_item_has_a_deadline_of_its_own() -> None:
    async with slow_server(default_item_timeout_s=0.3) as (engine, served, stream):
        await stream.send("patient", 10, timeout=_duration(60))
        await until(engine.entered.is_set)
        await stream.send("hasty", 11, timeout=_duration(0.1))
        await stream.send("default", 12)
        errors = dict([await stream.status(), await stream.status()])
        assert set(errors) == {"hasty", "default"}
        assert all(isinstance(error, DeadlineError) for error in errors.values())
        assert "0.1 s" in str(errors["hasty"])
        assert "0.3 s" in str(errors["default"])
        assert not served.queue._entries
        engine.go.set()
        assert await stream.status() == ("patient", None)
        assert engine.seen == [10]


def _duration(seconds: float) -> Any:
    from google.protobuf import duration_pb2

    value = duration_pb2.Duration()
    value.FromNanoseconds(int(seconds * 1e9))
    return value


async def test_an_id_used_twice_ends_that_id_and_no_other() -> None:
    async with slow_server() as (engine, _, stream):
        await stream.send("same", 10)
        await until(engine.entered.is_set)
        await stream.send("neighbour", 11)
        await stream.send("same", 12)
        ended, error = await stream.status()
        assert ended == "same"
        assert isinstance(error, InvalidInputError)
        assert error.field == "item_id"
        assert "in flight already" in error.message
        engine.go.set()
        assert await stream.status() == ("neighbour", None)
        await stream.send("same", 13)  # free again
        assert await stream.status() == ("same", None)
        assert engine.seen == [10, 11, 13]
        await stream.send("", 14)
        ended, error = await stream.status()
        assert isinstance(error, InvalidInputError)
        assert error.field == "item_id"


async def test_a_client_that_goes_away_frees_the_queue() -> None:
    async with slow_server() as (engine, served, stream):
        gone = RawStream(served)
        await gone.read()
        await gone.send("a", 10)
        await until(engine.entered.is_set)
        for name in ("b", "c"):
            await gone.send(name, 11)
        await stream.send("mine", 12)
        await until(lambda: len(served.queue._entries) == 3)
        await gone.close()
        await until(lambda: len(served.queue._entries) == 1)
        engine.go.set()
        assert await stream.status() == ("mine", None)
        assert engine.seen == [10, 12]


async def test_a_client_that_does_not_read_holds_up_nobody_and_is_freed() -> None:
    """A big answer fills the stream's window; what waits behind it leaves with the client, others are served."""
    async with slow_server(max_items_in_flight=4) as (engine, served, stream):
        engine._width = 4 << 20  # 16 MiB a row
        engine.go.set()
        lazy = RawStream(served)
        await lazy.read()
        await lazy.send("big", 10, length=3)
        await until(lambda: engine.seen == [10] and served.queue.batches == 1)
        engine._width = 4
        await stream.send("small", 11)
        assert await stream.status() == ("small", None)
        engine.go.clear()
        engine.entered.clear()
        await stream.send("in the engine", 12)
        await until(engine.entered.is_set)
        await lazy.send("behind", 13)
        await until(lambda: len(served.queue._entries) == 1)
        await lazy.close()
        await until(lambda: not served.queue._entries)
        engine.go.set()
        assert await stream.status() == ("in the engine", None)
        assert engine.seen == [10, 11, 12]


async def test_an_item_cancelled_while_it_is_sent_still_ends() -> None:
    async with slow_server() as (engine, served, stream):
        engine._width = 4 << 20
        engine.go.set()
        await stream.send("big", 10, length=3)
        await until(lambda: served.queue.batches == 1)
        for _ in range(3):
            await stream.cancel("big")
        ended, error = await stream.status()
        assert ended == "big"
        assert error is None or isinstance(error, CancelledByCallerError)
        engine._width = 4
        await stream.send("big", 11)
        assert await stream.status() == ("big", None)


async def test_batches_keep_to_the_token_budget_and_to_one_teacher() -> None:
    async with slow_server(batch_tokens=64) as (engine, served, stream):
        await stream.send("first", 10)
        await until(engine.entered.is_set)
        lengths = [30, 30, 30, 100, 4, 20, 44, 60, 4, 8]
        for number, length in enumerate(lengths):
            teacher_id = "other" if number == 4 else "slow"
            await stream.send(f"i{number}", 20 + number, length=length, teacher_id=teacher_id)
        await until(lambda: len(served.queue._entries) == len(lengths))
        engine.go.set()
        ended = [await stream.status() for _ in range(len(lengths) + 1)]
        assert all(error is None for _, error in ended)
    tokens = [[job.token_ids[0] - 20 for job in batch] for batch in engine.batches[1:]]
    assert tokens == [[0, 1, 8], [2, 5, 9], [3], [6], [7], [4]]  # in a turn the oldest first, and what fits


async def test_health_answers_while_the_engine_computes() -> None:
    async with slow_server() as (engine, served, stream):
        await stream.send("a")
        await until(engine.entered.is_set)
        health = health_pb2_grpc.HealthStub(stream.channel)
        for name in ("", "opd.v1.TeacherService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert (await served.client.get_teacher("slow")).model_type == "slow"
        assert not engine.go.is_set()


async def test_an_engine_that_fails_fails_its_batch_alone() -> None:
    async with slow_server() as (engine, _, stream):
        engine.failure = ValueError("secret path /etc")
        await stream.send("a")
        await until(engine.entered.is_set)
        engine.go.set()
        ended, error = await stream.status()
        assert ended == "a"
        assert isinstance(error, InternalError)
        assert "ValueError" in error.message
        assert "secret" not in error.message
        engine.failure = None
        await stream.send("b")
        assert await stream.status() == ("b", None)


async def test_while_the_teachers_load_everything_is_unavailable() -> None:
    config = teacher_config({"slow": Path("nowhere")})
    server = MeshServer(QUICK, services=["opd.v1.TeacherService"])
    servicer = TeacherServicer(Catalogue(config))
    teacher_service_pb2_grpc.add_TeacherServiceServicer_to_server(servicer, server.grpc)
    address = await server.start("127.0.0.1:0")
    async with TeacherClient([address], ONE_ATTEMPT) as client:
        request = ScoreRequest("slow", IDS, SPANS, FINGERPRINT, timeout_s=20)
        for call in (
            client.list_teachers(), client.get_teacher("slow"), client.get_head("slow", timeout_s=0.5),
            client.score(request),
        ):  # fmt: skip
            with pytest.raises(UnavailableError, match="still being loaded"):
                await call
        with pytest.raises(UnavailableError, match="NOT_SERVING"):
            await client.wait_ready(0.3)
    await server.drain()


async def test_a_queue_that_closes_fails_what_is_not_answered() -> None:
    async with slow_server() as (engine, served, stream):
        await stream.send("a", 10)
        await until(engine.entered.is_set)
        await stream.send("b", 11)
        await until(lambda: len(served.queue._entries) == 1)
        closing = asyncio.create_task(served.queue.close())
        errors = dict([await stream.status(), await stream.status()])
        assert set(errors) == {"a", "b"}
        assert all(isinstance(error, UnavailableError) for error in errors.values())
        await stream.send("c", 12)
        assert isinstance((await stream.status())[1], UnavailableError)
        engine.go.set()
        await closing


async def test_a_drained_server_answers_what_it_accepted_and_ends_standing_streams() -> None:
    config = teacher_config({"slow": Path("nowhere")})
    engine, servicer = SlowEngine(), TeacherServicer(Catalogue(config))
    async with serving({"slow": engine}, config, servicer) as served:
        served.server.config = QUICK.replace(drain_grace_s=60)
        idle, busy = RawStream(served), RawStream(served)
        for stream in (idle, busy):
            await stream.read()
        await busy.send("a", 10)
        await until(engine.entered.is_set)
        draining = asyncio.create_task(served.server.drain(servicer.drain))
        with pytest.raises(grpc.aio.AioRpcError, match="the teacher server is stopping"):
            await idle.read()
        engine.go.set()
        assert await busy.status() == ("a", None)
        with pytest.raises(grpc.aio.AioRpcError, match="the teacher server is stopping"):
            await busy.read()
        async with asyncio.timeout(30):
            await draining
        for stream in (idle, busy):
            await stream.close()
