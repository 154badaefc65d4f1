"""Many teachers under a memory budget: what is answered is the same to the bit, whoever is in memory."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_checkpoint, tiny_model

from opd_mesh.config.base import parse_config
from opd_mesh.config.services import TeacherServerConfig
from opd_mesh.errors import ConfigError, CorruptWeightsError, ModelNotFoundError, OpdError
from opd_mesh.models.mapped import MappedWeights
from opd_mesh.models.store import local_folder
from teacher_server.catalogue import Catalogue
from teacher_server.engine import ScoreJob, Signal, TeacherEngine
from teacher_server.pool import WeightPool
from teacher_server.scoring_queue import ScoringQueue
from teacher_server.server import load_engines, open_catalogue

pytestmark = pytest.mark.asyncio(loop_scope="module")
NAMES = ["a", "b", "c", "d", "e"]
IDS = (5, 9, 12, 40, 41, 42, 17, 88, 3, 60)


def job(seed: int = 0, signal: Signal = Signal.HIDDEN_STATES) -> ScoreJob:
    ids = tuple((token + 7 * seed) % 120 + 4 for token in IDS)
    return ScoreJob(ids, tuple(range(3, 9)), signal, "float32")


def config(teachers: dict[str, dict[str, Any]], **fields: Any) -> TeacherServerConfig:
    return parse_config(TeacherServerConfig, {"teachers": teachers, **fields}, source="test")


@dataclass
class Pooled:
    engines: dict[str, TeacherEngine]
    queue: ScoringQueue

    @property
    def pool(self) -> WeightPool:
        return self.queue.pool

    async def hidden(self, teacher_id: str, seed: int = 0) -> np.ndarray:
        return (await self.queue.score(teacher_id, job(seed)))["hidden_states"]


@asynccontextmanager
async def pooled(settings: TeacherServerConfig) -> AsyncIterator[Pooled]:
    engines = await asyncio.to_thread(load_engines, settings)
    queue = open_catalogue(Catalogue(settings), engines)
    try:
        yield Pooled(engines, queue)
    finally:
        await queue.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    for seed, name in enumerate(NAMES):
        save_tiny_checkpoint(folder / name, "llama", seed)
    return folder


def nbytes(name: str, folder: Path) -> int:
    return sum(tensor.nbytes for tensor in tiny_model("llama", NAMES.index(name)).state_dict().values())


def save_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], **settings}
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", **lora)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def unmerged(base: Path, adapter: Path) -> Any:
    import peft
    from transformers import AutoModelForCausalLM

    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()


# --- the budget --------------------------------------------------------------------------------------------------
async def test_five_teachers_in_the_room_of_two_answer_as_if_all_were_there(folder: Path, tmp_path: Path) -> None:
    teachers = {name: {"path": str(folder / name)} for name in NAMES}
    room = 2 * nbytes("a", folder)
    async with pooled(config(teachers, deterministic=True)) as whole:
        assert all(engine.weight_sets == () for engine in whole.engines.values())
        wanted = {(name, seed): await whole.hidden(name, seed) for name in NAMES for seed in range(3)}
    settings = config(teachers, deterministic=True, pool={"memory_bytes": room, "cache_dir": str(tmp_path)})
    async with pooled(settings) as few:
        assert few.pool.resident_bytes == 0
        calls = [(name, seed) for seed in range(3) for name in NAMES]
        answers = await asyncio.gather(*(few.hidden(*call) for call in calls))
        for call, answer in zip(calls, answers, strict=True):
            assert np.array_equal(answer, wanted[call]), call
        assert 0 < few.pool.resident_bytes <= room
        # The items of a teacher are computed in one turn, so each comes once, though three of each were asked for.
        assert few.pool.counters.loads == len(NAMES)
        assert few.pool.counters.evictions == len(NAMES) - 2
        assert few.pool.counters.prefetches >= len(NAMES) - 2
    # What was stored as it is served is mapped where it lies.
    assert not list(tmp_path.rglob("*.safetensors"))


async def test_by_arrival_every_change_of_teacher_is_an_exchange(folder: Path, tmp_path: Path) -> None:
    teachers = {name: {"path": str(folder / name)} for name in NAMES[:3]}
    pool = {"memory_bytes": nbytes("a", folder), "cache_dir": str(tmp_path), "order": "arrival", "prefetch": False}
    async with pooled(config(teachers, pool=pool)) as few:
        await asyncio.gather(*(few.hidden(name, seed) for seed in range(3) for name in NAMES[:3]))
        assert few.pool.counters.loads == 9
        assert few.pool.counters.prefetches == 0


async def test_a_dtype_that_is_not_the_files_is_converted_once(folder: Path, tmp_path: Path) -> None:
    teachers = {name: {"path": str(folder / name), "dtype": "bfloat16"} for name in NAMES[:2]}
    pool = {"memory_bytes": nbytes("a", folder) // 2, "cache_dir": str(tmp_path)}
    async with pooled(config(teachers)) as whole:
        wanted = await whole.hidden("b")
    stamps: list[dict[str, int]] = []
    for _ in range(2):
        async with pooled(config(teachers, pool=pool)) as few:
            await few.hidden("a")
            # bfloat16 products on a CPU depend on where the weights lie in memory, in the last place.
            assert np.allclose(await few.hidden("b"), wanted, atol=0.1)
        files = sorted((tmp_path / "weights").glob("*.safetensors"))
        assert len(files) == 2
        stamps.append({file.name: file.stat().st_mtime_ns for file in files})
    assert stamps[0] == stamps[1]
    # One that was cut short, by a machine that lost its power, is written again.
    files[0].write_bytes(files[0].read_bytes()[:1000])
    async with pooled(config(teachers, pool=pool)) as few:
        assert np.allclose(await few.hidden("b"), wanted, atol=0.1)


async def test_servers_that_share_a_cache_write_each_file_once(tmp_path: Path) -> None:
    """As if several servers of a machine started at once: what one has written, the others take."""
    cache_file = tmp_path / "weights" / "digest.safetensors"
    start = threading.Barrier(4)

    def bind(number: int) -> MappedWeights:
        tensors = {"weight": torch.arange(1 << 16, dtype=torch.float32)}
        start.wait(20)
        return MappedWeights.bind(str(number), tensors.items(), sources=[], cache_file=cache_file, device="cpu")

    for weights in await asyncio.gather(*(asyncio.to_thread(bind, number) for number in range(4))):
        weights.unload()
        weights.load()  # it would say that the file has been replaced
        assert torch.equal(weights.read("weight"), torch.arange(1 << 16, dtype=torch.float32))


async def test_a_teacher_larger_than_the_budget_is_refused(folder: Path, tmp_path: Path) -> None:
    pool = {"memory_bytes": 1000, "cache_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"teacher 'a' needs \d+ bytes of weights, pool.memory_bytes is 1000"):
        async with pooled(config({"a": {"path": str(folder / "a")}}, pool=pool)):
            pass


async def test_weights_that_vanish_fail_their_teachers_items_alone(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(folder / name, tmp_path / name)
    teachers = {name: {"path": str(tmp_path / name)} for name in ("a", "b")}
    pool = {"memory_bytes": nbytes("a", folder), "cache_dir": str(tmp_path / "cache")}
    async with pooled(config(teachers, pool=pool)) as few:
        await few.hidden("a")
        weights = tmp_path / "b" / "model.safetensors"
        replaced = save_tiny_checkpoint(tmp_path / "other", "llama", 9) / "model.safetensors"
        shutil.copy(replaced, weights)
        with pytest.raises(CorruptWeightsError, match="has been replaced since it was proved; restart"):
            await few.hidden("b")
        weights.unlink()
        with pytest.raises(CorruptWeightsError, match=r"model\.safetensors cannot be read any more"):
            await few.hidden("b")
        await few.hidden("a", 1)
        # One that is in memory is seen through its mapping when its file is written over.
        head = dict(few.engines["a"].head_tensors())["weight"]
        with (tmp_path / "a" / "model.safetensors").open("r+b") as file:
            file.write(replaced.read_bytes())
        with pytest.raises(CorruptWeightsError, match="has been replaced"):
            await few.hidden("a", 2)
        with pytest.raises(CorruptWeightsError, match="has been replaced"):
            few.engines["a"].head_tensors()
        assert head.shape[1] == 48


# --- sharing -----------------------------------------------------------------------------------------------------
async def test_the_same_weights_under_two_ids_are_in_memory_once(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a", tmp_path / "copy")
    teachers = {"a": {"path": str(folder / "a")}, "again": {"path": str(tmp_path / "copy")}}
    pool = {"memory_bytes": nbytes("a", folder), "cache_dir": str(tmp_path / "cache")}
    async with pooled(config(teachers, pool=pool)) as few:
        assert np.array_equal(await few.hidden("a"), await few.hidden("again"))
        assert few.pool.counters.loads == 1


async def test_ten_adapters_cost_little_more_than_their_base(folder: Path, tmp_path: Path) -> None:
    teachers: dict[str, dict[str, Any]] = {"base": {"path": str(folder / "a")}}
    for number in range(10):
        save_adapter(folder / "a", tmp_path / f"lora{number}", number, r=1)
        teachers[f"lora{number}"] = {"path": str(folder / "a"), "adapter": str(tmp_path / f"lora{number}")}
    base_bytes = nbytes("a", folder)
    pool = {"memory_bytes": int(1.3 * base_bytes), "cache_dir": str(tmp_path / "cache")}
    async with pooled(config(teachers, pool=pool)) as few:
        answers = {name: await few.hidden(name) for name in teachers}
        assert few.pool.counters.loads == 11
        assert few.pool.counters.evictions == 0
        assert few.pool.resident_bytes <= 1.3 * base_bytes
        for name, answer in answers.items():
            if name != "base":
                model = unmerged(folder / "a", tmp_path / name)
                with torch.no_grad():
                    output = model(torch.tensor([job().token_ids]), output_hidden_states=True)
                assert np.allclose(answer, output.hidden_states[-1][0, 3:9].numpy(), atol=1e-5)
                assert not np.allclose(answer, answers["base"], atol=0.01)
        assert np.array_equal(await few.hidden("base"), answers["base"])
        heads = {engine.facts.head.digest for engine in few.engines.values() if engine.facts.head is not None}
        assert len(heads) == 1
        assert len({engine.facts.teacher_digest for engine in few.engines.values()}) == 11


async def test_one_adapter_under_two_ids_and_two_bases_of_one_name(folder: Path, tmp_path: Path) -> None:
    for place, name in (("p", "a"), ("q", "b")):
        shutil.copytree(folder / name, tmp_path / place / "base")
    save_adapter(folder / "a", tmp_path / "lora", 1)
    shutil.copytree(tmp_path / "lora", tmp_path / "copy")
    teachers = {
        "p": {"path": str(tmp_path / "p/base")},
        "p1": {"path": str(tmp_path / "p/base"), "adapter": str(tmp_path / "lora")},
        "p2": {"path": str(tmp_path / "p/base"), "adapter": str(tmp_path / "copy")},
        "q1": {"path": str(tmp_path / "q/base"), "adapter": str(tmp_path / "lora")},
    }
    async with pooled(config(teachers)) as whole:
        wanted = {name: await whole.hidden(name) for name in teachers}
    # Room for one base and an adapter: everything comes and goes, the base stays what it is.
    pool = {"memory_bytes": int(1.1 * nbytes("a", folder)), "cache_dir": str(tmp_path / "cache")}
    async with pooled(config(teachers, pool=pool)) as few:
        for name in [*teachers, *reversed(teachers), "p1", "p", "p2", "q1", "p"]:
            assert np.allclose(await few.hidden(name), wanted[name], atol=1e-5), name
        assert few.engines["p1"].weight_sets == few.engines["p2"].weight_sets
        assert few.pool.counters.evictions >= 4
    assert np.array_equal(wanted["p1"], wanted["p2"])
    assert not np.allclose(wanted["p1"], wanted["q1"], atol=0.01)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "use_rslora": True},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        {"target_modules": ["q_proj"], "init_lora_weights": "olora"},
    ],
    ids=lambda settings: " ".join(f"{key}={value}" for key, value in settings.items()),
)
@pytest.mark.parametrize("tied", [True, False])
async def test_adapters_of_every_kind_are_served_as_peft_computes_them(
    tmp_path: Path, settings: dict[str, Any], tied: bool
) -> None:
    base = save_tiny_checkpoint(tmp_path / "base", "llama", 3, tie_word_embeddings=tied)
    save_adapter(base, tmp_path / "adapter", 1, **settings)
    teachers = {"base": {"path": str(base)}, "adapted": {"path": str(base), "adapter": str(tmp_path / "adapter")}}
    pool = {"memory_bytes": 1 << 20, "cache_dir": str(tmp_path / "cache")}
    async with pooled(config({"base": teachers["base"]})) as alone:
        base_answer = await alone.hidden("base")
    async with pooled(config(teachers)) as whole:
        assert np.allclose(await whole.hidden("base"), base_answer, atol=1e-5)
    async with pooled(config(teachers, pool=pool)) as few:
        assert np.allclose(await few.hidden("base"), base_answer, atol=1e-5)
        engine = few.engines["adapted"]
        answer = await few.queue.score("adapted", job(signal=Signal.HIDDEN_STATES))
        logits = (await few.queue.score("adapted", job(signal=Signal.LOGITS)))["logits"]
        head = dict(engine.head_tensors())
        ids = torch.tensor([job().token_ids])
        model = unmerged(base, tmp_path / "adapter")
        with torch.no_grad():
            wanted = model(ids).logits[0, 3:9].numpy()
            plain = tiny_model("llama", 3, tie_word_embeddings=tied)(ids).logits[0, 3:9].numpy()
        assert np.allclose(logits, wanted, atol=1e-4)
        assert np.allclose(answer["hidden_states"] @ head["weight"].T, wanted, atol=1e-4)
        assert not np.allclose(plain, wanted, atol=0.1)
        shares = not any(word in str(settings) for word in ("lm_head", "embed_tokens", "pissa", "olora"))
        assert len(engine.weight_sets) == (2 if shares else 1)


# --- the store ---------------------------------------------------------------------------------------------------
async def test_weights_come_from_a_url_once_and_again_when_they_change(folder: Path, tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}/teachers/a"
    store.put(str(folder / "a") + "/", url, recursive=True)
    store.pipe(f"{url}/evil.bin", b"a pickle")
    pool = {"memory_bytes": nbytes("a", folder), "cache_dir": str(tmp_path)}
    async with pooled(config({"a": {"path": url}}, pool=pool)) as few:
        answer = await few.hidden("a")
    async with pooled(config({"a": {"path": str(folder / "a")}})) as local:
        assert np.allclose(answer, await local.hidden("a"), atol=1e-5)
    kept = local_folder(url, tmp_path)
    assert not (kept / "evil.bin").exists()
    stamps = {file.name: file.stat().st_mtime_ns for file in kept.iterdir() if not file.name.startswith(".")}
    local_folder(url, tmp_path)
    assert stamps == {file.name: file.stat().st_mtime_ns for file in kept.iterdir() if not file.name.startswith(".")}
    text = json.loads((folder / "a" / "config.json").read_text()) | {"marker": 1}
    store.pipe(f"{url}/config.json", json.dumps(text).encode())
    assert json.loads((local_folder(url, tmp_path) / "config.json").read_text())["marker"] == 1
    assert (kept / "model.safetensors").stat().st_mtime_ns == stamps["model.safetensors"]


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("memory://nothing/here", ModelNotFoundError, "memory://nothing/here"),
        ("nosuch://bucket/x", ConfigError, "fsspec needs a package per scheme"),
    ],
)
async def test_a_url_with_nothing_behind_it_is_told(
    tmp_path: Path, url: str, error: type[OpdError], message: str
) -> None:
    with pytest.raises(error, match=message):
        local_folder(url, tmp_path)
