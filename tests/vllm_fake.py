"""A ``vllm`` package made of the recorded API, which answers by a tiny transformers model on the CPU.

Recorded from the sources in vLLM 0.33.0's wheel (vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64), which were read and
never run; file names are inside its ``vllm`` package:

- names of arguments: ``EngineArgs`` and ``AsyncEngineArgs`` in ``engine/arg_utils.py``, ``SamplingParams`` in
  ``sampling_params.py``, in their order; one that is not among them is refused, as a dataclass and a Struct refuse it;
- ``AsyncLLM``'s methods, with their signatures: ``v1/engine/async_llm.py``;
- ``reload_weights``'s parameters: ``v1/worker/gpu/model_runner.py``; that parts of a fused weight do not come back, and
  that names it lacks give only a warning: ``model_executor/model_loader/reload``;
- outputs: ``outputs.py``, ``logprobs.py``; deltas that nobody read are joined: ``RequestOutputCollector`` in
  ``v1/engine/output_processor.py``;
- pausing, and what it does to requests that run and that come: ``v1/engine/core.py``;
- sampling: ``v1/worker/gpu/sample`` (noise by seed and position) and ``v1/sample`` (a generator for each request);
- exceptions: ``exceptions.py`` and ``v1/engine/exceptions.py``; which of them ``generate`` lets through, and that it
  aborts its request when cancelled or closed: ``async_llm.py``.

It is no proof that the real one behaves so.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ENGINE_ARGS = """
model enable_return_routed_experts return_sampling_mask model_weights served_model_name tokenizer hf_config_path
runner convert skip_tokenizer_init enable_prompt_embeds tokenizer_mode trust_remote_code allowed_local_media_path
allowed_media_domains download_dir safetensors_load_strategy safetensors_prefetch_num_threads
safetensors_prefetch_block_size load_format config_format dtype kv_cache_dtype seed max_model_len
cudagraph_capture_sizes max_cudagraph_capture_size ir_op_priority distributed_executor_backend pipeline_parallel_size
master_addr master_port nnodes node_rank distributed_timeout_seconds cpu_distributed_timeout_seconds numa_bind
numa_bind_nodes numa_bind_cpus device_ids tensor_parallel_size prefill_context_parallel_size
decode_context_parallel_size dcp_comm_backend dcp_q_replicate dcp_kv_cache_interleave_size cp_kv_cache_interleave_size
data_parallel_size data_parallel_rank data_parallel_start_rank data_parallel_size_local data_parallel_address
data_parallel_rpc_port data_parallel_hybrid_lb data_parallel_external_lb data_parallel_multi_port_external_lb
data_parallel_backend enable_hc_sp enable_expert_parallel enable_batch_sharded_sampling enable_ep_weight_filter
moe_backend linear_backend sparse_indexer_topk_backend all2all_backend enable_elastic_ep elastic_ep_max_dp_size
enable_dbo ubatch_size dbo_decode_token_threshold dp_sync_interval dbo_prefill_token_threshold
disable_nccl_for_dp_synchronization eplb_config enable_eplb expert_placement_strategy max_parallel_loading_workers
block_size enable_prefix_caching prefix_caching_hash_algo prefix_cache_retention_interval disable_sliding_window
disable_cascade_attn offload_backend cpu_offload_gb cpu_offload_params offload_group_size offload_num_in_group
offload_prefetch_step offload_params gpu_memory_utilization kv_cache_memory_bytes max_num_batched_tokens
max_num_scheduled_tokens long_prefill_token_threshold long_prefill_token_threshold_adaptive max_num_seqs
max_num_active_seqs max_num_queued_reqs max_num_queued_tokens max_logprobs logprobs_mode use_fp64_gumbel
enable_trace_replay disable_log_stats aggregate_engine_logging revision code_revision hf_token hf_overrides
model_class_overrides tokenizer_revision quantization quantization_config allow_deprecated_quantization enforce_eager
disable_custom_all_reduce enable_shm_tensor_arena language_model_only limit_mm_per_prompt enable_mm_embeds
interleave_mm_strings media_io_kwargs mm_processor_kwargs mm_processor_cache_gb mm_processor_cache_type
mm_hasher_algorithm mm_shm_cache_max_object_size_mb mm_encoder_only mm_encoder_tp_mode mm_encoder_attn_backend
mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin
io_processor_plugin renderer_num_workers skip_mm_profiling video_pruning_rate video_pruning_method mm_tensor_ipc
mm_processor_device mm_ipc_gpu_memory_gb mm_device_do_normalize enable_lora max_loras max_lora_rank default_mm_loras
fully_sharded_loras max_cpu_loras lora_dtype lora_target_modules enable_tower_connector_lora specialize_active_lora
enable_mixed_moe_lora_format enable_moe_shared_loras max_lora_cls_labels ray_workers_use_nsight
num_gpu_blocks_override model_loader_extra_config ignore_patterns enable_chunked_prefill disable_chunked_mm_input
scheduler_reserve_full_isl prefill_schedule_interval watermark disable_hybrid_kv_cache_manager
structured_outputs_config aux_output_config reasoning_parser reasoning_parser_plugin speculative_config spec_method
spec_model spec_tokens watermark_config diffusion_config show_hidden_metrics_for_version otlp_traces_endpoint
collect_detailed_traces per_request_spec_decode_metrics kv_cache_metrics kv_cache_metrics_sample
custom_histogram_buckets cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics
enable_logging_iteration_details jit_monitor_mode jit_monitor_verbose enable_mm_processor_stats scheduling_policy
scheduler_cls pooler_config compilation_config attention_config engram_config mamba_config kernel_config
enable_flashinfer_autotune monokernel worker_cls worker_extension_cls profiler_config logging_config log_level
log_config_file kv_transfer_config kv_events_config ec_transfer_config ec_manager_config reasoning_config
generation_config enable_sleep_mode sleep_mode_backend sleep_mode_offload_cudagraph sleep_preserve_parameter_names
enable_cumem_allocator enable_nccl_comm_suspend override_generation_config model_impl attention_backend
kv_cache_dtype_skip_layers mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size prefix_match_unit mamba_cache_mode
enable_mamba_shared_prefix_checkpoint replayssm_buffer_len use_replayssm mamba_backend mamba_ssu_algorithm
enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds additional_config use_tqdm_on_load
pt_load_map_location logits_processors async_scheduling stream_interval kv_sharing_fast_prefill swa_bounded_replay
optimization_level performance_mode fault_tolerance_config enable_fault_tolerance kv_offloading_size
kv_offloading_backend tokens_only shutdown_timeout watchdog_config weight_transfer_config fail_on_environ_validation
gdn_prefill_backend kda_prefill_backend kda_decode_backend enable_log_requests
"""
SAMPLING_PARAMS = """
n presence_penalty frequency_penalty repetition_penalty temperature watermarking top_p top_k min_p seed stop
stop_token_ids ignore_eos max_tokens min_tokens logprobs prompt_logprobs prompt_logprob_token_ids prompt_logprob_start
logprob_token_ids flat_logprobs detokenize skip_special_tokens spaces_between_special_tokens
include_stop_str_in_output output_kind stream_interval skip_clone output_text_buffer_length structured_outputs
logit_bias allowed_token_ids extra_args bad_words skip_reading_prefix_cache thinking_token_budget repetition_detection
routed_experts_prompt_start trace_decode_token_ids
"""
LOGPROBS_MODES = ("raw_logits", "raw_logprobs", "processed_logits", "processed_logprobs")


class VLLMError(Exception):
    """``vllm.exceptions.VLLMError``."""


class VLLMClientError(VLLMError):
    """The request's fault."""


