"""The decode loop: continuous batching over any causal language model, one token per running request per step.

Letters: B rows of a step, V vocabulary rows of the head.

A request passes through

    submit → waiting ──prefill──▶ running ──decode, decode, …──▶ finished | failed | cancelled
                ▲                    │
                └────────────────────┘   swap_policy, or others outgrow the memory: its keys and values are dropped

A step decodes one token for every running request, and reads a bounded number of waiting requests' tokens, the oldest
first; a request that was read whole gets its next token from that and runs.

Keys and values of running requests, of requests that are being read and of prompts kept for other answers share one
budget. Prompts go first, then what was read of waiting requests, then the newest running request waits again. The
oldest request alone always fits, so it always makes progress. On top comes what a pass needs for itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from opd_mesh.errors import ConfigError, InternalError, OpdError, RequestConflictError, TooLongError
from opd_mesh.grammar import GrammarMatcher, Grammars
from opd_mesh.models.checkpoint import served_tensors
from opd_mesh.sampling import sample_tokens
from opd_mesh.trajectory import MAX_KEPT_IDS
from rollout_server.backends import Backend, make_backend
from rollout_server.cache import CacheMode
from rollout_server.cache_proof import CacheModeProof, candidate_modes, prove_cache_modes
from rollout_server.context_reader import ContextReader
from rollout_server.engine import PreparedPolicy, RolloutEngine
from rollout_server.exported_kv import from_tensors, to_tensors
from rollout_server.generation import (
    EngineCounters,
    GenerationRequest,
    SequenceState,
    TokenEvent,
    finish_reason_after,
    matcher_of,
    most_tokens_read,
    validate_request,
)
from rollout_server.packed_linears import PackedLinears
from rollout_server.prompts import PromptStore
from rollout_server.staged_weights import StagedWeights, WeightHomes, exchange_weights, stage_weights

logger = logging.getLogger(__name__)

# A waiting request is let in only if every request can write so many more tokens before memory runs out: who is let
# in and sent back at once was read for nothing.
_HEADROOM_TOKENS = 32


class DecodeEngine(RolloutEngine):
    """Continuous batching of generation requests. Not thread-safe, but for :meth:`prepare_policy`.

    Args:
        model: any transformers causal language model; it is put in eval mode.
        policy_version: version of the weights it holds.
        valid_vocab_size: ids at or above it are padding and are never written.
        max_slots: requests running at once.
        max_context_tokens: prompt and response together, per request.
        deterministic: the tokens of a request depend on nothing but itself, the weights, ``prefill_token_budget`` and
            the number of threads (which the process has to fix): sequences run one by one, and a resumed request
            repeats the very calls of the uninterrupted one, prefill where it was prefilled and decode where it was
            decoded.
        cache_mode: None takes the fastest that is proved.
        cache_proof: of this model, if made already; otherwise it is made here (it takes some forward passes).
        prefill_token_budget: context tokens read per step at most, so that decoding requests are not held up. Where
            the proof finds that the model cannot read in pieces, a longer context is read in a step of its own.
        cache_bytes: of keys and values. For a model whose cache is not of plain keys and values it is an estimate
            (:func:`rollout_server.cache.bytes_per_token`).
        keep_kv_on_update: running requests keep their keys and values under new weights. Inexact: their later tokens
            come from a mixture that no policy is. Nothing else outlives its weights: prompts, and what was read of
            waiting requests, are read again.
        grammars: of the model's tokenizer; None: requests with a grammar are refused.
    """

    cache_mode: CacheMode
    max_kept_ids = MAX_KEPT_IDS

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
        cache_bytes: int = 4 << 30,
        keep_kv_on_update: bool = False,
        cache_proof: CacheModeProof | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """Raises :class:`ConfigError` naming the argument."""
        least = {"max_slots": max_slots, "prefill_token_budget": prefill_token_budget, "cache_bytes": cache_bytes}
        for name, value in least.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}", field=name)
        if max_context_tokens < 2:
            raise ConfigError("max_context_tokens must be at least 2: prompt and response", field="max_context_tokens")
        if deterministic and cache_mode is CacheMode.BATCHED:
            raise ConfigError(
                "cache_mode batched is not deterministic: its shapes depend on others", field="cache_mode"
            )
        if deterministic and keep_kv_on_update:
            raise ConfigError(
                "keep_kv_on_update is not deterministic: tokens would depend on when an update came",
                field="keep_kv_on_update",
            )
        self._model = model.eval()
        self._homes = WeightHomes(model)
        self._policy_version = policy_version
        self._valid_vocab_size = valid_vocab_size
        self._max_slots = max_slots
        self._max_context_tokens = max_context_tokens
        self._cache_bytes = cache_bytes
        self._keep_kv_on_update = keep_kv_on_update
        self._grammars = grammars
        self.takes_grammars = grammars is not None
        self.deterministic = deterministic
        self.counters = EngineCounters()
        self.cache_proof = cache_proof or prove_cache_modes(
            self._model,
            valid_vocab_size=valid_vocab_size,
            first_of=candidate_modes(cache_mode, deterministic=deterministic),
        )
        if cache_mode is None:
            cache_mode = self.cache_proof.fastest_deterministic if deterministic else self.cache_proof.fastest
        elif not self.cache_proof.allowed(cache_mode):
            reason = self.cache_proof.results[cache_mode].reason
            raise ConfigError(f"cache_mode {cache_mode} is not for this model: {reason}", field="cache_mode")
        self.cache_mode = cache_mode
        # One sequence at a time has nothing to gain from it.
        self._packed = PackedLinears(self._model) if cache_mode is CacheMode.BATCHED else None
        self._backend: Backend[Any] = make_backend(
            cache_mode,
            self._model,
            num_cache_layers=len(self.cache_proof.layers),
            token_bytes=self.cache_proof.token_bytes,
        )
        self._prompts = PromptStore(max_prompts=max_slots + 1)  # that many, and a prefix
        in_pieces = self.cache_proof.results[cache_mode].in_pieces
        self._reader = ContextReader(
            self._backend,
            self._prompts,
            tokens_per_step=prefill_token_budget,
            deterministic=deterministic,
            in_pieces=in_pieces,
            shares_prompts=in_pieces or cache_mode is CacheMode.UNCACHED,
            counters=self.counters,
        )
        self._running: dict[str, SequenceState] = {}
        self._waiting: dict[str, SequenceState] = {}  # in order of arrival; all are newer than those that run
        self._arrivals = 0

    # --- state -----------------------------------------------------------------------------------------------
    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in served_tensors(self._model)}

    @property
    def policy_version(self) -> int:
        """Version of the weights in use."""
        return self._policy_version

    @property
    def held_bytes(self) -> int:
        """Of keys and values, prompts that are kept included."""
        return self._backend.held_bytes + self._prompts.num_bytes + self._bytes_being_read()

    # --- between steps ---------------------------------------------------------------------------------------
    def check_request(self, request: GenerationRequest) -> None:
        """Raise what :meth:`submit` would, conflicts aside. Any thread.

        Raises:
            InvalidInputError: naming the field.
            TooLongError: prompt and ``max_new_tokens`` exceed ``max_context_tokens``, or their keys and values alone
                ``cache_bytes``.
        """
        self._checked(request)

    def _checked(self, request: GenerationRequest) -> GrammarMatcher | None:
        """Where what is written of it stands in its grammar, if it has one."""
        validate_request(request, valid_vocab_size=self._valid_vocab_size, max_context_tokens=self._max_context_tokens)
        most = most_tokens_read(request)
        if (needed := self._backend.needed_bytes([most])) > self._cache_bytes:
            prompt_fits = self._backend.needed_bytes([len(request.prompt_ids)]) <= self._cache_bytes
            raise TooLongError(
                f"keys and values of {most} tokens take {needed} bytes, but cache_bytes is {self._cache_bytes}",
                field="sampling.max_new_tokens" if prompt_fits else "prompt_ids",
            )
        return matcher_of(request, self._grammars) if request.sampling.grammar else None

    @torch.inference_mode()
    def submit(self, request: GenerationRequest, kv: Mapping[str, Tensor] | None = None) -> None:
        if request.request_id in self._running or request.request_id in self._waiting:
            raise RequestConflictError(f"{request.request_id!r} is in progress", field="request_id")
        matcher = self._checked(request)
        self._arrivals += 1
        sequence = SequenceState(request, self._arrivals, matcher, in_pieces=self._reader.in_pieces)
        if kv is not None:
            self._restore(sequence, kv)
        self._waiting[request.request_id] = sequence

    @torch.inference_mode()
    def cancel(self, request_id: str) -> bool:
        if self._running.pop(request_id, None):
            self._backend.drop([request_id])
            return True
        return self._waiting.pop(request_id, None) is not None

    def prepare_policy(self, tensors: Mapping[str, Tensor]) -> PreparedPolicy:
        """As :meth:`RolloutEngine.prepare_policy`; the parameters share storage with ``tensors`` that fit as they are.

        Raises:
            InvalidInputError: no tensors, an unknown name, a wrong shape, or two values for one tied weight.
            CorruptWeightsError: NaN or infinity, in the model's dtype.
        """
        return stage_weights(self._homes, tensors, self._packed)

    def swap_policy(self, prepared: PreparedPolicy, version: int) -> None:
        if not isinstance(prepared, StagedWeights):
            raise TypeError(f"a {type(prepared).__name__} was not prepared by this engine")
        started = time.perf_counter()
        exchange_weights(prepared, self._packed)
        self._policy_version = version
        if not self._keep_kv_on_update:
            self._requeue_running()
        self._prompts.clear()
        for sequence in self._waiting.values():
            sequence.forget_context()
        self.counters.swap_seconds += time.perf_counter() - started

    def export_kv(self, request_id: str) -> dict[str, Tensor] | None:
        """``layer{i}.keys`` and ``layer{i}.values`` [H, T, D] of all T tokens of prompt and response but the newest;
        None for what does not run, and for a cache of other than plain keys and values.
        """
        key_values = self._backend.export(request_id) if request_id in self._running else None
        return None if key_values is None else to_tensors(key_values)

    # --- the step --------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Decode one token for each running request, then read waiting ones that may take the free slots.

        Returns one event per request that wrote a token or failed.

        Raises:
            InternalError: the model cannot run at all any more.
        """
        if self.idle:
            return []
        if self._packed is not None:
            self._packed.complete()
        self.counters.steps += 1
        events = self._decode() if self._running else []
        # After decoding, so that a slot freed in this step is filled in this step.
        return events + self._admit()

    def _decode(self) -> list[TokenEvent]:
        started = time.perf_counter()
        self._make_room_to_decode()
        try:
            request_ids, logits_BV = self._backend.decode({key: seq.tokens[-1] for key, seq in self._running.items()})
        except Exception:
            # It cannot be told whose fault this is. Read one by one, the guilty one will fail alone.
            logger.exception("a decode pass over %d requests failed; all are prefilled again", len(self._running))
            self._requeue_running()
            return []
        self.counters.decode_seconds += time.perf_counter() - started
        return self._emit([self._running[request_id] for request_id in request_ids], logits_BV)

    def _admit(self) -> list[TokenEvent]:
        """Read waiting requests; those that were read whole join the running ones and get a token."""
        accepted = self._accept()
        if not accepted:
            return []
        started = time.perf_counter()
        reserved = self._backend.needed_bytes(self._lengths_soon([*self._running.values(), *accepted]))
        reserved += self._bytes_being_read(len(accepted))

        def make_room(tokens: int) -> int:
            being_read = self._bytes_being_read() + tokens * self._backend.token_bytes
            self._backend.limit(self._cache_bytes - self._prompts.num_bytes - being_read)
            return self._cache_bytes - max(self._backend.held_bytes + being_read, reserved)

        events: list[TokenEvent] = []
        for sequence, failure in self._reader.read(accepted, self._waiting.values(), self._policy_version, make_room):
            self._raise_if_broken(failure)
            del self._waiting[sequence.request.request_id]
            events.append(self._failure(sequence, failure))
        ready: list[SequenceState] = []
        for sequence in accepted:
            if sequence.request.request_id not in self._waiting:
                continue  # it failed
            if not sequence.is_read:
                break  # nobody overtakes it, or the memory it waits for might go to others
            if sequence.joins_alone and ready:
                break
            ready.append(sequence)
            if sequence.joins_alone:
                break
        joined = self._join(ready, events)
        fresh = [sequence for sequence in joined if sequence.logits_V is not None]
        logits = [sequence.logits_V for sequence in fresh if sequence.logits_V is not None]
        for sequence in joined:
            sequence.logits_V = None
        self.counters.prefill_seconds += time.perf_counter() - started
        return events + (self._emit(fresh, torch.stack(logits)) if fresh else [])

    def _join(self, sequences: list[SequenceState], events: list[TokenEvent]) -> list[SequenceState]:
        """Those that were read become rows; returns those that did. Who could not, even alone, has an event."""
        if not sequences:
            return []
        contexts = {}
        for sequence in sequences:
            request_id = sequence.request.request_id
            del self._waiting[request_id]
            contexts[request_id], sequence.context, sequence.restored = sequence.context, None, False
        try:
            self._backend.limit(self._cache_bytes - self._prompts.num_bytes - self._bytes_being_read())
            self._backend.join(contexts)
        except Exception as failure:
            # Out of memory, for one, may have left the shared cache half moved.
            logger.exception("%d requests could not join", len(sequences))
            self._raise_if_broken(failure)
            if len(sequences) == 1:
                events.append(self._failure(sequences[0], failure))
            for sequence in sequences if len(sequences) > 1 else ():
                sequence.forget_context()
                sequence.joins_alone = True
                self._waiting[sequence.request.request_id] = sequence
            self._requeue_running()
            return []
        for sequence in sequences:
            sequence.joins_alone = False
            self._running[sequence.request.request_id] = sequence
        return sequences

    def _emit(self, sequences: Sequence[SequenceState], logits_BV: Tensor) -> list[TokenEvent]:
        """Sample one token per row, retire what is finished or failed."""
        started = time.perf_counter()
        sampled = sample_tokens(
            logits_BV,
            [sequence.request.sampling for sequence in sequences],
            [len(sequence.tokens) for sequence in sequences],
            self._valid_vocab_size,
            [sequence.allowed() for sequence in sequences],
        )
        rows = zip(
            sequences,
            sampled.token_ids_B.tolist(),
            sampled.sampling_logprobs_B.tolist(),
            sampled.policy_logprobs_B.tolist(),
            sampled.errors,
            sampled.kept_ids,
            strict=True,
        )
        events: list[TokenEvent] = []
        ended = []
        for sequence, token, sampling_logprob, policy_logprob, error, kept in rows:
            if error is not None:
                event = self._failure(sequence, error)
            else:
                sequence.append(token, self._policy_version)
                self.counters.tokens += 1
                event = TokenEvent(
                    request_id=sequence.request.request_id,
                    position=len(sequence.tokens) - 1,
                    token_id=token,
                    sampling_logprob=sampling_logprob,
                    policy_logprob=policy_logprob,
                    policy_version=self._policy_version,
                    finish_reason=finish_reason_after(sequence.request.sampling, sequence.tokens),
                    kept=kept or (),
                )
            if event.finish_reason or event.error:
                self._running.pop(event.request_id)
                ended.append(event.request_id)
            events.append(event)
        if ended:
            self._backend.drop(ended)
        self.counters.sample_seconds += time.perf_counter() - started
        return events

    def _raise_if_broken(self, failure: Exception) -> None:
        """Tell what one request did from what would befall every other: a CUDA error, for one, never goes away."""
        if isinstance(failure, (OpdError, torch.OutOfMemoryError)):  # another request may be smaller
            return
        try:
            self._backend.probe()
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing can run
            raise InternalError(
                f"the model cannot run any more: after {type(failure).__name__}: {failure}; a pass over one token "
                f"fails, too: {type(error).__name__}: {error}"
            ) from failure

    def _failure(self, sequence: SequenceState, failure: Exception) -> TokenEvent:
        if not isinstance(failure, OpdError):
            failure = InternalError(f"the model could not read the context: {type(failure).__name__}: {failure}")
        return TokenEvent(
            request_id=sequence.request.request_id,
            position=len(sequence.tokens),
            token_id=-1,
            sampling_logprob=float("nan"),
            policy_logprob=float("nan"),
            policy_version=self._policy_version,
            error=failure,
        )

    def _requeue_running(self) -> None:
        """Drop all keys and values of running requests; they wait at the front."""
        self._backend.drop_all()
        self._waiting = _by_arrival([*self._running.values(), *self._waiting.values()])
        self._running = {}

    # --- memory ----------------------------------------------------------------------------------------------
    def _bytes_being_read(self, behind: int = 0) -> int:
        """Of waiting requests, those behind so many."""
        waiting = islice(self._waiting.values(), behind, None)
        contexts = [sequence.context for sequence in waiting if sequence.context is not None]
        return self._backend.token_bytes * sum(context.length for context in contexts)

    def _lengths_soon(self, sequences: Iterable[SequenceState]) -> list[int]:
        """Tokens that will have been read of each when it has written some more."""
        return [min(sequence.length + _HEADROOM_TOKENS, sequence.most_read) for sequence in sequences]

    def _accept(self) -> list[SequenceState]:
        """The oldest waiting requests for which there will be slots and memory."""
        oldest = list(islice(self._waiting.values(), max(0, self._max_slots - len(self._running))))
        lengths = self._lengths_soon(self._running.values())
        soon = self._lengths_soon(oldest)
        everything = self._backend.needed_bytes([*lengths, *soon])
        if everything + self._prompts.num_bytes + self._bytes_being_read(len(oldest)) <= self._cache_bytes:
            return oldest  # as the loop below would find, one by one
        accepted: list[SequenceState] = []
        for sequence, length in zip(oldest, soon, strict=True):
            lengths.append(length)
            if not self._reserve(lengths, len(accepted) + 1):
                break
            accepted.append(sequence)
        return accepted

    def _reserve(self, lengths: list[int], num_accepted: int) -> bool:
        """Let go of what is kept for later, so that rows of these lengths fit; False where they do not even so."""
        needed = self._backend.needed_bytes(lengths)
        if needed > self._cache_bytes:
            return False
        later = [sequence for sequence in list(self._waiting.values())[num_accepted:] if sequence.context is not None]
        while (
            needed
            + self._prompts.num_bytes
            + sum(sequence.context.length * self._backend.token_bytes for sequence in later)
            > self._cache_bytes
        ):
            if len(self._prompts):
                self._prompts.drop_oldest()
            else:
                later.pop().forget_context()
        return True

    def _make_room_to_decode(self) -> None:
        """For one more token of each running request. The newest ones wait again where there is none."""
        while not self._reserve([sequence.length for sequence in self._running.values()], 0):
            newest = max(self._running.values(), key=lambda sequence: sequence.arrival)
            request_id = newest.request.request_id
            logger.debug("%s waits again: %d requests outgrew the memory", request_id, len(self._running))
            del self._running[request_id]
            self._backend.drop([request_id])
            self._waiting = _by_arrival([newest, *self._waiting.values()])
            self.counters.preempted += 1
        self._backend.limit(self._cache_bytes - self._prompts.num_bytes - self._bytes_being_read())

    def _restore(self, sequence: SequenceState, kv: Mapping[str, Tensor]) -> None:
        """Take keys and values over, if they are of this model and of this request, and if there is memory."""
        layers, length = self.cache_proof.layers, sequence.length - 1
        try:
            if not layers or self.cache_mode is CacheMode.UNCACHED or not sequence.tokens:
                raise ValueError(f"{length} tokens in cache mode {self.cache_mode}")
            if self.cache_mode is CacheMode.PER_REQUEST and any(shape is None or shape.windowed for shape in layers):
                raise ValueError("the model's own cache is not of all keys and values")
            key_values = from_tensors(kv, layers, length, next(self._model.parameters()).device)
            if self.held_bytes + length * self._backend.token_bytes > self._cache_bytes:
                raise ValueError("there is no memory for them")
            sequence.context = self._backend.restore(key_values)
            sequence.restored = sequence.context is not None
        except ValueError as reason:
            logger.info("saved keys and values of %s are not used: %s", sequence.request.request_id, reason)


def _by_arrival(sequences: Iterable[SequenceState]) -> dict[str, SequenceState]:
    return {sequence.request.request_id: sequence for sequence in sorted(sequences, key=lambda state: state.arrival)}
