"""The student run by vLLM: NVIDIA GPUs, tensor parallelism, paged attention. See ``docs/engines.md``.

Written from the sources of vLLM 0.33.0 (file names below are inside its ``vllm`` package); ``tests/vllm_fake.py`` has
the signatures. ``AsyncLLM`` (``v1/engine/async_llm.py``) lives in an event loop of its own thread, and every request is
one task there that reads ``generate``. A *stream* is one such reading, and lies within one policy version: a swap
ends all of them and begins new ones, whose prompts are prompt and tokens so far.

What ends vLLM is no request's fault: no request hears of it, and the next ``step`` raises.

Random numbers are vLLM's own. Tokens are valid samples, but not those that the transformers engine draws from the same
seed, and not the same again under another version of vLLM.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from opd_mesh.config.services import RolloutEngineConfig
from opd_mesh.errors import (
    ConfigError,
    DivergedError,
    InternalError,
    InvalidInputError,
    OpdError,
    PreconditionError,
    RequestConflictError,
)
from opd_mesh.models.checkpoint import LoadedModel
from opd_mesh.trajectory import FinishReason
from rollout_server.engine import PreparedPolicy, RolloutEngine
from rollout_server.generation import (
    EngineCounters,
    GenerationRequest,
    TokenEvent,
    finish_reason_after,
    validate_request,
)
from rollout_server.vllm_proof import PROOF_TOLERANCES, prove_logprobs
from rollout_server.vllm_runtime import (
    PolicyWriter,
    VllmPolicy,
    check_sampling,
    derived_seed,
    engine_arguments,
    padding_bias,
    require_vllm,
    sampling_params,
)

log = logging.getLogger("rollout_server")

STEP_WAIT_S = 0.05  # commands of the driver wait no longer than this
SHUTDOWN_TIMEOUT_S = 60.0
ResultT = TypeVar("ResultT")


@dataclass(eq=False, slots=True)
class _Stream:
    """One reading of ``generate``. The loop's thread alone changes it, until the reading has ended.

    Attributes:
        tokens: of the response, those written before among them.
        over: its last event is in the queue, or it was cancelled.
        interrupted: vLLM gave it up for a pause; it goes on in another stream.
    """

    request: GenerationRequest
    tokens: list[int]
    version: int
    over: bool = False
    interrupted: bool = False
    reading: Future[None] | None = None


class VllmEngine(RolloutEngine):
    """See the module and :class:`rollout_server.engine.RolloutEngine`.

    Args:
        loaded: on the CPU, in ``settings.dtype``: names, shapes and dtypes come from it, and what vLLM is proved by.
        policy_version: of the checkpoint's weights.
        valid_vocab_size: ids at or above it are padding and are never written.
        deterministic: as far as vLLM's batch-invariant kernels make it: see :func:`require_vllm`.

    Raises:
        ConfigError: :func:`require_vllm`, or vLLM would not know the names of this model's weights.
        PreconditionError: vLLM cannot load it.
        InternalError: vLLM's log-probabilities are not those of the model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        settings: RolloutEngineConfig,
        policy_version: int,
        valid_vocab_size: int,
        deterministic: bool = False,
    ) -> None:
        self._package_version = require_vllm(settings, deterministic=deterministic).__version__
        self.deterministic = deterministic
        self.cache_mode = f"vllm {self._package_version}: paged, shared by prefix"
        self.counters = EngineCounters()
        self._settings, self._policy_version, self._valid_vocab_size = settings, policy_version, valid_vocab_size
        self._policies = PolicyWriter(loaded, settings.vllm.weights_dir)
        self._padding_bias = padding_bias(valid_vocab_size, loaded.model.config.get_text_config().vocab_size)
        self._live: dict[str, _Stream] = {}  # until the last event was handed out; in order of admission
        self._received: queue.SimpleQueue[tuple[_Stream, TokenEvent]] = queue.SimpleQueue()
        self._pending: deque[TokenEvent] = deque()
        self._readings: set[asyncio.Task[None]] = set()  # the loop's
        self._swapping = False  # the loop's
        self._may_draw = asyncio.Event()  # the loop's: not paused
        self._may_draw.set()
        self._pauses = 0  # the loop's: how often it was
        self._dead = ""
        self._streams_made = 0
        self._llm: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._on_loop(self._make(loaded.path))
            worst = prove_logprobs(
                self,
                loaded.model,
                valid_vocab_size=valid_vocab_size,
                max_context_tokens=settings.max_context_tokens,
                tolerance=PROOF_TOLERANCES[settings.dtype],
            )
        except BaseException:
            self.close()
            raise
        log.info("vLLM %s: log-probabilities are the model's to %.1e nats", self._package_version, worst)
        self.counters = EngineCounters()

    def _on_loop(self, work: Coroutine[Any, Any, ResultT], timeout_s: float | None = None) -> ResultT:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise

    async def _make(self, folder: Path) -> None:
        """``AsyncLLM.from_engine_args`` blocks for minutes; nothing else is on the loop yet."""
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            self._llm = AsyncLLM.from_engine_args(engine_arguments(folder, self._settings))
            await self._llm.update_weight_version(str(self._policy_version))
        except Exception as error:
            raise PreconditionError(
                f"vLLM {self._package_version} cannot load {folder}: {type(error).__name__}: {error}"
            ) from error
        # v1/worker/gpu/sample/gumbel.py draws by (seed, position); the older model runner goes through a generator.
        self._noise_by_position = bool(self._llm.vllm_config.use_v2_model_runner)
        if self.deterministic and not self._noise_by_position:
            raise ConfigError(
                "vLLM runs this model by its older model runner, which draws other noise when a response is resumed; "
                "set deterministic: false, or engine: transformers",
                field="deterministic",
            )

    # --- state ---------------------------------------------------------------------------------------------------
    @property
    def tensor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor that a policy holds, by name."""
        return self._policies.shapes

    @property
    def running(self) -> int:
        """Requests that hold a slot, where each that is in vLLM could have its memory."""
        return min(len(self._live), self._settings.max_slots)

    @property
    def waiting(self) -> int:
        """The others: vLLM's scheduler has its own queue."""
        return len(self._live) - self.running

    @property
    def idle(self) -> bool:
        """See :class:`RolloutEngine`. Never once vLLM has died: the next ``step`` says so."""
        return not self._live and not self._pending and not self._dead

    # --- requests ------------------------------------------------------------------------------------------------
    def check_request(self, request: GenerationRequest) -> None:
        """See :class:`RolloutEngine`."""
        validate_request(
            request,
            valid_vocab_size=self._valid_vocab_size,
            max_context_tokens=self._settings.max_context_tokens,
        )
        check_sampling(request.sampling)

    def submit(self, request: GenerationRequest, kv: Mapping[str, Tensor] | None = None) -> None:
        """See :class:`RolloutEngine`. ``kv`` is ignored: vLLM reads the context."""
        if request.request_id in self._live:
            raise RequestConflictError(f"{request.request_id!r} is in progress", field="request_id")
        self.check_request(request)
        self._begin(request, [token.token_id for token in request.written])

    def _begin(self, request: GenerationRequest, tokens: list[int]) -> None:
        stream = _Stream(request, tokens, self._policy_version)
        self._live[request.request_id] = stream
        if self._dead:
            return  # the next step says so
        self._streams_made += 1
        self.counters.prefill_tokens += len(request.prompt_ids) + len(tokens)
        reading = self._read(stream, f"{self._streams_made}-{request.request_id}")
        stream.reading = asyncio.run_coroutine_threadsafe(reading, self._loop)

    def cancel(self, request_id: str) -> bool:
        """See :class:`RolloutEngine`. ``generate`` aborts its request when its task is cancelled."""
        stream = self._live.pop(request_id, None)
        if stream is None:
            return False
        if stream.reading is not None:
            stream.reading.cancel()
        # What is still in the queue is dropped because its stream is not in _live.
        self._pending = deque(event for event in self._pending if event.request_id != request_id)
        return True

    def step(self) -> list[TokenEvent]:
        """See :class:`RolloutEngine`. Waits a moment where nothing has come.

        Raises:
            InternalError: vLLM has died, and what came before is handed out.
        """
        started = time.perf_counter()
        self._receive(0.0 if self._pending or not self._live or self._dead else STEP_WAIT_S)
        events: dict[str, TokenEvent] = {}
        later: deque[TokenEvent] = deque()
        for event in self._pending:  # several tokens of one request come in one delta where we were slow
            if event.request_id in events:
                later.append(event)
            else:
                events[event.request_id] = event
        for event in events.values():
            self.counters.tokens += event.error is None
            if event.error or event.finish_reason:
                del self._live[event.request_id]
        # A request that failed for two reasons has one end.
        self._pending = deque(event for event in later if event.request_id in self._live)
        if events:
            self.counters.steps += 1
            self.counters.decode_seconds += time.perf_counter() - started
        elif self._dead:
            raise self._death()
        return list(events.values())

    def _death(self) -> InternalError:
        return InternalError(f"vLLM is dead: {self._dead}; restart the server")

    def _receive(self, wait_s: float) -> None:
        """Move what has come from the loop's thread into ``_pending``."""
        with suppress(queue.Empty):
            while True:
                stream, event = self._received.get(timeout=wait_s) if wait_s else self._received.get_nowait()
                wait_s = 0.0
                if self._live.get(event.request_id) is stream:
                    self._pending.append(event)

    # --- on the loop ---------------------------------------------------------------------------------------------
    async def _read(self, stream: _Stream, vllm_id: str) -> None:
        refused = True
        while refused:
            await self._may_draw.wait()
            refused = await self._generate(stream, vllm_id)

    async def _generate(self, stream: _Stream, vllm_id: str) -> bool:
        """True: a pause overtook the request on its way, nothing was run, and it is to be asked for again."""
        from vllm.exceptions import RetryableRequestError, VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.current_task()
        assert task is not None
        self._readings.add(task)
        pauses = self._pauses
        prompt = {"prompt_token_ids": [*stream.request.prompt_ids, *stream.tokens]}
        error: OpdError | None = None
        try:
            # Closed, so that vLLM aborts the request where we raise.
            async with aclosing(self._llm.generate(prompt, self._sampling_params(stream), vllm_id)) as outputs:
                async for output in outputs:
                    (completion,) = output.outputs
                    self._take(stream, completion)
        except RetryableRequestError:  # it came while paused; nothing was run
            if pauses != self._pauses and not self._swapping:
                return True
            stream.interrupted = True
        except EngineDeadError as dead:
            self._dead = self._dead or f"{type(dead).__name__}: {dead}"
        except VLLMClientError as refusal:
            error = InvalidInputError(f"vLLM refused the request: {refusal}")
        except OpdError as ours:
            error = ours
        except Exception as failure:
            cause = failure.__cause__ or failure  # EngineGenerateError says nothing itself
            log.exception("vLLM failed on %s", stream.request.request_id)
            if isinstance(cause, EngineDeadError):
                self._dead = self._dead or f"{type(cause).__name__}: {cause}"
            error = InternalError(f"vLLM failed: {type(cause).__name__}: {cause}")
        finally:
            self._readings.discard(task)
        if stream.over or self._dead or (stream.interrupted and self._swapping and error is None):
            return False
        self._fail(stream, error or InternalError("vLLM gave the request up"))
        return False

    def _sampling_params(self, stream: _Stream) -> Any:
        written, sampling = len(stream.tokens), stream.request.sampling
        return sampling_params(
            sampling,
            written=written,
            # A generator that begins again must not repeat the noise of the tokens written already.
            seed=derived_seed(sampling.seed, 0 if self._noise_by_position else written),
            bias=self._padding_bias,
            valid_vocab_size=self._valid_vocab_size,
        )

    def _take(self, stream: _Stream, completion: Any) -> None:
        """Tokens of one delta into the queue. Raises what ends the request."""
        if stream.over:
            return
        label = str(stream.version)
        for span in completion.weight_versions or ():
            if span.version != label:
                raise InternalError(f"vLLM wrote under policy {span.version}, asked for {label}")
        rows = completion.logprobs or ()
        if len(rows) != len(completion.token_ids):
            raise InternalError(f"vLLM gave {len(rows)} log-probabilities for {len(completion.token_ids)} tokens")
        finish: FinishReason | None = None
        for token, row in zip(completion.token_ids, rows, strict=True):
            if not 0 <= token < self._valid_vocab_size or token not in row:
                raise InternalError(f"vLLM wrote id {token}, of {self._valid_vocab_size}, or not its log-probability")
            logprob = float(row[token].logprob)
            if not math.isfinite(logprob):
                raise DivergedError(
                    f"the log-probability of response token {len(stream.tokens)} is not finite ({logprob})"
                )
            stream.tokens.append(token)
            finish = finish_reason_after(stream.request.sampling, stream.tokens)
            stream.over = finish is not None
            event = TokenEvent(
                request_id=stream.request.request_id,
                position=len(stream.tokens) - 1,
                token_id=token,
                sampling_logprob=logprob if stream.request.sampling.temperature else 0.0,
                policy_logprob=logprob,
                policy_version=stream.version,
                finish_reason=finish,
            )
            self._received.put((stream, event))
            if finish:
                return
        match completion.finish_reason:  # FINISH_REASON_STRINGS in v1/engine/__init__.py
            case None:
                pass
            case "abort":
                stream.interrupted = True
            case reason:
                raise InternalError(f"vLLM ended the response after {len(stream.tokens)} tokens: {reason}")

    def _fail(self, stream: _Stream, error: OpdError) -> None:
        nan = float("nan")
        stream.over = True
        request_id, position = stream.request.request_id, len(stream.tokens)
        event = TokenEvent(request_id, position, -1, nan, nan, stream.version, error=error)
        self._received.put((stream, event))

    # --- policies ------------------------------------------------------------------------------------------------
    def prepare_policy(self, tensors: Mapping[str, Tensor]) -> VllmPolicy:
        """See :class:`RolloutEngine`."""
        return self._policies.write(tensors)

    def swap_policy(self, prepared: PreparedPolicy, version: int) -> None:
        """See :class:`RolloutEngine`. Unfinished requests are begun again with their tokens.

        Raises:
            InternalError: the policy could not be written again; or vLLM failed on the way, or took too long. Nobody
                knows what it holds then: nothing more is drawn, and the next ``step`` raises, too.
        """
        assert isinstance(prepared, VllmPolicy)
        if self._dead:
            raise self._death()
        started = time.perf_counter()
        policy = self._policies.rebased(prepared)
        self._or_die(self._reload(policy.files.folder, version), "a policy could not be swapped in")
        self._receive(0.0)  # what the old weights wrote, while its streams are still known
        self._policies.served, self._policy_version = policy.files, version
        for stream in list(self._live.values()):
            if not stream.over:
                if stream.reading is not None:
                    stream.reading.cancel()  # it may wait for the end of a pause
                self._begin(stream.request, stream.tokens)
        self.counters.swap_seconds += time.perf_counter() - started

    async def _reload(self, folder: Path, version: int) -> None:
        """New weights into the workers, by vLLM's own means.

        ``pause_generation(mode="abort")`` ends every request with finish reason "abort" *after* its last token, which
        therefore bears the version that drew it; ``clear_cache`` drops the keys and values of shared prompts.
        ``reload_weights`` (``v1/worker/gpu_worker.py``) loads a folder as a checkpoint is loaded. Of the transfers in
        ``distributed/weight_transfer``, ipc sends pickles and needs the weights once more on every GPU, and nccl a
        GPU of the sender's own.
        """
        self._swapping = True
        await self._llm.pause_generation(mode="abort", clear_cache=True)
        await asyncio.gather(*self._readings, return_exceptions=True)
        await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        await self._llm.update_weight_version(str(version))
        if self._may_draw.is_set():
            await self._llm.resume_generation()
        self._swapping = False

    def _or_die(self, work: Coroutine[Any, Any, None], what: str) -> None:
        """Run what concerns every request. If it fails, or takes too long, nobody knows how far it came."""
        try:
            self._on_loop(work, self._settings.vllm.swap_timeout_s)
        except Exception as error:
            self._dead = self._dead or f"{what}: {type(error).__name__}: {error}"
            raise self._death() from error

    # --- pauses --------------------------------------------------------------------------------------------------
    def pause(self) -> None:
        """See :class:`RolloutEngine`. vLLM keeps its requests with their keys and values, and steps no more; what it
        drew before is handed out afterwards."""
        if not self._dead:
            self._or_die(self._pause(), "it could not be paused")

    def resume(self) -> None:
        """See :class:`RolloutEngine`."""
        if not self._dead:
            self._or_die(self._resume(), "it could not be resumed")

    async def _pause(self) -> None:
        if self._may_draw.is_set():
            self._may_draw.clear()  # nothing is asked for that vLLM would refuse
            self._pauses += 1
            await self._llm.pause_generation(mode="keep", clear_cache=False)

    async def _resume(self) -> None:
        if not self._may_draw.is_set():
            await self._llm.resume_generation()
            self._may_draw.set()

    def close(self) -> None:
        """See :class:`RolloutEngine`. Ends vLLM's processes."""
        if self._loop.is_closed():
            return
        for stream in self._live.values():  # some may wait for the end of a pause
            if stream.reading is not None:
                stream.reading.cancel()
        try:
            self._on_loop(self._shut_down(), 2 * SHUTDOWN_TIMEOUT_S)
        except Exception:
            log.warning("vLLM did not shut down", exc_info=True)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SHUTDOWN_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()
        self._policies.served.remove()

    async def _shut_down(self) -> None:
        readings = list(self._readings)
        for reading in readings:
            reading.cancel()
        await asyncio.gather(*readings, return_exceptions=True)
        if self._llm is not None:
            self._llm.shutdown(timeout=SHUTDOWN_TIMEOUT_S)