class VLLMServerError(VLLMError):
    """Not the request's fault."""


class VLLMValidationError(VLLMClientError):
    def __init__(self, message: str, *, parameter: str | None = None, value: Any = None) -> None:
        super().__init__(message)
        self.parameter, self.value = parameter, value


class GenerationError(VLLMServerError):
    """Finish reason "error"."""


class RetryableRequestError(GenerationError):
    """Nothing was run."""


class EngineGenerateError(VLLMServerError):
    """``generate`` failed; its cause is the reason."""


class EngineDeadError(VLLMServerError):
    def __init__(self, *args: Any) -> None:
        super().__init__("EngineCore encountered an issue. See stack trace (above) for the root cause.", *args)


class RequestOutputKind(Enum):
    CUMULATIVE, DELTA, FINAL_ONLY = 0, 1, 2


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class WeightVersionSpan:
    version: str
    start: int
    end: int


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    weight_versions: list[WeightVersionSpan] | None = None


class Named:
    """Arguments by the recorded names, the others None."""

    NAMES: tuple[str, ...] = ()

    def __init__(self, **given: Any) -> None:
        if unknown := given.keys() - set(self.NAMES):
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {min(unknown)!r}")
        self.__dict__.update(dict.fromkeys(self.NAMES), **given)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class AsyncEngineArgs(Named):
    NAMES = tuple(ENGINE_ARGS.split())


