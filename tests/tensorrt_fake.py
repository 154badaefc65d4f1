"""A ``tensorrt_llm`` package made of the recorded API, which answers by a tiny transformers model on the CPU.

Its signatures come from ``tests/data/tensorrt_llm_api.json``; what else is recorded of TensorRT-LLM (what it refuses,
what it leaves out without a word) is written down here. It is no proof that the real one behaves so.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from opd_mesh.config.base import parse_config
from opd_mesh.config.services import TeacherConfig
from opd_mesh.errors import OpdError
from teacher_server.engine import ScoreJob, Signal
from teacher_server.tensorrt_engine import TensorRtEngine

API = json.loads((Path(__file__).parent / "data" / "tensorrt_llm_api.json").read_text())
ERAS = tuple(API["eras"])
IDS = ((5, 9, 12, 40, 41, 42, 17, 88, 3, 60), (7, 8, 9), tuple(range(4, 64)))
# Where the eras do not differ.
one_era = pytest.mark.parametrize("fake", ["N"], indirect=True)
FROM_LOGITS = (Signal.LOGITS, Signal.TOP_K_LOGPROBS, Signal.TOKEN_LOGPROBS)


class RequestError(RuntimeError):
    """``tensorrt_llm.executor.utils.RequestError``."""


def bind(era: str, what: str, args: tuple[Any, ...], given: dict[str, Any], error: type[Exception]) -> Any:
    """The arguments with their recorded defaults. By keyword only: positions differ between versions."""
    if args:
        raise TypeError(f"{what} was called with positional arguments, whose order differs by version")
    known = {**API["parameters_both"][what], **API["eras"][era]["parameters_more"].get(what, {})}
    if unknown := given.keys() - known.keys():
        raise error(f"{what} got unknown arguments {sorted(unknown)}")
    values = {**known, **given}
    if missing := [name for name, value in values.items() if value == "REQUIRED"]:
        raise TypeError(f"{what} lacks {missing}")
    return SimpleNamespace(**values)


# --- models ------------------------------------------------------------------------------------------------------
class LogitsProcessor(nn.Module):
    def forward(self, hidden_states: Tensor, lm_head: Any, attn_metadata: Any, return_context_logits: bool) -> Tensor:
        logits: Tensor = lm_head(hidden_states if return_context_logits else hidden_states[-1:])
        return logits.float()


class DecoderModelForCausalLM(nn.Module):
    """The shape of TensorRT-LLM's: trunk, head, and a logits processor that is called by its forward method."""

    def __init__(self, hugging_face: Any) -> None:
        super().__init__()
        self.model = hugging_face.base_model
        head, cap = hugging_face.get_output_embeddings(), getattr(hugging_face.config, "final_logit_softcapping", None)
        self.lm_head = head if cap is None else lambda hidden: cap * torch.tanh(head(hidden) / cap)
        self.logits_processor = LogitsProcessor()

    def forward(
        self, attn_metadata: Any, input_ids: Tensor, position_ids: Tensor, return_context_logits: bool = False
    ) -> Tensor:
        hidden = self.model(input_ids=input_ids[None], use_cache=False).last_hidden_state[0]
        return self.logits_processor.forward(hidden, self.lm_head, attn_metadata, return_context_logits)


class LlamaForCausalLM(DecoderModelForCausalLM):
    """Stock."""


class Gemma2ForCausalLM(DecoderModelForCausalLM):
    """Stock."""


class Phi3VForCausalLM(nn.Module):
    """Stock, and not a decoder."""


STOCK = {cls.__name__: cls for cls in (LlamaForCausalLM, Gemma2ForCausalLM, Phi3VForCausalLM)}


# --- the package -------------------------------------------------------------------------------------------------
@dataclass
class Fake:
    """What happened to the package, and what is to go wrong with it.

    Attributes:
        drop_rows: of every answer, from the front.
        leak: added to the logits of a sequence that is not alone.
        refuse_over: tokens; longer sequences are refused, whatever was asked of the constructor.
        dies: so many LLMs die of the next thing that is asked of them, and answer nothing from then on.
        hangs: so many LLMs never give the next answer. Whether they heed a timeout differs by version: here N does not.
        no_hidden_below: sequences of fewer tokens come without the additional outputs.
        shutdown: what it does: ends, "raises" or "hangs".
        force_reuse: as if enable_block_reuse=False had not been said.
        hidden_scale: the wrapper's hidden states are not what goes into the head.
    """

    era: str
    mapping: dict[str, Any] = field(default_factory=dict)
    llms: list[Any] = field(default_factory=list)
    most_in_flight: int = 0
    aborted: int = 0
    drop_rows: int = 0
    leak: float = 0.0
    refuse_over: int = 1 << 30
    dies: int = 0
    hangs: int = 0
    no_hidden_below: int = 0
    shutdown: str = "ends"
    force_reuse: bool = False
    hidden_scale: float = 1.0

    @property
    def running(self) -> list[Any]:
        return [llm for llm in self.llms if not llm.shut_down]


