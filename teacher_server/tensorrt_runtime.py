"""TensorRT-LLM, PyTorch backend: everything that touches the package.

It is held against two recorded states of the API (``tests/data/tensorrt_llm_api.json``), eras "A" (1.1 and 1.2) and "N"
(1.3 release candidates). Only keywords are used, because positions differ between them.

Letters: N tokens of a sequence, V' logits of the model (padded), d hidden size.
"""

# The package is not where types are checked: it needs a GPU to be installed.
# mypy: disable-error-code="import-not-found, import-untyped"
from __future__ import annotations

import gc
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from queue import Empty
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd_mesh.config.services import TensorRtConfig
from opd_mesh.errors import ConfigError, InternalError, OpdError, PreconditionError, TooLongError
from opd_mesh.torch_tensors import TORCH_DTYPES
from teacher_server.tensorrt_checkpoint import CheckpointFacts

log = logging.getLogger("teacher_server")

REMEDY = (
    "install it from NVIDIA's own package index or take NVIDIA's container image, as TensorRT-LLM's installation guide "
    "says (the package of that name on PyPI is a stub), on a machine with an NVIDIA GPU; `opd doctor` tells what is "
    "missing here. Or set engine: transformers"
)
HIDDEN_STATES = "opd_hidden_states"
# A model that is to be wrapped must live in this process: workers of their own would not see the wrapper.
SINGLE_PROCESS = "TLLM_WORKER_USE_SINGLE_PROCESS"
MAX_BATCH_ITEMS = 64
TOKENS_PER_BLOCK = 32  # of the KV cache, TensorRT-LLM's default
# TensorRT-LLM wants to generate at least one token.
GENERATED_TOKENS = 1
# For the answers of one batch: a first pass may compile kernels, and no teacher worth serving is slower than the rate.
ANSWER_TIMEOUT_S, ANSWER_TOKENS_PER_S = 300.0, 50.0
# A worker that hangs does not end when it is told to.
SHUTDOWN_TIMEOUT_S = 120.0
_TOO_LONG = ("max_seq_len", "max_input_len", "max_num_tokens", "too long", "exceed")


