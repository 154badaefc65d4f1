"""The TensorRT-LLM engine when something fails: LLMs that die or hang, a wrapper that does not hold, files replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensorrt_fake
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
    wrapped,
)
from tiny_models import save_tiny_checkpoint

from opd_mesh.errors import CorruptWeightsError, InternalError, PreconditionError
from opd_mesh.models.checkpoint import state_digest
from teacher_server import tensorrt_checkpoint, tensorrt_runtime


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    save_tiny_checkpoint(root / "llama", "llama", 0)
    return root


@pytest.fixture(params=ERAS)
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setattr(tensorrt_runtime, "visible_gpus", lambda: 2)
    return tensorrt_fake.install(monkeypatch, request.param)


# --- LLMs that die -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shutdown", ["ends", "raises"])
def test_an_llm_that_dies_is_made_again_and_the_batch_asked_once_more(
    fake: Fake, folder: Path, shutdown: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(folder / "llama")
    jobs = [job(ids) for ids in IDS[:2]]
    before = answers_of(engine, jobs)
    fake.dies, fake.shutdown = 1, shutdown
    assert_same(answers_of(engine, jobs), before)
    assert "it is made again" in caplog.text
    assert fake.aborted == 1  # the other one in flight was given up
    assert [llm.shut_down for llm in fake.llms] == [True, False]
    assert not engine._weights.broken
    assert_same(answers_of(engine, jobs), before)
    assert len(fake.llms) == 2


@one_era
def test_an_llm_that_dies_twice_fails_the_batch_and_the_next_one_makes_it_again(fake: Fake, folder: Path) -> None:
    engine = engine_of(folder / "llama")
    before = answers_of(engine, [job(IDS[0])])
    fake.dies = 2
    with pytest.raises(RuntimeError, match="the executor is gone"):
        engine.score([job(ids) for ids in IDS[:2]])
    assert len(fake.llms) == 2
    fake.dies = 1
    with pytest.raises(RuntimeError, match="the executor is gone"):  # once for each batch
        engine.score([job(IDS[0])])
    assert len(fake.llms) == 3
    assert_same(answers_of(engine, [job(IDS[0])]), before)
    assert len(fake.llms) == 4


@one_era
def test_an_llm_that_cannot_be_made_again_is_tried_again(
    fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(folder / "llama")
    fake.dies = 1
    with monkeypatch.context() as patch:
        patch.delitem(API["parameters_both"]["LLM"], "dtype")
        for _ in range(2):
            with pytest.raises(PreconditionError, match="cannot load"):
                engine.score([job(IDS[0])])
    assert not fake.running
    answers_of(engine, [job(IDS[0])])


def test_a_worker_that_hangs_is_left_behind(fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(folder / "llama")
    before = answers_of(engine, [job(IDS[1])])
    monkeypatch.setattr(tensorrt_runtime, "ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(tensorrt_runtime, "SHUTDOWN_TIMEOUT_S", 0.2)
    fake.hangs, fake.shutdown = 1, "hangs"
    assert_same(answers_of(engine, [job(IDS[1])]), before)
    assert len(fake.llms) == 2
    with pytest.raises(InternalError, match="did not shut down: TimeoutError"):
        engine.close()
    engine.close()  # there is nothing left to shut down


@one_era
def test_workers_that_hang_again_fail_the_batch(fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(folder / "llama")
    monkeypatch.setattr(tensorrt_runtime, "ANSWER_TIMEOUT_S", 0.1)
    fake.hangs = 2
    with pytest.raises(TimeoutError, match="did not answer a batch in the time allowed"):
        engine.score([job(IDS[1])])


@one_era
def test_the_error_is_raised_and_not_that_of_the_clearing_up(fake: Fake, folder: Path) -> None:
    fake.drop_rows, fake.shutdown = 2, "raises"
    with pytest.raises(InternalError, match="expected a row for each"):
        engine_of(folder / "llama")
    assert not fake.running


# --- hidden states -----------------------------------------------------------------------------------------------
@one_era
def test_hidden_states_that_are_not_proved_are_not_offered(fake: Fake, folder: Path) -> None:
    fake.hidden_scale = 1.5
    engine = wrapped(folder / "llama")
    assert engine.facts.signals == FROM_LOGITS
    assert "hidden × head differs from the logits by" in engine.facts.note
    assert engine.facts.head_error > 0.1
    wrapper, plain = fake.llms
    assert wrapper.shut_down
    assert type(plain.model) is STOCK["LlamaForCausalLM"]
    assert not plain.args.disable_overlap_scheduler
    answers_of(engine, [job(ids) for ids in IDS])


@pytest.mark.parametrize("shutdown", ["ends", "raises"])
def test_hidden_states_that_fail_beyond_the_first_probe_are_not_offered(
    fake: Fake, folder: Path, shutdown: str
) -> None:
    fake.no_hidden_below, fake.shutdown = 20, shutdown  # the first probe is longer
    engine = wrapped(folder / "llama")
    assert engine.facts.signals == FROM_LOGITS
    assert engine.facts.head is None
    assert "hidden states are not offered: InternalError: " in engine.facts.note
    assert "hidden states of shape none for 1 tokens" in engine.facts.note
    wrapper, plain = fake.llms
    assert wrapper.shut_down
    assert type(plain.model) is STOCK["LlamaForCausalLM"]
    answers_of(engine, [job(ids) for ids in IDS])


@one_era
def test_an_llm_that_dies_of_the_wrapper_is_made_again_without_it(fake: Fake, folder: Path) -> None:
    fake.dies = 1
    engine = wrapped(folder / "llama")
    assert "hidden states are not offered: RuntimeError: the executor is gone" in engine.facts.note
    assert not engine._weights.broken
    answers_of(engine, [job(ids) for ids in IDS])
    assert len(fake.llms) == 2


def test_a_model_that_cannot_be_wrapped_serves_logits(
    fake: Fake, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STOCK, "LlamaForCausalLM", STOCK["Phi3VForCausalLM"])
    fake.mapping["LlamaForCausalLM"] = STOCK["Phi3VForCausalLM"]
    engine = wrapped(folder / "llama")
    assert engine.facts.signals == FROM_LOGITS
    assert "class for LlamaForCausalLM is not one of its decoders" in engine.facts.note


# --- files that are replaced ------------------------------------------------------------------------------------
@one_era
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_that_are_replaced_while_they_are_read(
    fake: Fake, folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny_checkpoint(tmp_path / "copy", "llama", 0)

    def replaced(*args: Any) -> str:
        digest = state_digest(*args)
        copy = path / "copy"
        copy.write_bytes((path / name).read_bytes())
        copy.rename(path / name)
        return digest

    monkeypatch.setattr(tensorrt_checkpoint, "state_digest", replaced)
    with pytest.raises(CorruptWeightsError, match=f"{name} has been replaced since it was first read"):
        engine_of(path)
    assert not fake.llms


@one_era
def test_files_that_are_replaced_while_the_llm_is_made(
    fake: Fake, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny_checkpoint(tmp_path / "copy", "llama", 0)
    (weights,) = engine_of(path, stays_loaded=False).weight_sets
    weights.check()
    make = weights._make

    def replaced() -> None:
        make()
        (path / "config.json").touch()

    monkeypatch.setattr(weights, "_make", replaced)
    with pytest.raises(CorruptWeightsError, match=r"config.json has been replaced"):
        weights.load()
    assert not fake.running
    with pytest.raises(CorruptWeightsError, match=r"config.json has been replaced"):
        weights.check()
