"""The TensorRT-LLM engine against the recorded API, both eras: it asks rightly, and checks what it gets.

What the real package does can only be seen on a GPU: tests/gpu/test_tensorrt_engine.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tensorrt_fake
import torch
from mesh import teacher_config
from safetensors.torch import load_file, save_file
from tensorrt_fake import (
    API,
    ERAS,
    FROM_LOGITS,
    IDS,
    STOCK,
    Fake,
    answers_of,
    assert_same,
    engine_of,
    job,
    one_era,
    settings,
    wrapped,
)
from tiny_models import save_tiny_checkpoint

from opd_mesh.config.base import parse_config
from opd_mesh.config.services import TeacherServerConfig
from opd_mesh.errors import (
    ConfigError,
    CorruptWeightsError,
    InternalError,
    PreconditionError,
    TooLongError,
)
from opd_mesh.models.checkpoint import state_digest
from teacher_server import tensorrt_runtime
from teacher_server.catalogue import Catalogue
from teacher_server.engine import Signal
from teacher_server.server import load_engines, open_catalogue
from teacher_server.tensorrt_checkpoint import CheckpointFacts
from teacher_server.tensorrt_engine import TensorRtEngine

VALID, PADDED = 131, 140


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    save_tiny_checkpoint(root / "llama", "llama", 0)
    save_tiny_checkpoint(root / "other", "llama", 1)
    # A tied head with a soft cap, and a padded vocabulary.
    save_tiny_checkpoint(root / "gemma2", "gemma2", 2, vocab_size=PADDED, tokenizer_vocab_size=VALID)
    return root


@pytest.fixture(params=ERAS)
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setattr(tensorrt_runtime, "visible_gpus", lambda: 2)
    return tensorrt_fake.install(monkeypatch, request.param)


# --- what it answers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_signal_is_that_of_the_transformers_engine(fake: Fake, folder: Path, name: str) -> None:
    teachers = {"mine": {**settings(folder / name).model_dump(), "tensorrt_llm": {"hidden_states": True}}}
    teachers["theirs"] = {"path": folder / name, "max_tokens_per_item": 64}
    config = parse_config(TeacherServerConfig, {"teachers": teachers, "device": "cpu"}, source="test")
    engines = load_engines(config)
    mine, theirs = engines["mine"], engines["theirs"]
    assert isinstance(mine, TensorRtEngine)
    assert mine.facts.signals == theirs.facts.signals == (Signal.HIDDEN_STATES, *FROM_LOGITS)
    for fact in (
        "model_type", "vocab_size", "hidden_size", "dtype", "head", "tokenizer_fingerprint", "tokenizer_roles", "note",
    ):  # fmt: skip
        assert getattr(mine.facts, fact) == getattr(theirs.facts, fact), fact
    assert mine.facts.vocab_size == VALID
    assert 0 <= mine.facts.head_error < 1e-4
    assert mine.facts.teacher_digest == state_digest(load_file(folder / name / "model.safetensors").items())
    assert mine.facts.batch_layout == "packed"
    jobs = [job(ids, signal) for signal in Signal for ids in IDS]
    given = job(IDS[0], Signal.TOP_K_LOGPROBS, candidate_ids=np.arange(8 * 3).reshape(8, 3))
    assert_same(answers_of(mine, [*jobs, given]), answers_of(theirs, [*jobs, given]))
    for ours, other in zip(mine.head_tensors(), theirs.head_tensors(), strict=True):
        assert ours[0] == other[0]
        np.testing.assert_array_equal(ours[1], other[1])
    for engine in engines.values():
        engine.close()
    assert not fake.running


def test_what_is_asked_of_the_llm(fake: Fake, folder: Path) -> None:
    engine = engine_of(folder / "llama", dtype="bfloat16", tensorrt_llm={"tensor_parallel_size": 2})
    (llm,) = fake.llms
    assert llm.args.tensor_parallel_size == 2
    assert llm.args.dtype == engine.facts.dtype == "bfloat16"
    assert llm.args.skip_tokenizer_init
    assert not llm.args.trust_remote_code
    assert not llm.args.enable_chunked_prefill
    assert not llm.kv.enable_block_reuse
    assert (llm.args.max_input_len, llm.args.max_seq_len, llm.args.max_num_tokens) == (64, 65, 100)
    assert llm.kv.max_tokens >= 100
    assert not llm.args.disable_overlap_scheduler
    assert engine.facts.signals == FROM_LOGITS
    assert engine.facts.head is None
    assert engine.head_tensors() == []
    assert engine.facts.note == "hidden states are not offered: tensorrt_llm.hidden_states is off"


@one_era
def test_memory_is_counted_for_each_device(fake: Fake, folder: Path) -> None:
    file_bytes = (folder / "llama" / "model.safetensors").stat().st_size
    (one,) = engine_of(folder / "llama").weight_sets
    (two,) = engine_of(folder / "llama", tensorrt_llm={"tensor_parallel_size": 2}).weight_sets
    kv_tokens = fake.llms[0].kv.max_tokens
    assert one.num_bytes == file_bytes + kv_tokens * 2 * 2 * 2 * 12 * 4  # key and value, layers, heads, width, float32
    assert two.num_bytes == -(-one.num_bytes // 2)


@one_era
def test_batches_are_bounded(fake: Fake, folder: Path) -> None:
    engine = engine_of(folder / "llama")
    jobs = [job(range(4, 4 + tokens)) for tokens in (30, 30, 30, 60, 5, 5)]
    assert [[j.num_tokens for j in batch] for batch in engine._batches(jobs)] == [[30, 30, 30], [60, 5, 5]]
    mixed = [jobs[0], job(IDS[0], Signal.HIDDEN_STATES), jobs[0]]
    assert [len(batch) for batch in engine._batches(mixed)] == [1, 1, 1]
    assert [len(batch) for batch in engine._batches([job(IDS[1])] * 70)] == [33, 33, 4]  # 100 tokens
    fake.most_in_flight = 0
    answers_of(engine, jobs)
    assert fake.most_in_flight == 3
    alone = engine_of(folder / "llama", deterministic=True)
    assert alone.facts.batch_layout == "lone"
    batched = answers_of(engine, jobs)
    fake.most_in_flight = 0
    assert_same(answers_of(alone, jobs), batched)
    assert fake.most_in_flight == 1


@one_era
def test_neighbours_that_leak_are_scored_alone(fake: Fake, folder: Path) -> None:
    fake.leak = 0.1
    engine = engine_of(folder / "llama")
    assert engine.facts.batch_layout == "lone"
    leaky = answers_of(engine, [job(ids) for ids in IDS])
    fake.leak = 0.0
    assert_same(leaky, answers_of(engine, [job(ids) for ids in IDS]))


# --- rows that are missing ---------------------------------------------------------------------------------------
def test_missing_rows_are_never_taken_for_the_answer(fake: Fake, folder: Path) -> None:
    engine = wrapped(folder / "llama")
    fake.drop_rows = 2
    for signal in (Signal.LOGITS, Signal.HIDDEN_STATES):
        (answer,) = engine.score([job(IDS[0], signal)])
        assert isinstance(answer, InternalError)
        assert "for 10 tokens, expected a row for each" in answer.message
    with pytest.raises(InternalError, match=r"of shape \[62, 131\] for 64 tokens"):
        engine_of(folder / "llama")
    assert len(fake.running) == 1  # what failed its proof was shut down


@one_era
def test_reused_blocks_are_noticed_on_load(fake: Fake, folder: Path) -> None:
    fake.force_reuse = True
    with pytest.raises(InternalError, match="KV cache"):
        engine_of(folder / "llama")


def test_answers_without_the_tensor_are_errors() -> None:
    prompt = tensorrt_runtime.Prompt([5, 6], logits=True, hidden=True)
    output = tensorrt_fake.Request(None, [5, 6], None)
    with pytest.raises(InternalError, match="context logits of shape none"):
        tensorrt_runtime._rows(prompt, output)
    output.context_logits = torch.zeros(2, 3)
    with pytest.raises(InternalError, match="hidden states of shape none"):
        tensorrt_runtime._rows(prompt, output)
    output.context_logits = torch.zeros(1, 2, 3)
    with pytest.raises(InternalError, match=r"shape \[1, 2, 3\]"):
        tensorrt_runtime._rows(prompt, output)


# --- errors ------------------------------------------------------------------------------------------------------
def test_a_refused_sequence_fails_alone(fake: Fake, folder: Path) -> None:
    engine = engine_of(folder / "llama")
    good = answers_of(engine, [job(IDS[0]), job(IDS[1])])
    fake.refuse_over = 20
    answers = engine.score([job(IDS[0]), job(IDS[2]), job(IDS[1])])
    assert isinstance(answers[1], TooLongError)
    assert "60 tokens" in answers[1].message
    assert_same([answers[0], answers[2]], good)  # type: ignore[list-item]


@pytest.mark.parametrize("argument", ["max_input_len", "kv_cache_config"])
def test_an_argument_that_a_version_does_not_know_is_named(
    fake: Fake, folder: Path, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(API["parameters_both"]["LLM"], argument)
    with pytest.raises(PreconditionError, match=f"era {fake.era} cannot load .*llama: ValueError.*{argument}"):
        engine_of(folder / "llama")


@one_era
def test_checkpoints_that_do_not_fit(fake: Fake, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptWeightsError, match="expected 1234"):
        engine_of(folder / "llama", expected_digest="1234")
    small = save_tiny_checkpoint(tmp_path / "small", "llama", 0, tokenizer_vocab_size=VALID + 5)
    with pytest.raises(ConfigError, match="has 136 ids, the model embeds only 131"):
        engine_of(small)
    engine = engine_of(folder / "llama")
    with pytest.raises(InternalError, match="130 wide, less than 131 tokens"):
        engine._checked(folder, tensorrt_runtime.Rows(torch.zeros(2, 130), None))
    engine.close()
    broken = save_tiny_checkpoint(tmp_path / "broken", "llama", 0)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptWeightsError, match="NaN"):
        engine_of(broken)
    assert not fake.running


def test_adapters_are_refused_with_the_way_out(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"merge it .*merge_and_unload") as caught:
        engine_of(folder / "llama", adapter=folder / "adapter")
    assert caught.value.field == "adapter"


def test_what_is_missing_is_said_with_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_runtime, "visible_gpus", lambda: 1)
    with pytest.raises(ConfigError, match=r"needs 2 NVIDIA GPU\(s\), torch .* sees 1: install it from NVIDIA's own"):
        engine_of(folder / "llama", tensorrt_llm={"tensor_parallel_size": 2})
    for module in (None, ModuleType("tensorrt_llm")):  # not there at all; a stub
        monkeypatch.setitem(sys.modules, "tensorrt_llm", module)
        with pytest.raises(ConfigError, match=r"cannot be imported .*opd doctor.*engine: transformers") as caught:
            engine_of(folder / "llama")
        assert caught.value.field == "engine"


# --- hidden states -----------------------------------------------------------------------------------------------
def test_the_wrapper_leaves_nothing_behind(fake: Fake, folder: Path) -> None:
    engine = wrapped(folder / "llama")
    (llm,) = fake.llms
    assert type(llm.model).__name__ == "LlamaForCausalLMWithHiddenStates"
    assert llm.args.disable_overlap_scheduler
    assert fake.mapping["LlamaForCausalLM"] is STOCK["LlamaForCausalLM"]
    assert tensorrt_runtime.SINGLE_PROCESS not in os.environ
    assert Signal.HIDDEN_STATES in engine.facts.signals
    assert type(engine_of(folder / "llama")._weights._llm.model) is STOCK["LlamaForCausalLM"]


def test_hidden_states_need_one_gpu(folder: Path) -> None:
    with pytest.raises(ConfigError, match="hidden_states needs tensor_parallel_size: 1"):
        settings(folder, tensorrt_llm={"hidden_states": True, "tensor_parallel_size": 2})


# --- checkpoints -------------------------------------------------------------------------------------------------
def _quantized(folder: Path, target: Path) -> Path:
    """As ModelOpt writes it: float8 weights with scales, and a file that says so."""
    save_tiny_checkpoint(target, "llama", 0)
    tensors = load_file(folder / "llama" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name.replace("weight", "weight_scale")] = torch.tensor(0.5)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    quantization = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}
    (target / "hf_quant_config.json").write_text(json.dumps(quantization))
    return target


@one_era
def test_quantized_checkpoints(fake: Fake, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _quantized(folder, tmp_path / "fp8")
    facts = CheckpointFacts.read(path)
    assert facts.quantization == "FP8"
    assert facts.digest == state_digest(load_file(path / "model.safetensors").items())
    assert facts.digest != CheckpointFacts.read(folder / "llama").digest
    engine = wrapped(path)  # the head is not quantized
    assert engine.facts.note == "the weights are quantized: FP8"
    assert engine.facts.dtype == "float32"
    assert Signal.HIDDEN_STATES in engine.facts.signals
    assert not hasattr(fake.llms[0].args, "quant_config")
    # Other tools write a section of config.json.
    config = json.loads((folder / "llama" / "config.json").read_text())
    (path / "hf_quant_config.json").unlink()
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    assert CheckpointFacts.read(path).quantization == "awq"


# --- in the server -----------------------------------------------------------------------------------------------
@one_era
def test_the_llm_leaves_memory_and_comes_back(fake: Fake, folder: Path, tmp_path: Path) -> None:
    path = save_tiny_checkpoint(tmp_path / "copy", "llama", 0)
    engine = engine_of(path, stays_loaded=False)
    (weights,) = engine.weight_sets
    assert not fake.running
    with pytest.raises(InternalError, match="not loaded"):
        engine.score([job(IDS[0])])
    weights.load()
    weights.load()  # already there
    assert len(fake.running) == 1
    answers_of(engine, [job(IDS[0])])
    weights.unload()
    weights.unload()
    assert not fake.running
    save_file(load_file(folder / "other" / "model.safetensors"), path / "model.safetensors", {"format": "pt"})
    for call in (weights.check, weights.load):
        with pytest.raises(CorruptWeightsError, match=r"model.safetensors has been replaced"):
            call()
    (path / "model.safetensors").unlink()
    with pytest.raises(CorruptWeightsError, match="cannot be read any more"):
        weights.check()


@one_era
def test_equal_weight_sets_are_two(fake: Fake, folder: Path) -> None:
    (one,), (two,) = (engine_of(folder / "llama").weight_sets for _ in range(2))
    assert one.name == two.name
    assert len({one, two}) == 2
    assert {one: 1}[one] == 1


async def test_two_llms_take_turns_in_a_pool_with_room_for_one(fake: Fake, folder: Path) -> None:
    teachers = {name: settings(folder / name).model_dump() for name in ("llama", "other")}
    (weights,) = engine_of(folder / "llama").weight_sets
    pool = {"memory_bytes": weights.num_bytes + 1000}
    config = parse_config(
        TeacherServerConfig, {"teachers": teachers, "device": "cpu", "pool": pool, "max_top_k": 8}, source="test"
    )
    fake.llms.clear()
    engines = await asyncio.to_thread(load_engines, config)
    catalogue = Catalogue(config)
    queue = open_catalogue(catalogue, engines)
    assert {card.engine for card in catalogue.cards()} == {"tensorrt_llm"}
    wanted = {name: job(IDS[0], Signal.TOP_K_LOGPROBS) for name in teachers}
    for name in ("llama", "other", "llama"):
        answer = await catalogue.score(name, wanted[name])
        assert len(fake.running) == 1
        assert answer["logprobs"].shape == (8, 3)
    assert queue.pool.counters.evictions == 2
    fake.dies = 1
    await catalogue.score("llama", wanted["llama"])  # by another LLM
    fake.dies = 2
    with pytest.raises(InternalError, match="the engine failed"):
        await catalogue.score("llama", wanted["llama"])
    for name in ("other", "llama"):  # the dead one is evicted, and loaded again
        await catalogue.score(name, wanted[name])
        assert len(fake.running) == 1
    await queue.close()
    assert not fake.running
    assert teacher_config({"a": folder / "llama"}).teachers["a"].tensorrt_llm.tensor_parallel_size == 1
