"""The TensorRT-LLM engine with the real package on a real GPU, against transformers on the same checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import logits_of, save_tiny_checkpoint, tiny_model

from opd_mesh.config.base import parse_config
from opd_mesh.config.services import TeacherConfig
from teacher_server.engine import ScoreJob, Signal
from teacher_server.tensorrt_engine import TensorRtEngine

pytest.importorskip("tensorrt_llm.llmapi", reason="needs the wheel from NVIDIA's index, not the stub")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(1200),
]

# Widths that TensorRT-LLM's attention kernels know, and a padded vocabulary.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
VALID, PADDED = 131, 160
IDS = (tuple(range(4, 60)), (5, 9, 12, 40, 41), tuple(range(100, 20, -1)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    return save_tiny_checkpoint(path, "llama", 0, vocab_size=PADDED, tokenizer_vocab_size=VALID, **SIZES)


@pytest.fixture(scope="module", params=[False, True], ids=["stock", "wrapped"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[TensorRtEngine]:
    value = {
        "path": folder,
        "engine": "tensorrt_llm",
        "dtype": "bfloat16",
        "max_tokens_per_item": 300,
        "tensorrt_llm": {"max_batch_tokens": 512, "free_gpu_memory_fraction": 0.3, "hidden_states": request.param},
    }
    config = parse_config(TeacherConfig, value, source="test")
    engine = TensorRtEngine("t", config, folder, deterministic=False, stays_loaded=True)
    yield engine
    engine.close()


def job(ids: tuple[int, ...], signal: Signal) -> ScoreJob:
    return ScoreJob(
        token_ids=ids,
        predicting_positions=tuple(range(len(ids) - 1)),
        signal=signal,
        dtype="float32",
        top_k=5 if signal is Signal.TOP_K_LOGPROBS else 0,
    )


@pytest.mark.parametrize("signal", list(Signal))
def test_signals_are_those_of_transformers(engine: TensorRtEngine, signal: Signal) -> None:
    if signal not in engine.facts.signals:
        pytest.skip(engine.facts.note)
    model = tiny_model("llama", 0, vocab_size=PADDED, **SIZES)
    # Root mean square, in standard deviations of the logits. This model amplifies what bfloat16 rounds: transformers'
    # own bfloat16 differs from float32 by 0.05. Another row, or another token, makes it 1.
    tolerance = 0.15
    for _ in range(2):  # a second time, when anything cached would be found
        for ids, answer in zip(IDS, engine.score([job(ids, signal) for ids in IDS]), strict=True):
            assert isinstance(answer, dict), answer
            logits = logits_of(model, list(ids))[:-1, :VALID]
            logprobs = logits.log_softmax(-1)
            if signal is Signal.HIDDEN_STATES:
                weight = torch.from_numpy(dict(engine.head_tensors())["weight"].astype("float32"))
                ours, theirs = torch.from_numpy(answer["hidden_states"]) @ weight[:VALID].T, logits
            elif signal is Signal.LOGITS:
                ours, theirs = torch.from_numpy(answer["logits"]), logits
            elif signal is Signal.TOKEN_LOGPROBS:
                ours = torch.from_numpy(answer["logprobs"])
                theirs = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            else:
                ours = torch.from_numpy(answer["logprobs"])
                theirs = logprobs.gather(1, torch.from_numpy(answer["token_ids"]))
            assert ours.shape == theirs.shape
            assert float((ours - theirs).square().mean().sqrt()) < tolerance * float(logits.std())


def test_what_it_proved_on_load(engine: TensorRtEngine) -> None:
    assert engine.facts.vocab_size == VALID
    assert engine.facts.dtype == "bfloat16"
    assert engine.facts.batch_layout in ("packed", "lone")
    (weights,) = engine.weight_sets
    assert weights.num_bytes > 0


def test_the_memory_comes_back(engine: TensorRtEngine) -> None:
    (weights,) = engine.weight_sets
    free_loaded, _ = torch.cuda.mem_get_info()
    weights.unload()
    free, _ = torch.cuda.mem_get_info()
    weights.load()
    assert free > free_loaded
    (answer,) = engine.score([job(IDS[0], Signal.LOGITS)])
    assert isinstance(answer, dict)
