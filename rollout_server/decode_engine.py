"""The decode loop: continuous batching over any causal language model, one token per running request per step.

Letters: B rows of a step, V vocabulary rows of the head.

The engine is synchronous, does no I/O and is driven by one thread, which calls ``submit``, ``cancel``,
``swap_policy`` and ``step`` in turn. A request passes through

    submit → waiting ──prefill──▶ running ──decode, decode, …──▶ finished | failed | cancelled
                ▲                    │
                └──── swap_policy ───┘   its keys and values are dropped; it is prefilled again under the new weights

and every step gives each request it touches exactly one token: that of its prefill or that of its decode.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from opd_mesh.errors import ConfigError, InternalError, OpdError, RequestConflictError
from opd_mesh.models.checkpoint import served_tensors
from opd_mesh.sampling import sample_tokens
from rollout_server.backends import Backend, make_backend
from rollout_server.cache import CacheMode
from rollout_server.cache_proof import CacheModeProof, prove_cache_modes
from rollout_server.generation import (
    EngineCounters,
    GenerationRequest,
    SequenceState,
    TokenEvent,
    WrittenToken,
    finish_reason_after,
    validate_request,
)
from rollout_server.packed_linears import PackedLinears
from rollout_server.policy import check_policy_tensors, copy_policy_tensors

__all__ = ["DecodeEngine", "EngineCounters", "GenerationRequest", "TokenEvent", "WrittenToken"]

logger = logging.getLogger(__name__)


class DecodeEngine:
    """Continuous batching of generation requests. Not thread-safe: one thread drives it.

    Args:
        model: any transformers causal language model; it is put in eval mode.
        policy_version: version of the weights it holds.
        valid_vocab_size: ids at or above it are padding and are never written.
        max_slots: requests running at once.
        max_context_tokens: prompt and response together, per request.
        deterministic: the tokens of a request depend on nothing but itself, the weights and the number of threads
            (which the process has to fix): sequences run one by one, and a resumed request repeats the very calls of
            the uninterrupted one, prefill where it was prefilled and decode where it was decoded.
        cache_mode: None takes the fastest that is proved.
        cache_proof: of this model, if made already; otherwise it is made here (it takes some forward passes).
        prefill_token_budget: context tokens prefilled per step at most, so that decoding requests are not held up;
            a longer context is prefilled in a step of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        policy_version: int,
        valid_vocab_size: int,
        max_slots: int = 16,
        max_context_tokens: int,
        deterministic: bool = False,
        cache_mode: CacheMode | None = None,
        prefill_token_budget: int = 2048,
        cache_proof: CacheModeProof | None = None,
    ) -> None:
        """Raises :class:`ConfigError` naming the argument."""
        for name, value in (("max_slots", max_slots), ("prefill_token_budget", prefill_token_budget)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}", field=name)
        if max_context_tokens < 2:
            raise ConfigError("max_context_tokens must be at least 2: prompt and response", field="max_context_tokens")
        if deterministic and cache_mode is CacheMode.BATCHED:
            raise ConfigError(
                "cache_mode batched is not deterministic: its shapes depend on others", field="cache_mode"
            )
        self._model = model.eval()
        self._policy_version = policy_version
        self._valid_vocab_size = valid_vocab_size
        self._max_slots = max_slots
        self._max_context_tokens = max_context_tokens
        self._deterministic = deterministic
        self._prefill_token_budget = prefill_token_budget
        if cache_mode is not None:
            candidates = [cache_mode]
        else:
            candidates = [mode for mode in CacheMode if not (deterministic and mode is CacheMode.BATCHED)]
        self.cache_proof = cache_proof or prove_cache_modes(
            self._model, valid_vocab_size=valid_vocab_size, first_of=candidates
        )
        if cache_mode is None:
            cache_mode = self.cache_proof.fastest_deterministic if deterministic else self.cache_proof.fastest
        elif not self.cache_proof.allowed(cache_mode):
            reason = self.cache_proof.results[cache_mode].reason
            raise ConfigError(f"cache_mode {cache_mode} is not for this model: {reason}", field="cache_mode")
        self.cache_mode = cache_mode
        # One sequence at a time has nothing to gain from it.
        self._packed = PackedLinears(self._model) if cache_mode is CacheMode.BATCHED else None
        self._backend: Backend = make_backend(
            cache_mode, self._model, num_cache_layers=self.cache_proof.num_cache_layers
        )
        self._running: dict[str, SequenceState] = {}
        self._waiting: dict[str, SequenceState] = {}  # in order of admission
        self.counters = EngineCounters()

    # --- state -----------------------------------------------------------------------------------------------
    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests to be prefilled, first-time or again."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Nothing to do: ``step`` would return no events."""
        return not self._running and not self._waiting

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor that a policy holds, by name."""
        return {name: tuple(tensor.shape) for name, tensor in served_tensors(self._model)}

    @property
    def policy_version(self) -> int:
        """Version of the weights in use."""
        return self._policy_version

    # --- between steps ---------------------------------------------------------------------------------------
    def submit(self, request: GenerationRequest) -> None:
        """Queue a request, first come, first served.

        Raises:
            InvalidInputError: naming the field.
            TooLongError: prompt and ``max_new_tokens`` exceed ``max_context_tokens``.
            RequestConflictError: a request of that id is in the engine.
        """
        if request.request_id in self._running or request.request_id in self._waiting:
            raise RequestConflictError(f"{request.request_id!r} is in progress", field="request_id")
        validate_request(request, valid_vocab_size=self._valid_vocab_size, max_context_tokens=self._max_context_tokens)
        self._waiting[request.request_id] = SequenceState(request)

    @torch.inference_mode()
    def cancel(self, request_id: str) -> bool:
        """Forget a request and free its slot; False if it is not here. No event follows."""
        if self._running.pop(request_id, None):
            self._backend.drop(request_id)
            return True
        return self._waiting.pop(request_id, None) is not None

    def check_policy(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise what :meth:`swap_policy` would. Reads names and shapes only, so any thread may call it beforehand."""
        check_policy_tensors(self._model, tensors)

    def swap_policy(self, tensors: Mapping[str, Tensor], version: int, *, checked: bool = False) -> None:
        """Copy new weights over the old and prefill unfinished requests again under them.

        Args:
            tensors: by name in the model's ``state_dict``; names left out keep their weights.
            version: marks every token written from now on.
            checked: :meth:`check_policy` has passed on these tensors already (it reads every value once).

        Raises:
            InvalidInputError: an unknown name or a wrong shape; nothing was copied.
            CorruptWeightsError: NaN or infinity; nothing was copied.
        """
        started = time.perf_counter()
        if not checked:
            self.check_policy(tensors)
        copy_policy_tensors(self._model, tensors)
        if self._packed is not None:
            self._packed.pack()
        self._policy_version = version
        self._requeue_running()
        self.counters.swap_seconds += time.perf_counter() - started

    # --- the step --------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Decode one token for each running request, then prefill waiting ones into the free slots.

        A prefill gives its request's next token. Returns one event per request touched; [] when idle.
        """
        if self.idle:
            return []
        self.counters.steps += 1
        events = self._decode() if self._running else []
        # After decoding, so that a slot freed in this step is filled in this step.
        admitted = self._next_admissions()
        return events + self._prefill(admitted) if admitted else events

    def _decode(self) -> list[TokenEvent]:
        started = time.perf_counter()
        try:
            request_ids, logits_BV = self._backend.decode({key: seq.tokens[-1] for key, seq in self._running.items()})
        except Exception:
            # It cannot be told whose fault this is. Prefilled one by one, the guilty one will fail alone.
            logger.exception("a decode pass over %d requests failed; all are prefilled again", len(self._running))
            self._requeue_running()
            return []
        self.counters.decode_seconds += time.perf_counter() - started
        return self._emit([self._running[request_id] for request_id in request_ids], logits_BV)

    def _next_admissions(self) -> list[SequenceState]:
        admitted: list[SequenceState] = []
        budget = self._prefill_token_budget
        for sequence in self._waiting.values():
            needed = len(sequence.context)
            if len(self._running) + len(admitted) == self._max_slots or (admitted and needed > budget):
                break
            budget -= needed
            admitted.append(sequence)
        for sequence in admitted:
            del self._waiting[sequence.request.request_id]
        return admitted

    def _prefill(self, sequences: list[SequenceState]) -> list[TokenEvent]:
        """Prefill together; if that raises, one by one, so that only those fail that fail alone."""
        try:
            logits_BV = self._prefill_logits(sequences)
        except Exception as failure:
            logger.exception("the prefill of %s failed", [sequence.request.request_id for sequence in sequences])
            # Out of memory, for one, may have left the shared cache half moved.
            self._requeue_running()
            if len(sequences) > 1:
                return [event for sequence in sequences for event in self._prefill([sequence])]
            error = InternalError(f"the model could not read the context: {type(failure).__name__}: {failure}")
            return [self._failure(sequences[0], error)]
        self._running |= {sequence.request.request_id: sequence for sequence in sequences}
        return self._emit(sequences, logits_BV)

    def _prefill_logits(self, sequences: list[SequenceState]) -> Tensor:
        """fp32 [B, V] logits of the next token of each."""
        started = time.perf_counter()
        replays = [self._replay_length(sequence) for sequence in sequences]
        contexts = {
            sequence.request.request_id: sequence.context[: len(sequence.context) - replay]
            for sequence, replay in zip(sequences, replays, strict=True)
        }
        logits_BV = self._backend.prefill(contexts)
        for row, (sequence, replay) in enumerate(zip(sequences, replays, strict=True)):
            for token in sequence.tokens[len(sequence.tokens) - replay :]:
                logits_BV[row] = self._backend.decode({sequence.request.request_id: token})[1][0]
        self.counters.prefill_tokens += sum(len(ids) for ids in contexts.values())
        self.counters.replayed_tokens += sum(replays)
        self.counters.prefill_seconds += time.perf_counter() - started
        return logits_BV

    def _replay_length(self, sequence: SequenceState) -> int:
        """How many of the newest tokens to feed one by one.

        Deterministic: as many as were decoded under these weights, for a prefill gives other bits than decoding. They
        followed one prefill, whose position the versions tell: it was made when this version came in. Without a
        cache every pass is over the whole context, so there is nothing to repeat.
        """
        if not self._deterministic or self.cache_mode is CacheMode.UNCACHED:
            return 0
        return sequence.written_under(self._policy_version)

    def _emit(self, sequences: Sequence[SequenceState], logits_BV: Tensor) -> list[TokenEvent]:
        """Sample one token per row, retire what is finished or failed."""
        started = time.perf_counter()
        sampled = sample_tokens(
            logits_BV,
            [sequence.request.sampling for sequence in sequences],
            [len(sequence.tokens) for sequence in sequences],
            self._valid_vocab_size,
        )
        rows = zip(
            sequences,
            sampled.token_ids_B.tolist(),
            sampled.sampling_logprobs_B.tolist(),
            sampled.policy_logprobs_B.tolist(),
            sampled.errors,
            strict=True,
        )
        events = []
        for sequence, token, sampling_logprob, policy_logprob, error in rows:
            if error is not None:
                event = self._failure(sequence, error)
            else:
                sequence.tokens.append(token)
                sequence.versions.append(self._policy_version)
                self.counters.tokens += 1
                event = TokenEvent(
                    request_id=sequence.request.request_id,
                    position=len(sequence.tokens) - 1,
                    token_id=token,
                    sampling_logprob=sampling_logprob,
                    policy_logprob=policy_logprob,
                    policy_version=self._policy_version,
                    finish_reason=finish_reason_after(sequence.request.sampling, sequence.tokens),
                )
            if event.finish_reason or event.error:
                self._running.pop(event.request_id)
                self._backend.drop(event.request_id)
            events.append(event)
        self.counters.sample_seconds += time.perf_counter() - started
        return events

    def _failure(self, sequence: SequenceState, error: OpdError) -> TokenEvent:
        return TokenEvent(
            request_id=sequence.request.request_id,
            position=len(sequence.tokens),
            token_id=-1,
            sampling_logprob=float("nan"),
            policy_logprob=float("nan"),
            policy_version=self._policy_version,
            error=error,
        )

    def _requeue_running(self) -> None:
        """Drop all keys and values; the requests wait at the front, in the order they ran."""
        self._backend.drop_all()
        self._waiting = self._running | self._waiting
        self._running = {}