class Request:
    """A ``RequestOutput`` on its way."""

    def __init__(self, llm: Any, ids: list[int], sampling: Any) -> None:
        self.llm, self.ids, self.sampling = llm, ids, sampling
        self.alone = True
        self.context_logits: Tensor | None = None
        self.outputs = [SimpleNamespace(additional_context_outputs=None, token_ids=[])]

    def result(self, timeout: float | None = None) -> Request:
        if self.llm.fake.hangs:
            self.llm.fake.hangs -= 1
            threading.Event().wait(timeout if self.llm.fake.era == "A" else None)
            raise Empty
        self.alone = len(self.llm.in_flight) == 1 and self.alone
        for other in self.llm.in_flight:
            other.alone = other.alone and self.alone
        self.llm.in_flight.remove(self)
        self.llm.answer(self)
        return self

    def abort(self) -> None:
        self.llm.fake.aborted += 1
        if self.llm.dead:
            raise AttributeError("there is no executor to tell")


def install(monkeypatch: pytest.MonkeyPatch, era: str) -> Fake:
    """Put the package where imports find it."""
    fake = Fake(era)

    class KvCacheConfig:
        def __init__(self, *args: Any, **given: Any) -> None:
            self.__dict__.update(vars(bind(era, "KvCacheConfig", args, given, ValueError)))

    class SamplingParams:
        def __init__(self, *args: Any, **given: Any) -> None:
            self.__dict__.update(vars(bind(era, "SamplingParams", args, given, TypeError)))
            if self.__dict__["max_tokens"] < 1:
                raise ValueError("max_tokens must be at least 1")

    class LLM:
        def __init__(self, *args: Any, **given: Any) -> None:
            from transformers import AutoModelForCausalLM

            self.fake, self.args = fake, bind(era, "LLM", args, given, ValueError)
            self.kv = self.args.kv_cache_config or KvCacheConfig()
            self.in_flight: list[Request] = []
            self.seen: list[list[int]] = []
            self.shut_down = self.dead = False
            loaded = AutoModelForCausalLM.from_pretrained(self.args.model, dtype=getattr(torch, self.args.dtype))
            architecture = loaded.config.architectures[0]
            # A worker process has TensorRT-LLM's own classes, whatever was registered here.
            here = os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS") == "1"
            assert not here or self.args.tensor_parallel_size == 1
            cls = fake.mapping.get(architecture) if here else STOCK.get(architecture)
            if cls is None:
                raise ValueError(f"Unknown architecture for AutoModelForCausalLM: {architecture}")
            built = DecoderModelForCausalLM if not issubclass(cls, DecoderModelForCausalLM) else cls
            self.model = built(loaded.eval())
            fake.llms.append(self)

        def generate_async(self, *args: Any, **given: Any) -> Request:
            asked = bind(era, "generate_async", args, given, TypeError)
            assert not self.shut_down
            ids, sampling = asked.inputs, asked.sampling_params
            assert isinstance(ids, list)
            if sampling.end_id is None and self.args.skip_tokenizer_init:
                raise ValueError("end_id must be set when there is no tokenizer")
            if len(ids) > min(self.args.max_input_len, fake.refuse_over):
                error = {"ValueError": ValueError, "RequestError": RequestError}[API["eras"][era]["too_long"]]
                raise error(f"prompt length {len(ids)} exceeds max_input_len")
            request = Request(self, ids, sampling)
            self.in_flight.append(request)
            fake.most_in_flight = max(fake.most_in_flight, len(self.in_flight))
            return request

        @torch.inference_mode()
        def answer(self, request: Request) -> None:
            if fake.dies and not self.dead:
                fake.dies -= 1
                self.dead = True
            if self.dead:
                raise RuntimeError("the executor is gone")
            ids, sampling = request.ids, request.sampling
            if (
                len(ids) >= self.args.max_seq_len
                or len(ids) > self.args.max_num_tokens
                or len(ids) > self.kv.max_tokens
            ):
                raise RequestError(f"{len(ids)} tokens do not fit max_seq_len, max_num_tokens or the KV cache")
            output = self.model(
                attn_metadata=None,
                input_ids=torch.tensor(ids),
                position_ids=torch.arange(len(ids)),
                return_context_logits=sampling.return_context_logits,
            )
            outputs = output if isinstance(output, dict) else {"logits": output}
            first = fake.drop_rows
            if self.kv.enable_block_reuse or fake.force_reuse:  # with only a line in the log
                block = self.kv.tokens_per_block
                first += max((_common(ids, old) // block * block for old in self.seen), default=0)
            self.seen.append(ids)
            if sampling.return_context_logits:
                request.context_logits = outputs["logits"][first:] + (0.0 if request.alone else fake.leak)
            if sampling.additional_model_outputs and len(ids) >= fake.no_hidden_below:
                if not self.args.disable_overlap_scheduler:
                    raise RequestError("additional outputs need disable_overlap_scheduler")
                request.outputs[0].additional_context_outputs = {
                    name: fake.hidden_scale * outputs[name][first:].cpu() for name in sampling.additional_model_outputs
                }

        def shutdown(self) -> None:
            self.shut_down = True
            if fake.shutdown == "hangs":
                threading.Event().wait()
            if fake.shutdown == "raises":
                raise RuntimeError("nobody is there to be shut down")

    modeling = ModuleType("tensorrt_llm._torch.models.modeling_utils")
    on_demand = API["eras"][era]["models_on_demand"]

    def register_auto_model(name: str) -> Any:
        def decorate(cls: Any) -> Any:
            if name in fake.mapping and on_demand and cls.__module__ == __name__:
                return cls  # TensorRT-LLM's own never replace what came from outside
            fake.mapping[name] = cls
            return cls

        return decorate

    contents: dict[str, dict[str, Any]] = {
        "tensorrt_llm": {"LLM": LLM, "SamplingParams": SamplingParams, "__version__": f"era {era}", "__path__": []},
        "tensorrt_llm.llmapi": {"KvCacheConfig": KvCacheConfig},
        "tensorrt_llm.executor": {"__path__": []},
        "tensorrt_llm.executor.utils": {"RequestError": RequestError},
        "tensorrt_llm._torch": {"__path__": []},
        "tensorrt_llm._torch.models": {"__path__": [], "modeling_utils": modeling},
    }
    if on_demand:
        modeling.get_registered_model_class = lambda name: fake.mapping.setdefault(name, STOCK.get(name))  # type: ignore[attr-defined]
    else:
        fake.mapping.update(STOCK)
    modeling.MODEL_CLASS_MAPPING = fake.mapping  # type: ignore[attr-defined]
    modeling.DecoderModelForCausalLM = DecoderModelForCausalLM  # type: ignore[attr-defined]
    modeling.register_auto_model = register_auto_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, modeling.__name__, modeling)
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return fake


def _common(a: list[int], b: list[int]) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# --- engines -----------------------------------------------------------------------------------------------------
def settings(path: Path, **fields: Any) -> TeacherConfig:
    tensorrt_llm = {"max_batch_tokens": 100, **fields.pop("tensorrt_llm", {})}
    value = {"path": path, "engine": "tensorrt_llm", "max_tokens_per_item": 64, "tensorrt_llm": tensorrt_llm, **fields}
    return parse_config(TeacherConfig, value, source="test")


def engine_of(path: Path, *, deterministic: bool = False, stays_loaded: bool = True, **fields: Any) -> TensorRtEngine:
    return TensorRtEngine("t", settings(path, **fields), path, deterministic=deterministic, stays_loaded=stays_loaded)


def wrapped(path: Path, **fields: Any) -> TensorRtEngine:
    return engine_of(path, tensorrt_llm={"hidden_states": True}, **fields)


def job(ids: Sequence[int], signal: Signal = Signal.LOGITS, **fields: Any) -> ScoreJob:
    top_k = 3 if signal is Signal.TOP_K_LOGPROBS else 0
    base: dict[str, Any] = {"dtype": "float32", "top_k": top_k, **fields}
    return ScoreJob(token_ids=tuple(ids), predicting_positions=(0, *range(2, len(ids) - 1)), signal=signal, **base)


def answers_of(engine: Any, jobs: Sequence[ScoreJob]) -> list[dict[str, np.ndarray]]:
    answers = engine.score(jobs)
    assert not [answer for answer in answers if isinstance(answer, OpdError)], answers
    return answers


def assert_same(ours: Sequence[dict[str, np.ndarray]], theirs: Sequence[dict[str, np.ndarray]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-4, err_msg=name)