# --- what must be there ------------------------------------------------------------------------------------------
def visible_gpus() -> int:
    """CUDA devices that torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def require_tensorrt(tensor_parallel_size: int) -> Any:
    """The package. Raises :class:`ConfigError` where it or the GPUs are missing, with how to get them."""
    gpus = visible_gpus()
    if gpus < tensor_parallel_size:
        raise ConfigError(
            f"engine tensorrt_llm needs {tensor_parallel_size} NVIDIA GPU(s), torch {torch.__version__} sees {gpus}: "
            f"{REMEDY}",
            field="engine",
        )
    try:
        import tensorrt_llm
        from tensorrt_llm import LLM, SamplingParams  # noqa: F401  a stub lacks them
        from tensorrt_llm.executor.utils import RequestError  # noqa: F401
        from tensorrt_llm.llmapi import KvCacheConfig  # noqa: F401
    except Exception as error:  # it loads CUDA and MPI, and a missing library of theirs raises whatever it likes
        raise ConfigError(
            f"engine tensorrt_llm needs the package tensorrt-llm, which cannot be imported in {sys.prefix} "
            f"({type(error).__name__}: {error}): {REMEDY}",
            field="engine",
        ) from error
    return tensorrt_llm


# --- hidden states -----------------------------------------------------------------------------------------------
@contextmanager
def hidden_states_beside_logits(architecture: str) -> Iterator[None]:
    """An LLM made inside, in this process, can return ``HIDDEN_STATES`` [N, d]: what its head is multiplied with.

    TensorRT-LLM hands named tensors out of a model whose forward returns a dict, and no model of its own does. So the
    class registered for the architecture is replaced by a child of it, and put back at the end.

    Raises:
        ConfigError: the class is not built as TensorRT-LLM builds its decoders.
    """
    from tensorrt_llm._torch.models import modeling_utils

    # Newer versions import their models on demand, older ones all at once: then there is only the mapping.
    resolve: Callable[[str], Any] = getattr(
        modeling_utils, "get_registered_model_class", modeling_utils.MODEL_CLASS_MAPPING.get
    )
    stock = resolve(architecture)
    if stock is None or not issubclass(stock, modeling_utils.DecoderModelForCausalLM):
        raise ConfigError(f"TensorRT-LLM's class for {architecture or 'this model'} is not one of its decoders")
    single = os.environ.get(SINGLE_PROCESS)
    os.environ[SINGLE_PROCESS] = "1"
    modeling_utils.register_auto_model(architecture)(_with_hidden_states(stock))
    try:
        yield
    finally:
        # Not by register_auto_model: newer versions let nothing of their own replace what came from outside.
        modeling_utils.MODEL_CLASS_MAPPING[architecture] = stock
        if single is None:
            del os.environ[SINGLE_PROCESS]
        else:
            os.environ[SINGLE_PROCESS] = single


def _with_hidden_states(stock: Any) -> Any:
    class WithHiddenStates(stock):  # type: ignore[misc]
        """``stock``, whose forward returns a dict: "logits" as before, and what went into the head."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            to_logits = self.logits_processor.forward
            self._into_head: Any = None

            def remembering(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
                self._into_head = hidden_states
                return to_logits(hidden_states, *args, **kwargs)

            self.logits_processor.forward = remembering

        def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            result = super().forward(*args, **kwargs)
            hidden, self._into_head = self._into_head, None
            outputs = result if isinstance(result, dict) else {"logits": result}
            return {**outputs, HIDDEN_STATES: hidden}

    WithHiddenStates.__name__ = f"{stock.__name__}WithHiddenStates"
    return WithHiddenStates


# --- the LLM -----------------------------------------------------------------------------------------------------
T = TypeVar("T")
# The wrapper and the process model are set for the whole process, and more than one thread makes LLMs.
_MAKING = threading.Lock()


def within(seconds: float, call: Callable[[], T]) -> T:
    """What ``call`` returns or raises. Where it takes longer, its thread is left behind: :class:`TimeoutError`."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001  raised where it is waited for
            outcome.set_exception(error)

    threading.Thread(target=run, name="tensorrt-call", daemon=True).start()
    return outcome.result(seconds)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sequence, and what is wanted of its positions."""

    token_ids: Sequence[int]
    logits: bool
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Rows:
    """What was wanted, a row for each of the N tokens, wherever TensorRT-LLM left it."""

    logits: Tensor | None  # [N, V'] float32
    hidden: Tensor | None  # [N, d]


class TensorRtWeights:
    """A whole ``LLM`` as weights that come and go (:class:`teacher_server.engine.WeightSet`).

    Args:
        max_tokens: of the longest sequence.

    Attributes:
        num_bytes: of one device: the files, and the KV cache of a batch. Activations and logits come on top.
        hidden: whether the next :meth:`load` wraps the model.
        broken: the LLM answers nothing any more, or could not be made again. The next :meth:`load` makes a new one.
    """

    def __init__(
        self, name: str, checkpoint: CheckpointFacts, config: TensorRtConfig, *, dtype: str, max_tokens: int
    ) -> None:
        self.name = name
        self.hidden = config.hidden_states
        # One item must fit as a whole: chunked prefill is off, for it is not known to return all rows.
        self.max_seq_len = max_tokens + GENERATED_TOKENS
        self.max_num_tokens = max(config.max_batch_tokens, self.max_seq_len)
        self._kv_tokens = self.max_num_tokens + MAX_BATCH_ITEMS * TOKENS_PER_BLOCK  # the last block is never full
        kv_bytes = self._kv_tokens * checkpoint.kv_bytes_per_token(TORCH_DTYPES[dtype].itemsize)
        self.num_bytes = math.ceil((checkpoint.num_bytes + kv_bytes) / config.tensor_parallel_size)
        self._checkpoint = checkpoint
        self._config = config
        self._dtype = dtype
        self._max_tokens = max_tokens
        self.broken = False
        self._llm: Any = None

    def check(self) -> None:
        """Raises :class:`CorruptWeightsError` where a file is gone, or another one than when it was proved."""
        self._checkpoint.check()

    def load(self) -> None:
        """Make the LLM, which takes a minute and more for a large checkpoint.

        Raises:
            ConfigError: the package or the GPUs are missing, or the model cannot be wrapped.
            CorruptWeightsError: as :meth:`check`.
            PreconditionError: TensorRT-LLM cannot load the checkpoint.
        """
        if self.broken:
            self.discard()
        if self._llm is not None:
            return
        self.check()
        self._make()
        try:
            self.check()  # it took minutes to read them
        except BaseException:
            self.discard()
            raise
        self.broken = False

    def _make(self) -> None:
        package = require_tensorrt(self._config.tensor_parallel_size)
        from tensorrt_llm import LLM
        from tensorrt_llm.llmapi import KvCacheConfig

        with _MAKING, ExitStack() as stack:
            if self.hidden:
                stack.enter_context(hidden_states_beside_logits(self._checkpoint.architecture))
            try:
                self._llm = LLM(
                    model=str(self._checkpoint.folder),
                    # Ids cross the wire; text would be tokenized a second time.
                    skip_tokenizer_init=True,
                    trust_remote_code=False,
                    tensor_parallel_size=self._config.tensor_parallel_size,
                    dtype=self._dtype,
                    kv_cache_config=KvCacheConfig(
                        # Tokens found in the cache have no logits: rows would be missing, with a line in the log.
                        enable_block_reuse=False,
                        enable_partial_reuse=False,
                        max_tokens=self._kv_tokens,
                        free_gpu_memory_fraction=self._config.free_gpu_memory_fraction,
                    ),
                    enable_chunked_prefill=False,
                    max_batch_size=MAX_BATCH_ITEMS,
                    max_input_len=self._max_tokens,  # 1,024 by default
                    max_seq_len=self.max_seq_len,
                    max_num_tokens=self.max_num_tokens,
                    **({"disable_overlap_scheduler": True} if self.hidden else {}),
                )
            except Exception as error:
                version = getattr(package, "__version__", "of unknown version")
                raise PreconditionError(
                    f"TensorRT-LLM {version} cannot load {self._checkpoint.folder}: {type(error).__name__}: {error}"
                ) from error

    def unload(self) -> None:
        """Shut the LLM down. Raises :class:`InternalError` where that fails: its memory may not be free."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        failure = ""
        try:
            within(SHUTDOWN_TIMEOUT_S, llm.shutdown)
        except Exception as error:
            log.warning("%s: TensorRT-LLM did not shut down", self.name, exc_info=True)
            failure = f"{type(error).__name__}: {error}"
        # A model that lived in this process (single process) goes with its last reference.
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if failure:
            raise InternalError(f"{self.name}: TensorRT-LLM did not shut down: {failure}")

    def discard(self) -> None:
        """:meth:`unload` where another error is on its way, or a new LLM: that it fails stands in the log alone."""
        with suppress(InternalError):
            self.unload()

    def ask(self, prompts: Sequence[Prompt]) -> list[Rows | OpdError]:
        """All of them in flight together; one answer per prompt, in order, whole or an error of that prompt alone.

        Raises:
            InternalError: not loaded.
            TimeoutError: an answer did not come. The others are given up, and the LLM is ``broken``.
            Exception: whatever else TensorRT-LLM raises that does not concern one request; likewise.
        """
        if self._llm is None:
            raise InternalError(f"{self.name} is not loaded")
        from tensorrt_llm.executor.utils import RequestError

        refusals = (ValueError, RequestError)  # by version
        requests: list[Any] = []
        answers: list[Rows | OpdError] = []
        tokens = sum(len(prompt.token_ids) for prompt in prompts)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S + tokens / ANSWER_TOKENS_PER_S
        try:
            for prompt in prompts:
                try:
                    requests.append(self._begin(prompt))
                except refusals as error:
                    requests.append(self._refused(prompt, error))
            for index, prompt in enumerate(prompts):
                request, requests[index] = requests[index], None
                try:
                    answers.append(
                        request if isinstance(request, OpdError) else _rows(prompt, _result(request, deadline))
                    )
                except refusals as error:
                    answers.append(self._refused(prompt, error))
                except OpdError as error:
                    answers.append(error)
        except Exception:
            self.broken = True
            raise
        finally:
            for request in requests:
                if request is not None and not isinstance(request, OpdError):
                    with suppress(Exception):  # where the LLM is gone; why is on its way already
                        request.abort()
        return answers

    def _begin(self, prompt: Prompt) -> Any:
        from tensorrt_llm import SamplingParams

        sampling = SamplingParams(
            max_tokens=GENERATED_TOKENS,  # 0 is refused
            end_id=-1,  # there is no tokenizer to ask
            return_context_logits=prompt.logits,
            additional_model_outputs=[HIDDEN_STATES] if prompt.hidden else None,
            detokenize=False,
        )
        return self._llm.generate_async(inputs=list(prompt.token_ids), sampling_params=sampling, streaming=False)

    def _refused(self, prompt: Prompt, error: Exception) -> OpdError:
        text = f"TensorRT-LLM refused a sequence of {len(prompt.token_ids)} tokens: {error}"
        too_long = any(word in str(error).lower() for word in _TOO_LONG)
        return TooLongError(text) if too_long else InternalError(text)


def _result(request: Any, deadline: float) -> Any:
    seconds = max(deadline - time.monotonic(), 0.0)
    try:
        # Some versions do not heed the timeout. Where they do, it ends the thread.
        return within(seconds, lambda: request.result(timeout=seconds))
    except (Empty, TimeoutError) as error:
        raise TimeoutError("TensorRT-LLM did not answer a batch in the time allowed; does a worker hang?") from error


def _rows(prompt: Prompt, output: Any) -> Rows:
    logits = _whole(prompt, "context logits", output.context_logits) if prompt.logits else None
    if not prompt.hidden:
        return Rows(logits, None)
    named = output.outputs[0].additional_context_outputs or {}
    return Rows(logits, _whole(prompt, "hidden states", named.get(HIDDEN_STATES)))


def _whole(prompt: Prompt, what: str, tensor: Tensor | None) -> Tensor:
    """Raises :class:`InternalError` for rows that are missing: which ones they are cannot be told."""
    tokens = len(prompt.token_ids)
    if tensor is None or tensor.ndim != 2 or tensor.shape[0] != tokens:
        shape = "none" if tensor is None else list(tensor.shape)
        raise InternalError(
            f"TensorRT-LLM returned {what} of shape {shape} for {tokens} tokens, expected a row for each; were tokens "
            "taken from the KV cache, or is a feature on that skips them (chunked prefill, speculative decoding)?"
        )
    return tensor
