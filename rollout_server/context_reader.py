"""Prefill: how waiting requests are read, in pieces and within a budget, and each prompt once for all its answers.

A context is read in passes: its prompt, then the tokens that were written before. Answers drawn to one prompt go on
from copies of it. That boundary is there for every request, shared or not, so that sharing never changes a bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any, TypeAlias

from torch import Tensor

from rollout_server.backends import Backend, Reading
from rollout_server.cache import CacheMode
from rollout_server.generation import EngineCounters, SequenceState
from rollout_server.prompts import PromptStore, ReadPrompt

logger = logging.getLogger(__name__)
# Requests by their prompt.
Siblings: TypeAlias = dict[tuple[int, ...], list[SequenceState]]

# What is decoded again is a pass for each token. A step does no more of them, so that running requests, updates and the
# end of the process wait for a moment only, whatever the budget of tokens.
REPLAYED_PER_STEP = 32


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens up to ``end`` of a sequence are read next."""

    sequence: SequenceState
    start: int
    end: int
    replayed: bool

    @property
    def size(self) -> int:
        return self.end - self.start


class ContextReader:
    """Reads the contexts of requests that are to run.

    Args:
        backend: calls the model.
        prompts: where prompts are kept for answers that come later.
        tokens_per_step: read by one :meth:`read` at most.
        deterministic: the pieces of a context depend on the request alone: ``tokens_per_step`` tokens each, from the
            start of the prompt and from the start of the response; tokens that the present policy wrote are fed one
            by one, as they were when they were written, for a pass over several gives other bits. These are at most
            ``REPLAYED_PER_STEP`` by one :meth:`read`, the oldest request's first.
        in_pieces: the model can read a context in several passes. Otherwise it is read whole, if it is longer than
            ``tokens_per_step`` in a step of its own.
        shares_prompts: what was read of a prompt may be copied.
        counters: prefill_tokens, shared_prefill_tokens and replayed_tokens are kept here.
    """

    def __init__(
        self,
        backend: Backend[Any],
        prompts: PromptStore,
        *,
        tokens_per_step: int,
        deterministic: bool,
        in_pieces: bool,
        shares_prompts: bool,
        counters: EngineCounters,
    ) -> None:
        self._backend = backend
        self._prompts = prompts
        self._tokens_per_step = tokens_per_step
        self._deterministic = deterministic
        self._in_pieces = in_pieces
        self._shares_prompts = shares_prompts
        self._counters = counters

    def read(
        self, sequences: Sequence[SequenceState], policy_version: int, make_room: Callable[[int], int]
    ) -> list[tuple[SequenceState, Exception]]:
        """Read on, first come, first served. What ``is_read`` then can decode.

        Args:
            make_room: called with the tokens that are about to be read; returns the bytes that prompts may take.

        Returns:
            The sequences that cannot be read, and why. After a pass that fails each is tried again, alone.
        """
        failures: list[tuple[SequenceState, Exception]] = []
        budget, replays = self._tokens_per_step, REPLAYED_PER_STEP
        siblings: Siblings = {}
        for sequence in sequences:
            siblings.setdefault(sequence.request.prompt_ids, []).append(sequence)
        while pieces := self._plan(sequences, [sequence for sequence, _ in failures], budget, replays, policy_version):
            tokens = sum(piece.size for piece in pieces)
            budget -= tokens
            replays -= sum(piece.replayed for piece in pieces)
            prompt_bytes = make_room(tokens)
            for group in self._groups(pieces):
                failures += self._read_group(group, siblings, prompt_bytes)
        for sequence in dropwhile(lambda sequence: sequence.is_read, sequences):
            if sequence.context is not None:
                self._backend.own_storage(sequence.context)  # it stays until the next step
        return failures

    # --- what to read ----------------------------------------------------------------------------------------
    def _plan(
        self,
        sequences: Sequence[SequenceState],
        failed: list[SequenceState],
        budget: int,
        replays: int,
        policy_version: int,
    ) -> list[_Piece]:
        """The next piece of each, as far as the budgets go, of tokens and of passes over replayed ones."""
        pieces: list[_Piece] = []
        prompts_being_read: set[tuple[int, ...]] = set()
        for sequence in sequences:
            prompt_ids = sequence.request.prompt_ids
            if sequence.context is None and self._shares(sequence, policy_version):
                if prompt_ids in prompts_being_read:
                    continue  # its turn comes when that is done
                if (stored := self._prompts.find(prompt_ids)) is not None:
                    self._start_from(sequence, stored.context, stored.logits_V)
            if sequence.is_read or sequence in failed:
                continue
            piece = self._next_piece(sequence, budget, policy_version)
            if piece is None or (piece.replayed and replays < 1):
                break
            if piece.start < len(prompt_ids):
                prompts_being_read.add(prompt_ids)
            budget -= piece.size
            pieces.append(piece)
            if piece.replayed:
                break  # whoever came first runs first: nothing is gained by replaying several in turn
        return pieces

    def _replay_from(self, sequence: SequenceState, policy_version: int) -> int:
        """Length of the context that was read, not decoded, by the run that is resumed.

        The versions tell: it was read when the present one came in. Without a cache every pass is over the whole
        context, so there is nothing to repeat.
        """
        if not self._deterministic or self._backend.mode is CacheMode.UNCACHED:
            return sequence.length
        return sequence.length - sequence.written_under(policy_version)

    def _shares(self, sequence: SequenceState, policy_version: int) -> bool:
        """One of its pieces ends with the prompt."""
        ends_there = self._in_pieces or self._replay_from(sequence, policy_version) == len(sequence.request.prompt_ids)
        return self._shares_prompts and ends_there

    def _next_piece(self, sequence: SequenceState, budget: int, policy_version: int) -> _Piece | None:
        """None where the budget does not allow it in this step."""
        if budget < 1:
            return None
        start = 0 if sequence.context is None else sequence.context.length
        prompt_length = len(sequence.request.prompt_ids)
        replay_from = self._replay_from(sequence, policy_version)
        if start >= replay_from:
            return _Piece(sequence, start, start + 1, replayed=True)
        if not self._in_pieces:
            fits = replay_from - start <= budget or budget == self._tokens_per_step
            return _Piece(sequence, start, replay_from, replayed=False) if fits else None
        end = prompt_length if start < prompt_length else replay_from
        if self._deterministic:
            end = min(end, start + self._tokens_per_step)
            return _Piece(sequence, start, end, replayed=False) if end - start <= budget else None
        return _Piece(sequence, start, min(end, start + budget), replayed=False)

    # --- reading ---------------------------------------------------------------------------------------------
    def _groups(self, pieces: list[_Piece]) -> list[list[_Piece]]:
        together = [piece for piece in pieces if not piece.sequence.alone]
        readings = [self._reading(piece) for piece in together]
        groups = [[together[index] for index in group] for group in self._backend.groups(readings)]
        return groups + [[piece] for piece in pieces if piece.sequence.alone]

    def _reading(self, piece: _Piece) -> Reading[Any]:
        sequence = piece.sequence
        context = self._backend.empty() if sequence.context is None else sequence.context
        return Reading(context, sequence.token_ids[: piece.end])

    def _read_group(
        self, group: list[_Piece], siblings: Siblings, prompt_bytes: int
    ) -> list[tuple[SequenceState, Exception]]:
        readings = [self._reading(piece) for piece in group]
        for piece in group:
            piece.sequence.context = None  # used up
        try:
            contexts, logits_BV = self._backend.read(readings)
        except Exception as failure:
            logger.exception("a pass over %s failed", [piece.sequence.request.request_id for piece in group])
            failed = [(piece.sequence, failure) for piece in group if piece.sequence.alone]
            for piece in group:
                piece.sequence.forget_context()
                piece.sequence.alone = True
            return failed
        for piece, context, logits_V in zip(group, contexts, logits_BV, strict=True):
            if piece.replayed:
                self._counters.replayed_tokens += piece.size
            else:
                self._counters.prefill_tokens += piece.size
            piece.sequence.context, piece.sequence.logits_V, piece.sequence.alone = context, logits_V, False
            if self._shares_prompts and piece.end == len(piece.sequence.request.prompt_ids):
                self._share(piece.sequence, logits_V, siblings, prompt_bytes)
        return []

    def _share(self, reader: SequenceState, logits_V: Tensor, siblings: Siblings, prompt_bytes: int) -> None:
        """Others that wait for this prompt go on from here; those that are yet to come find it in the store."""
        prompt_ids = reader.request.prompt_ids
        num_bytes = len(prompt_ids) * self._backend.token_bytes + logits_V.nbytes
        if num_bytes <= prompt_bytes:
            self._backend.own_storage(reader.context)
            prompt = ReadPrompt(self._backend.copy(reader.context), logits_V.clone(), num_bytes)
            self._prompts.put(prompt_ids, prompt, max_bytes=prompt_bytes)
        for sequence in siblings.get(prompt_ids, ()):
            if sequence.context is None and (self._in_pieces or not sequence.tokens):
                self._start_from(sequence, reader.context, logits_V)

    def _start_from(self, sequence: SequenceState, context: Any, logits_V: Tensor) -> None:
        sequence.context, sequence.logits_V = self._backend.copy(context), logits_V
        self._counters.shared_prefill_tokens += context.length
