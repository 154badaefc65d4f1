"""The vLLM engine against the recorded API: it asks rightly, checks what it gets, and loses or mislabels no token.

What the real package does can only be seen on a GPU: tests/gpu/test_vllm_engine.py.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_fake
from safetensors.torch import load_file
from tiny_models import EOS_ID, logits_of, save_tiny_checkpoint, tiny_model
from torch import Tensor
from vllm_fake import Fake

from opd_mesh.config.base import parse_config
from opd_mesh.config.services import RolloutServerConfig
from opd_mesh.errors import (
    ConfigError,
    CorruptWeightsError,
    DivergedError,
    InternalError,
    InvalidInputError,
    PreconditionError,
    RequestConflictError,
    TooLongError,
)
from opd_mesh.models.checkpoint import load_causal_lm, served_tensors
from opd_mesh.trajectory import FinishReason, SamplingParams
from rollout_server import vllm_runtime
from rollout_server.decode_engine import DecodeEngine
from rollout_server.engine import GenerationRequest, TokenEvent
from rollout_server.engines import build_engine
from rollout_server.generation import WrittenToken
from rollout_server.vllm_engine import VllmEngine

VALID, PADDED = 131, 140
PROMPT = (5, 9, 12, 40, 41)
EngineMaker = Callable[..., VllmEngine]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("students")
    save_tiny_checkpoint(root / "llama", "llama", 0, vocab_size=PADDED, tokenizer_vocab_size=VALID)
    return root / "llama"


@pytest.fixture(scope="module")
def other() -> Any:
    """The model that a policy makes of it."""
    return tiny_model("llama", 7, vocab_size=PADDED)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setattr(vllm_runtime, "visible_gpus", lambda: 2)
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_WORKER_MULTIPROC_METHOD"):
        monkeypatch.setenv(name, "")  # so that what the engine sets is taken back
        monkeypatch.delenv(name)
    return vllm_fake.install(monkeypatch)


def config_of(folder: Path, weights_dir: Path, *, deterministic: bool = False, **engine: Any) -> RolloutServerConfig:
    vllm = {"weights_dir": weights_dir, "swap_timeout_s": 20.0, **engine.pop("vllm", {})}
    value = {"engine": "vllm", "max_slots": 4, "max_context_tokens": 64, "vllm": vllm, **engine}
    return parse_config(
        RolloutServerConfig, {"model": folder, "engine": value, "deterministic": deterministic}, source="test"
    )


@pytest.fixture
def make(fake: Fake, folder: Path, tmp_path: Path) -> Iterator[EngineMaker]:
    made: list[VllmEngine] = []

    def engine_of(path: Path = folder, *, deterministic: bool = False, **settings: Any) -> VllmEngine:
        config = config_of(path, tmp_path / "policies", **settings)
        engine = VllmEngine(
            load_causal_lm(path),
            settings=config.engine,
            policy_version=3,
            valid_vocab_size=VALID,
            deterministic=deterministic,
        )
        made.append(engine)
        return engine

    yield engine_of
    for engine in made:
        engine.close()


def request(name: str, prompt: Sequence[int] = PROMPT, *, written: Sequence[int] = (), **sampling: Any) -> Any:
    tokens = tuple(WrittenToken(token, -1.0, -1.0, 3) for token in written)
    return GenerationRequest(name, tuple(prompt), SamplingParams(**{"max_new_tokens": 8, **sampling}), tokens)


def finish(engine: VllmEngine, *requests: GenerationRequest) -> dict[str, list[TokenEvent]]:
    """Submit, and step until nothing is left."""
    for one in requests:
        engine.submit(one)
    events: dict[str, list[TokenEvent]] = {}
    deadline = time.monotonic() + 30
    while not engine.idle:
        step = engine.step()
        assert len({event.request_id for event in step}) == len(step)
        for event in step:
            events.setdefault(event.request_id, []).append(event)
        assert time.monotonic() < deadline
    return events


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def take(engine: VllmEngine, count: int) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    until(lambda: len(events.extend(engine.step()) or events) >= count)
    return events


def submit_at_rest(fake: Fake, engine: VllmEngine, *requests: GenerationRequest) -> None:
    """The core has all of them, and takes no step before ``fake.steps`` says so."""
    fake.steps = 0
    for one in requests:
        engine.submit(one)
    until(lambda: len(fake.llms[0].requests) == len(requests))


def ids_of(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]


def logprobs(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    rows = logits_of(model, [*prompt, *ids])[len(prompt) - 1 : -1, :VALID].log_softmax(-1)
    return rows.gather(1, torch.tensor(list(ids))[:, None])[:, 0]


# --- answers -----------------------------------------------------------------------------------------------------
def test_greedy_answers_are_the_models(fake: Fake, make: EngineMaker, folder: Path) -> None:
    model = load_causal_lm(folder).model
    engine = make(max_slots=2)
    prompts = {"a": PROMPT, "b": (7, 8), "c": tuple(range(4, 30)), "d": (99,)}
    answers = finish(engine, *(request(name, ids, temperature=0.0) for name, ids in prompts.items()))
    for name, prompt in prompts.items():
        events, context = answers[name], list(prompt)
        for event in events:
            assert event.token_id == int(logits_of(model, context)[-1, :VALID].argmax())
            context.append(event.token_id)
        assert [event.position for event in events] == list(range(8))
        assert [event.finish_reason for event in events] == [None] * 7 + [FinishReason.LENGTH]
        assert {event.policy_version for event in events} == {3}
        assert {event.sampling_logprob for event in events} == {0.0}
        ours = torch.tensor([event.policy_logprob for event in events])
        torch.testing.assert_close(ours, logprobs(model, prompt, ids_of(events)), rtol=0, atol=1e-4)
    assert fake.llms[0].most_running == 2
    assert engine.counters.tokens == 32
    assert engine.counters.prefill_tokens == sum(len(ids) for ids in prompts.values())


def test_sampled_answers_bear_both_log_probabilities_without_the_padding(
    fake: Fake, make: EngineMaker, folder: Path
) -> None:
    model = load_causal_lm(folder).model
    answers = finish(make(), *(request(str(seed), seed=seed, max_new_tokens=20) for seed in range(12)))
    assert len({tuple(ids_of(events)) for events in answers.values()}) == 12
    for events in answers.values():
        assert max(ids_of(events)) < VALID
        ours = torch.tensor([event.policy_logprob for event in events])
        torch.testing.assert_close(ours, logprobs(model, PROMPT, ids_of(events)), rtol=0, atol=1e-4)
        assert [event.sampling_logprob for event in events] == [event.policy_logprob for event in events]


def test_the_stop_token_is_part_of_the_answer_and_nothing_else_stops_it(
    fake: Fake, make: EngineMaker, folder: Path
) -> None:
    engine = make()
    whole = ids_of(finish(engine, request("a", seed=5, max_new_tokens=20))["a"])
    assert len(whole) == 20
    stop = whole[6]
    events = finish(engine, request("b", seed=5, max_new_tokens=20, stop_token_ids=(stop, 10**6, -7)))["b"]
    assert ids_of(events) == whole[: whole.index(stop) + 1]
    assert events[-1].finish_reason is FinishReason.STOP
    assert fake.llms[0].sampling[-1].ignore_eos
    # The model's own end of text stops only where it was asked for.
    assert EOS_ID not in fake.llms[0].sampling[-2].stop_token_ids


@pytest.mark.parametrize("by_position", [True, False])
def test_a_resumed_answer_goes_on_with_other_noise(fake: Fake, make: EngineMaker, by_position: bool) -> None:
    fake.by_position = by_position
    engine = make()
    whole = ids_of(finish(engine, request("a", seed=5))["a"])
    (rest,) = finish(engine, request("b", seed=5, written=whole[:3])).values()
    assert [event.position for event in rest] == [3, 4, 5, 6, 7]
    assert fake.llms[0].prompts[-1] == [*PROMPT, *whole[:3]]
    first, second = fake.llms[0].sampling[-2:]
    assert second.max_tokens == 5
    # The newer model runner keys noise by position, and so an interruption changes nothing.
    assert (first.seed == second.seed) is by_position
    assert (ids_of(rest) == whole[3:]) is by_position


def test_a_delta_of_several_tokens_comes_one_by_one(fake: Fake, make: EngineMaker) -> None:
    engine = make()
    engine.submit(request("a", seed=1))
    engine.submit(request("b", seed=2, max_new_tokens=4))
    until(lambda: engine._received.qsize() == 12)
    steps = [engine.step() for _ in range(8)]
    assert [len(step) for step in steps] == [2, 2, 2, 2, 1, 1, 1, 1]
    assert [event.position for step in steps for event in step if event.request_id == "a"] == list(range(8))
    assert engine.idle
    assert engine.step() == []


def test_running_and_waiting(fake: Fake, make: EngineMaker) -> None:
    engine = make(max_slots=2)
    fake.steps = 0
    for name in "abc":
        engine.submit(request(name))
    assert (engine.running, engine.waiting, engine.idle) == (2, 1, False)
    with pytest.raises(RequestConflictError, match="in progress"):
        engine.submit(request("a"))
    fake.steps = None
    finish(engine)
    assert (engine.running, engine.waiting, engine.idle) == (0, 0, True)


def test_a_cancelled_request_is_aborted_and_says_nothing_more(fake: Fake, make: EngineMaker) -> None:
    engine = make()
    aborted = fake.llms[0].aborted
    submit_at_rest(fake, engine, request("a"), request("b"))
    fake.steps = 3
    until(lambda: engine._received.qsize() == 6)
    assert len(engine.step()) == 2
    assert engine.cancel("a")
    assert not engine.cancel("a")
    until(lambda: fake.llms[0].aborted == aborted + 1)
    engine.submit(request("a", seed=9, max_new_tokens=2))  # the name is free
    fake.steps = None
    answers = finish(engine)
    assert [event.position for event in answers["a"]] == [0, 1]
    assert [event.position for event in answers["b"]] == list(range(1, 8))


# --- refusals ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "value"), [("temperature", 0.7), ("temperature", 1.5), ("top_p", 0.9), ("top_k", 5)])
def test_what_would_need_a_second_log_probability_is_refused(make: EngineMaker, name: str, value: float) -> None:
    engine = make()
    for call in (engine.check_request, engine.submit):
        with pytest.raises(InvalidInputError, match="engine: transformers") as caught:
            call(request("a", **{name: value}))
        assert caught.value.field == f"sampling.{name}"
    assert engine.idle
    if name != "temperature":
        engine.check_request(request("a", **{"temperature": 0.0, name: value}))  # greedy: it changes nothing


def test_a_grammar_is_refused(make: EngineMaker) -> None:
    engine = make()
    assert not engine.takes_grammars
    for temperature in (0.0, 1.0):
        with pytest.raises(InvalidInputError, match="engine: transformers") as caught:
            engine.check_request(request("a", temperature=temperature, grammar='start: "a"', stop_token_ids=(2,)))
        assert caught.value.field == "sampling.grammar"


def test_a_mask_that_is_to_be_kept_is_refused(make: EngineMaker) -> None:
    engine = make()
    assert engine.max_kept_ids == 0
    for temperature in (0.0, 1.0):
        with pytest.raises(InvalidInputError, match="engine: transformers") as caught:
            engine.check_request(request("a", temperature=temperature, top_k=5, keep_mask=True))
        assert caught.value.field == "sampling.keep_mask"


def test_requests_that_cannot_be_met(make: EngineMaker) -> None:
    engine = make()
    with pytest.raises(TooLongError):
        engine.submit(request("a", range(4, 62)))
    with pytest.raises(InvalidInputError, match="outside the vocabulary"):
        engine.submit(request("a", (VALID,)))
    longest = finish(engine, request("a", range(4, 60)))["a"]
    assert longest[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("field", "message", "settings"),
    [
        ("engine.device", "runs on GPUs", {"device": "cpu"}),
        ("engine.keep_kv_on_update", "reads every context again", {"keep_kv_on_update": True}),
        ("engine.engine", "needs 4 NVIDIA GPU", {"vllm": {"tensor_parallel_size": 4}}),
        ("deterministic", "VLLM_BATCH_INVARIANT=1", {"deterministic": True}),
    ],
)
def test_settings_that_vllm_cannot_meet(make: EngineMaker, field: str, message: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make(**settings)
    assert caught.value.field == field


def test_deterministic_is_vllms_batch_invariance(fake: Fake, make: EngineMaker) -> None:
    fake.batch_invariant = True
    assert make(deterministic=True).deterministic
    fake.by_position = False
    with pytest.raises(ConfigError, match="older model runner"):
        make(deterministic=True)
    assert fake.llms[1].shut_down


def test_without_vllm_or_with_another(monkeypatch: pytest.MonkeyPatch, fake: Fake, make: EngineMaker) -> None:
    vllm_fake.install(monkeypatch, version="0.34.1")
    with pytest.raises(ConfigError, match=r"written for vLLM 0.33, here is 0.34.1.*opd-mesh\[vllm\]"):
        make()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"needs the package vllm.*opd-mesh\[vllm\].*docs/engines.md"):
        make()


def test_the_engine_is_chosen_by_its_name(fake: Fake, folder: Path, tmp_path: Path) -> None:
    loaded = build_engine(config_of(folder, tmp_path))
    assert isinstance(loaded.engine, VllmEngine)
    loaded.engine.close()
    value = {"model": folder, "engine": {"max_context_tokens": 64, "cache_bytes": "64MiB"}}
    plain = build_engine(parse_config(RolloutServerConfig, value, source="test"))
    assert isinstance(plain.engine, DecodeEngine)
    for one in (loaded, plain):
        assert (one.vocab_size, one.base_digest) == (VALID, load_causal_lm(folder).weights_digest)
        assert one.base is not None
        assert {name: tuple(tensor.shape) for name, tensor in one.base.items()} == one.engine.tensor_shapes
    assert loaded.tokenizer_fingerprint == plain.tokenizer_fingerprint


def test_what_is_missing_is_said_before_the_checkpoint_is_read(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_runtime, "visible_gpus", lambda: 0)
    with pytest.raises(ConfigError, match="needs 1 NVIDIA GPU"):
        build_engine(config_of(tmp_path / "absent", tmp_path))


def test_an_argument_that_is_not_recorded_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, make: EngineMaker) -> None:
    names = tuple(name for name in vllm_fake.AsyncEngineArgs.NAMES if name != "logprobs_mode")
    monkeypatch.setattr(vllm_fake.AsyncEngineArgs, "NAMES", names)
    with pytest.raises(PreconditionError, match=r"vLLM 0.33.0 cannot load .*logprobs_mode"):
        make()


def test_the_arguments(fake: Fake, make: EngineMaker) -> None:
    make(cache_bytes=1 << 30, vllm={"tensor_parallel_size": 2})
    args = fake.llms[0].args
    assert (args.kv_cache_memory_bytes, args.gpu_memory_utilization) == (1 << 29, None)
    assert (args.max_num_seqs, args.max_model_len, args.max_num_batched_tokens) == (4, 64, 2048 + 4)
    make(vllm={"gpu_memory_utilization": 0.5})
    args = fake.llms[1].args
    assert (args.kv_cache_memory_bytes, args.gpu_memory_utilization) == (None, 0.5)
    assert not args.trust_remote_code
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_models_that_vllm_could_not_serve(
    fake: Fake, make: EngineMaker, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_runtime, "MAX_PADDING_IDS", PADDED - VALID - 1)
    with pytest.raises(ConfigError, match=r"at most 8 ids.*and 9 of this model's"):
        make()
    monkeypatch.setattr(vllm_runtime, "check_safetensors", lambda path: {"lm_head.weight"})
    with pytest.raises(ConfigError, match="has none of the name model"):
        make()


def test_log_probabilities_that_are_not_the_models_are_found_on_load(fake: Fake, make: EngineMaker) -> None:
    fake.unmasked = True
    with pytest.raises(InternalError, match=r"differ from the model's by|wrote id"):
        make(vllm={"enforce_eager": True})
    assert fake.llms[0].shut_down


# --- policies ----------------------------------------------------------------------------------------------------
def test_a_swap_between_two_tokens(fake: Fake, make: EngineMaker, folder: Path, other: Any) -> None:
    model = load_causal_lm(folder).model
    engine = make()
    policy = engine.prepare_policy(dict(served_tensors(other)))
    a, b = request("a", seed=1), request("b", (7, 8), temperature=0.0)
    submit_at_rest(fake, engine, a, b, request("done", max_new_tokens=3))
    fake.steps = 1
    before = take(engine, 3)
    fake.steps = 2
    until(lambda: engine._received.qsize() == 6)  # drawn by the old weights, and not taken yet
    engine.swap_policy(policy, 4)
    fake.steps = None
    assert fake.llms[0].calls[-4:] == ["pause abort", "reload_weights", "version 4", "resume"]
    answers = finish(engine)
    for name, prompt in (("a", PROMPT), ("b", (7, 8))):
        events = [event for event in before if event.request_id == name] + answers[name]
        assert [event.position for event in events] == list(range(8))
        old = [event for event in events if event.policy_version == 3]
        new = [event for event in events if event.policy_version == 4]
        assert events == old + new
        assert len(old) == 3
        ids = ids_of(events)
        ours = torch.tensor([event.policy_logprob for event in events])
        torch.testing.assert_close(ours[:3], logprobs(model, prompt, ids[:3]), rtol=0, atol=1e-4)
        # Every key and value is of the new weights, those of the old tokens too.
        torch.testing.assert_close(ours[3:], logprobs(other, prompt, ids)[3:], rtol=0, atol=1e-4)
        assert [*prompt, *ids[:3]] in fake.llms[0].prompts
    assert [event.policy_version for event in answers["done"]][-1] == 3
    assert engine.counters.swap_seconds > 0


def test_requests_that_come_while_vllm_is_pausing(fake: Fake, make: EngineMaker, other: Any) -> None:
    engine = make()
    policy = engine.prepare_policy(dict(served_tensors(other)))
    for number in range(20):  # they are on their way to the core when the pause begins
        engine.submit(request(str(number), seed=number, max_new_tokens=3))
    engine.swap_policy(policy, 4)
    answers = finish(engine)
    assert len(answers) == 20
    for events in answers.values():
        assert [event.position for event in events] == [0, 1, 2]
        assert not [event for event in events if event.error]
        assert events[-1].policy_version == 4


def test_weights_that_are_left_out_stay(fake: Fake, make: EngineMaker, folder: Path, other: Any) -> None:
    engine = make()
    own, tensors = load_file(folder / "model.safetensors"), dict(served_tensors(other))
    name = "model.layers.0.self_attn.q_proj.weight"  # a part of a fused weight
    early = engine.prepare_policy({name: tensors[name].double()})
    engine.swap_policy(engine.prepare_policy({"model.norm.weight": tensors["model.norm.weight"]}), 4)
    engine.swap_policy(early, 5)  # prepared before the other one came
    held = dict(fake.llms[0].model.named_parameters())
    for key, tensor in own.items():
        expected = tensors[key] if key in (name, "model.norm.weight") else tensor
        torch.testing.assert_close(held[key].detach(), expected, rtol=0, atol=0)
    assert engine.tensor_shapes == {key: tuple(tensor.shape) for key, tensor in own.items()}


def test_policies_that_are_refused(make: EngineMaker, other: Any) -> None:
    engine = make()
    tensors = dict(served_tensors(other))
    name = "model.norm.weight"
    for bad, error, field in (
        ({"model.norm": tensors[name]}, InvalidInputError, "tensors[model.norm]"),
        ({name: tensors[name][1:]}, InvalidInputError, f"tensors[{name}]"),
        ({name: tensors[name] / 0}, CorruptWeightsError, f"tensors[{name}]"),
        ({name: tensors[name].double() * 1e300}, CorruptWeightsError, f"tensors[{name}]"),  # beyond float32
    ):
        with pytest.raises(error) as caught:
            engine.prepare_policy(bad)
        assert caught.value.field == field


def test_a_policy_leaves_no_files_behind(make: EngineMaker, tmp_path: Path, other: Any) -> None:
    engine = make()
    tensors = dict(served_tensors(other))
    folders = tmp_path / "policies"
    for version in (4, 5, 6):
        policy = engine.prepare_policy(tensors)
        assert len(list(folders.iterdir())) <= 2
        engine.swap_policy(policy, version)
    unused = engine.prepare_policy(tensors)
    del unused, policy
    assert len(list(folders.iterdir())) == 1  # what is served
    engine.close()
    assert not list(folders.iterdir())


def test_a_policy_that_finds_no_room(
    make: EngineMaker, tmp_path: Path, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vllm_runtime, "save_file", full)
    with pytest.raises(InternalError, match=r"No space left on device.*weights_dir"):
        engine.prepare_policy(dict(served_tensors(other)))
    assert not list((tmp_path / "policies").iterdir())


def test_tensors_that_share_memory_are_written(make: EngineMaker, other: Any) -> None:
    engine = make()
    tensors = dict(served_tensors(other))
    one, two = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    shared = torch.randn(2 * tensors[one].numel())
    policy = engine.prepare_policy({one: shared[: tensors[one].numel()], two: shared[::2]})
    written = load_file(policy.files.paths[0])
    torch.testing.assert_close(written[two], shared[::2])


@pytest.mark.parametrize("way", ["refuses", "hangs"])
def test_a_swap_that_fails_ends_the_engine_and_blames_no_request(
    fake: Fake, make: EngineMaker, other: Any, way: str
) -> None:
    engine = make(vllm={"swap_timeout_s": 20.0 if way == "refuses" else 0.2})
    policy = engine.prepare_policy(dict(served_tensors(other)))
    fake.steps = 1
    engine.submit(request("a"))
    assert take(engine, 1)[0].error is None
    fake.refuses, fake.hangs = way == "refuses", way == "hangs"
    message = {"refuses": "RuntimeError: .*out of memory", "hangs": "TimeoutError"}[way]
    with pytest.raises(InternalError, match=f"could not be swapped in: {message}"):
        engine.swap_policy(policy, 4)
    engine.submit(request("late"))
    assert not engine.idle  # so that the server hears of it
    for _ in range(2):
        with pytest.raises(InternalError, match="restart the server"):
            engine.step()
    with pytest.raises(InternalError, match="restart the server"):
        engine.swap_policy(policy, 5)


# --- pauses ------------------------------------------------------------------------------------------------------
def test_nothing_is_drawn_during_a_pause(fake: Fake, make: EngineMaker) -> None:
    engine, llm = make(), fake.llms[0]
    undisturbed = {name: ids_of(events) for name, events in finish(engine, request("a", seed=1)).items()}
    submit_at_rest(fake, engine, request("a", seed=1))
    fake.steps = 3
    until(lambda: engine._received.qsize() == 3)
    read, aborted = len(llm.prompts), llm.aborted
    engine.pause()
    engine.pause()
    assert llm.calls.count("pause keep") == 1
    fake.steps = 5
    engine.submit(request("b", seed=2))
    engine.submit(request("cancelled"))
    assert engine.cancel("cancelled")
    time.sleep(0.05)
    assert (fake.steps, engine._received.qsize(), len(llm.prompts)) == (5, 3, read)
    fake.steps = None
    engine.resume()
    engine.resume()
    assert llm.calls[-2:] == ["pause keep", "resume"]
    answers = finish(engine)
    assert ids_of(answers["a"]) == undisturbed["a"]
    assert len(answers["b"]) == 8
    # Its keys and values were kept: only the new one was read.
    assert (len(llm.prompts), llm.aborted) == (read + 1, aborted)


def test_requests_that_a_pause_overtakes(fake: Fake, make: EngineMaker) -> None:
    engine = make()
    for number in range(20):  # they are on their way to the core when the pause begins
        engine.submit(request(str(number), seed=number, max_new_tokens=3))
    engine.pause()
    engine.resume()
    answers = finish(engine)
    assert [[event.position for event in events] for events in answers.values()] == [[0, 1, 2]] * 20
    assert not [event for events in answers.values() for event in events if event.error]


def test_a_swap_during_a_pause(fake: Fake, make: EngineMaker, other: Any) -> None:
    engine = make()
    submit_at_rest(fake, engine, request("a"))
    fake.steps = 2
    until(lambda: engine._received.qsize() == 2)
    engine.pause()
    engine.submit(request("b"))
    fake.steps = None
    engine.swap_policy(engine.prepare_policy(dict(served_tensors(other))), 4)
    time.sleep(0.05)
    assert fake.llms[0].paused
    assert fake.llms[0].requests == {}
    engine.resume()
    answers = finish(engine)
    assert [event.policy_version for event in answers["a"]] == [3] * 2 + [4] * 6
    assert [event.policy_version for event in answers["b"]] == [4] * 8
    assert not [event for events in answers.values() for event in events if event.error]


def test_a_pause_that_fails_ends_the_engine(fake: Fake, make: EngineMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()

    async def fail(self: Any, **_: Any) -> None:
        raise vllm_fake.EngineDeadError

    monkeypatch.setattr(vllm_fake.AsyncLLM, "pause_generation", fail)
    with pytest.raises(InternalError, match="could not be paused: EngineDeadError"):
        engine.pause()
    engine.resume()
    assert not engine.idle
    with pytest.raises(InternalError, match="restart the server"):
        engine.step()


def test_close_during_a_pause(fake: Fake, make: EngineMaker) -> None:
    engine = make()
    engine.pause()
    engine.submit(request("a"))
    engine.close()
    stream = engine._live["a"]
    assert stream.reading is not None
    assert stream.reading.cancelled()
    assert not engine._thread.is_alive()


# --- failures ----------------------------------------------------------------------------------------------------
def test_one_request_fails_alone(fake: Fake, make: EngineMaker) -> None:
    engine = make()
    fake.fails = 66
    answers = finish(engine, request("bad", (66, 5)), request("good"))
    (failed,) = answers["bad"]
    assert isinstance(failed.error, InternalError)
    assert "illegal memory access" in str(failed.error)
    assert (failed.position, failed.token_id) == (0, -1)
    assert len(answers["good"]) == 8


def test_a_dead_engine_fails_the_step_and_no_request(fake: Fake, make: EngineMaker) -> None:
    engine = make()
    submit_at_rest(fake, engine, request("a"), request("b"))
    fake.steps = 2
    events = take(engine, 4)
    fake.steps = 1
    until(lambda: engine._received.qsize() == 2)
    fake.dies, fake.steps = True, None
    until(lambda: bool(engine._dead))
    events += engine.step()  # what came before it died
    assert [event.error for event in events] == [None] * 6
    for _ in range(2):
        with pytest.raises(InternalError, match="vLLM is dead: EngineDeadError"):
            engine.step()


def test_logits_that_are_not_numbers(fake: Fake, make: EngineMaker) -> None:
    engine = make()
    fake.nan = True
    aborted = fake.llms[0].aborted
    (failed,) = finish(engine, request("a"))["a"]
    assert isinstance(failed.error, DivergedError)
    until(lambda: fake.llms[0].aborted == aborted + 1)  # it does not go on for nobody


@pytest.mark.parametrize("reason", ["stop", "length", "error", "abort", "repetition"])
def test_answers_that_vllm_ends_by_itself(fake: Fake, make: EngineMaker, reason: str) -> None:
    engine = make()
    fake.ends = reason
    token, failed = finish(engine, request("a"))["a"]
    assert token.error is None
    assert isinstance(failed.error, InternalError)
    assert failed.position == 1


def test_tokens_of_another_policy_than_was_asked_for(fake: Fake, make: EngineMaker) -> None:
    engine = make()
    fake.llms[0].version = "2"
    *_, failed = finish(engine, request("a", max_new_tokens=2))["a"]
    assert "wrote under policy 2, asked for 3" in str(failed.error)


def test_close_ends_vllm_and_what_runs(fake: Fake, make: EngineMaker) -> None:
    engine = make()
    fake.steps = 1
    engine.submit(request("a"))
    take(engine, 1)
    engine.close()
    engine.close()
    assert fake.llms[0].shut_down
    assert not engine._thread.is_alive()