class SamplingParams(Named):
    NAMES = tuple(SAMPLING_PARAMS.split())

    def __init__(self, **given: Any) -> None:
        defaults = {"n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 16, "detokenize": True}
        super().__init__(**{**defaults, "ignore_eos": False, "output_kind": RequestOutputKind.CUMULATIVE, **given})
        if not 0 <= self.temperature <= 2:
            raise VLLMValidationError(f"temperature must be in [0, 2], got {self.temperature}.")
        if self.max_tokens < 1:
            raise VLLMValidationError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise OverflowError("seeds are kept as int64")
        if self.seed == -1:
            self.seed = None


# --- the package -------------------------------------------------------------------------------------------------
@dataclass
class Fake:
    """What happened to the package, and what is to go wrong with it.

    Attributes:
        by_position: the model runner: the newer draws noise by seed and position.
        batch_invariant: ``envs.VLLM_BATCH_INVARIANT``.
        steps: of the core that may still be taken; None: as many as there are.
        dies: at the next step.
        refuses: the next reload of weights.
        hangs: every reload of weights.
        fails: the next step of the request whose prompt begins with this id.
        nan: the logits are.
        ends: finish reason that comes after the next token of every request, whatever was asked for.
        unmasked: ``logit_bias`` does nothing.
    """

    by_position: bool = True
    batch_invariant: bool = False
    llms: list[AsyncLLM] = field(default_factory=list)
    steps: int | None = None
    dies: bool = False
    refuses: bool = False
    hangs: bool = False
    fails: int = -1
    nan: bool = False
    ends: str = ""
    unmasked: bool = False


class Request:
    """In the core, with the collector of its outputs."""

    def __init__(self, ids: list[int], sampling: Any) -> None:
        self.ids, self.sampling = list(ids), sampling
        self.written: list[int] = []
        self.versions: list[str] = []
        self.finished = False
        self.output: Any = None
        self.ready = asyncio.Event()
        self.generator = torch.Generator().manual_seed(sampling.seed or 0)

    def put(self, output: Any) -> None:
        if self.output is None or isinstance(output, Exception):
            self.output = output
        else:
            old, new = self.output.outputs[0], output.outputs[0]
            old.token_ids += new.token_ids
            old.logprobs = (old.logprobs or []) + (new.logprobs or [])
            old.finish_reason, old.weight_versions = new.finish_reason, new.weight_versions
            self.output.finished = output.finished
        self.ready.set()

    def deliver(self, tokens: list[int], rows: list[dict[int, Logprob]] | None, reason: str | None) -> None:
        spans = None
        if reason is not None:
            self.finished = True
            spans = []
            for index, version in enumerate(self.versions):
                if not spans or spans[-1].version != version:
                    spans.append(WeightVersionSpan(version, index, index))
                spans[-1].end = index + 1
        completion = CompletionOutput(0, "", tokens, None, rows, finish_reason=reason, weight_versions=spans)
        self.put(SimpleNamespace(request_id="", outputs=[completion], finished=self.finished))

    async def get(self) -> Any:
        while self.output is None:
            await self.ready.wait()
        output, self.output = self.output, None
        self.ready.clear()
        if isinstance(output, Exception):
            raise output
        return output


class AsyncLLM:
    """``v1/engine/async_llm.py``, its core in the same loop."""

    fake: Fake

    def __init__(self, args: Any) -> None:
        from transformers import AutoModelForCausalLM

        assert args.skip_tokenizer_init
        assert args.logprobs_mode in LOGPROBS_MODES
        self.args = args
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
        self.vocab_size = self.model.config.vocab_size
        self.vllm_config = SimpleNamespace(use_v2_model_runner=self.fake.by_position)
        self.requests: dict[str, Request] = {}
        self.calls: list[str] = []
        self.sampling: list[Any] = []
        self.prompts: list[list[int]] = []
        self.most_running = self.aborted = 0
        self.reloaded: list[Path] = []
        self.paused = self.dead = self.shut_down = False
        self.version = "default"
        self.cache: dict[tuple[int, ...], Tensor] = {}  # as if of keys and values: of other weights until it is cleared
        self.core = asyncio.get_running_loop().create_task(self._core())
        self.fake.llms.append(self)

    @classmethod
    def from_engine_args(
        cls,
        engine_args: Any,
        start_engine_loop: bool = True,
        usage_context: Any = None,
        stat_loggers: Any = None,
    ) -> AsyncLLM:
        assert isinstance(engine_args, AsyncEngineArgs)
        return cls(engine_args)

    def shutdown(self, timeout: float | None = None) -> None:
        self.shut_down = True
        self.core.cancel()

    async def generate(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: Any = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        kv_hints: Any = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[Any, None]:
        request: Request | None = None
        try:
            request = await self._add(request_id, prompt["prompt_token_ids"], sampling_params)
            finished = False
            while not finished:
                output = await request.get()
                finished = output.finished
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            if request is not None:
                await self.abort(request_id)
            raise
        except (EngineDeadError, VLLMClientError, GenerationError):
            raise
        except Exception as error:
            await self.abort(request_id)
            raise EngineGenerateError from error

    async def _add(self, request_id: str, ids: list[int], sampling: Any) -> Request:
        await asyncio.sleep(0)  # inputs are processed in another thread
        if self.dead:
            raise EngineDeadError
        if len(ids) >= self.args.max_model_len:
            raise VLLMValidationError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length")
        named = {*(sampling.stop_token_ids or ()), *(sampling.logit_bias or ())}
        if any(not 0 <= token < self.vocab_size for token in named):
            raise VLLMValidationError("out-of-vocab token ids")
        if len(sampling.logit_bias or ()) > 1024:  # raised in the core, which it ends
            self.dead = True
            raise EngineDeadError
        assert sampling.output_kind is RequestOutputKind.DELTA
        request = Request(ids, sampling)
        self.sampling.append(sampling)
        self.prompts.append(list(ids))
        if self.paused:
            raise RetryableRequestError("Generation is paused. Please retry after it resumes.")
        assert request_id not in self.requests
        self.requests[request_id] = request
        return request

    async def abort(self, request_id: str, internal: bool = False) -> None:
        if self.requests.pop(request_id, None) is not None:
            self.aborted += 1

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        assert mode in ("abort", "wait", "keep")
        self.calls.append(f"pause {mode}")
        self.paused = True
        if mode == "abort":
            for request in self.requests.values():
                request.deliver([], [], "abort")
            self.requests.clear()
        if clear_cache:
            self.cache.clear()
        await asyncio.sleep(0.02)

    async def resume_generation(self) -> None:
        self.calls.append("resume")
        self.paused = False

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.cache.clear()
        return True

    async def update_weight_version(self, new_version: str) -> None:
        assert isinstance(new_version, str)
        self.calls.append(f"version {new_version}")
        self.version = new_version

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        json.dumps([args, kwargs])  # what MessagePack does not know would be pickled, which is refused
        assert method == "reload_weights"
        self.calls.append(method)
        if self.fake.hangs:
            await asyncio.Event().wait()
        self._reload(*args, **(kwargs or {}))
        return [None]

    def _reload(
        self, weights_iterator: Any = None, weights_path: str | None = None, is_checkpoint_format: bool = True
    ) -> None:
        assert self.paused
        if self.fake.refuses:
            raise RuntimeError("Call to reload_weights failed: out of memory")
        assert weights_path is not None
        assert self.args.load_format == "safetensors"
        files = sorted(Path(weights_path).glob("*.safetensors"))
        assert files
        given = {name: tensor for file in files for name, tensor in load_file(file).items()}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                # With only a warning in the log.
                parameter.copy_(given[name]) if name in given else parameter.fill_(math.nan)
        self.reloaded.append(Path(weights_path))

    # --- the core ------------------------------------------------------------------------------------------------
    async def _core(self) -> None:
        while True:
            await asyncio.sleep(0.001)
            if self.paused or not self.requests or self.dead or self.fake.steps == 0:
                continue
            if self.fake.steps is not None:
                self.fake.steps -= 1
            if self.fake.dies:
                self.dead = True
                for request in self.requests.values():
                    request.put(EngineDeadError())
                continue
            running = list(self.requests.items())[: self.args.max_num_seqs]
            self.most_running = max(self.most_running, len(running))
            for request_id, request in running:
                if request.ids[0] == self.fake.fails:
                    request.put(RuntimeError("CUDA error: an illegal memory access was encountered"))
                    continue
                self._step(request)
                if request.finished:
                    del self.requests[request_id]

    @torch.inference_mode()
    def _step(self, request: Request) -> None:
        sampling = request.sampling
        context = (*request.ids, *request.written)
        if context not in self.cache:
            self.cache[context] = self.model(input_ids=torch.tensor([context]), use_cache=False).logits[0, -1].float()
        raw = self.cache[context] * (math.nan if self.fake.nan else 1.0)
        processed = raw.clone()
        for token, bias in (sampling.logit_bias or {}).items() if not self.fake.unmasked else ():
            processed[token] += bias
        if sampling.temperature:
            processed = processed / sampling.temperature
        assert sampling.top_p == 1
        assert sampling.top_k == 0
        token = int(processed.argmax() if not sampling.temperature else self._draw(request, processed, len(context)))
        request.written.append(token)
        request.versions.append(self.version)
        scores = {"raw": raw, "processed": processed}[self.args.logprobs_mode.split("_")[0]].log_softmax(-1)
        rows = None if sampling.logprobs is None else [{token: Logprob(float(scores[token]), 1)}]
        reason = self.fake.ends or None
        if token in (sampling.stop_token_ids or ()) or (token == 2 and not sampling.ignore_eos):
            reason = "stop"
        elif len(request.written) >= sampling.max_tokens or len(context) + 1 >= self.args.max_model_len:
            reason = "length"
        request.deliver([token], rows, reason)

    def _draw(self, request: Request, logits: Tensor, position: int) -> Tensor:
        generator = request.generator
        if self.fake.by_position:
            generator = torch.Generator().manual_seed((request.sampling.seed ^ (position << 20)) & (2**63 - 1))
        noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
        return (logits.double() - noise.log().neg().log()).argmax()


def install(monkeypatch: pytest.MonkeyPatch, version: str = "0.33.0") -> Fake:
    """Put the package where imports find it."""
    fake = Fake()
    monkeypatch.setattr(AsyncLLM, "fake", fake, raising=False)
    envs = ModuleType("vllm.envs")
    envs.__getattr__ = lambda name: {"VLLM_BATCH_INVARIANT": fake.batch_invariant}[name]  # type: ignore[method-assign]
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"SamplingParams": SamplingParams, "__version__": version, "__path__": [], "envs": envs},
        "vllm.engine": {"__path__": []},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": AsyncEngineArgs},
        "vllm.exceptions": {"RetryableRequestError": RetryableRequestError, "VLLMClientError": VLLMClientError},
        "vllm.sampling_params": {"RequestOutputKind": RequestOutputKind, "SamplingParams": SamplingParams},
        "vllm.v1": {"__path__": []},
        "vllm.v1.engine": {"__path__": []},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
        "vllm.v1.engine.exceptions": {"EngineDeadError": EngineDeadError},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    return fake
