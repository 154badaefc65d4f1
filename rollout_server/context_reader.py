"""Prefill: how waiting requests are read, in pieces and within a budget, and what they have in common once for all.

A context is read in passes: the prefix that its prompt shares with others, as far as the request says so, the rest of
the prompt, then the tokens that were written before. Others that begin with the same prefix, or are answers to the same
prompt, go on from copies of it. The boundaries are there for every request, whether it has company or not, so that
sharing never changes a bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import dropwhile, islice
from typing import Any

from torch import Tensor

from rollout_server.backends import Backend, Reading
from rollout_server.cache import CacheMode
from rollout_server.generation import EngineCounters, SequenceState
from rollout_server.prompts import PromptKey, PromptStore, ReadPrompt

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Who wants what others read.

    Attributes:
        now: requests that are to be read, by what they could go on from.
        later: the prompts of those behind them.
    """

    now: dict[PromptKey, list[SequenceState]]
    later: set[PromptKey]


class ContextReader:
    """Reads the contexts of requests that are to run.

    Args:
        backend: calls the model.
        prompts: where prompts and prefixes are kept for requests that come later. Of a prompt with a prefix the prefix
            is kept; the prompt, which is likely nobody else's, only where others wait with it.
        tokens_per_step: read by one :meth:`read` at most.
        deterministic: the pieces of a context depend on the request alone: ``tokens_per_step`` tokens each, from the
            start of the prompt, the end of its prefix and the start of the response; tokens that the present policy
            wrote are fed one by one, as they were when they were written, for a pass over several gives other bits.
            These are at most ``REPLAYED_PER_STEP`` by one :meth:`read`, the oldest request's first.
        in_pieces: the model can read a context in several passes. Otherwise it is read whole, if it is longer than
            ``tokens_per_step`` in a step of its own, and prefixes are ignored.
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
        self.in_pieces = in_pieces
        self._shares_prompts = shares_prompts
        self._counters = counters

    def read(
        self,
        sequences: Sequence[SequenceState],
        waiting: Iterable[SequenceState],
        policy_version: int,
        make_room: Callable[[int], int],
    ) -> list[tuple[SequenceState, Exception]]:
        """Read on, first come, first served. What ``is_read`` then can decode.

        Args:
            waiting: these, and behind them those for which there is no room yet.
            make_room: called with the tokens that are about to be read; returns the bytes that prompts may take.

        Returns:
            The sequences that cannot be read, and why. After a pass that fails each is tried again, alone.
        """
        failures: list[tuple[SequenceState, Exception]] = []
        budget, replays = self._tokens_per_step, REPLAYED_PER_STEP
        wanted = self._wanted(sequences, waiting, policy_version)
        while pieces := self._plan(sequences, [sequence for sequence, _ in failures], budget, replays, policy_version):
            tokens = sum(piece.size for piece in pieces)
            budget -= tokens
            replays -= sum(piece.replayed for piece in pieces)
            prompt_bytes = make_room(tokens)
            for group in self._groups(pieces):
                failures += self._read_group(group, wanted, prompt_bytes)
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
        being_read: set[PromptKey] = set()
        for sequence in sequences:
            if sequence in failed or self._waits_for(being_read, sequence, policy_version):
                continue  # its turn comes when that is done
            if sequence.is_read:
                continue
            piece = self._next_piece(sequence, budget, policy_version)
            if piece is None or (piece.replayed and replays < 1):
                break
            being_read.update(beginning for beginning in sequence.beginnings if piece.start < beginning.length)
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

    def _to_go_on_from(self, sequence: SequenceState, policy_version: int) -> list[PromptKey]:
        """What it could take over from others, the longest first: one of its own pieces ends there, too."""
        whole = len(sequence.request.prompt_ids)
        if not self._shares_prompts or not (self.in_pieces or self._replay_from(sequence, policy_version) == whole):
            return []
        return [beginning for beginning in sequence.beginnings if sequence.num_read < beginning.length]

    def _wanted(
        self, sequences: Sequence[SequenceState], waiting: Iterable[SequenceState], policy_version: int
    ) -> _Wanted:
        wanted = _Wanted({}, set())
        for sequence in sequences:
            for beginning in self._to_go_on_from(sequence, policy_version):
                wanted.now.setdefault(beginning, []).append(sequence)
        if any(len(sequence.beginnings) > 1 for sequence in sequences):  # else nobody asks
            wanted.later.update(sequence.beginnings[0] for sequence in islice(waiting, len(sequences), None))
        return wanted

    def _waits_for(self, being_read: set[PromptKey], sequence: SequenceState, policy_version: int) -> bool:
        """Whether another reads what it begins with; where that is in the store it goes on from there."""
        for beginning in self._to_go_on_from(sequence, policy_version):
            if beginning in being_read:
                return True
            if (stored := self._prompts.find(beginning)) is not None:
                self._start_from(sequence, stored.context, stored.logits_V)
                return False
        return False

    def _next_piece(self, sequence: SequenceState, budget: int, policy_version: int) -> _Piece | None:
        """None where the budget does not allow it in this step."""
        if budget < 1:
            return None
        start = sequence.num_read
        replay_from = self._replay_from(sequence, policy_version)
        if start >= replay_from:
            return _Piece(sequence, start, start + 1, replayed=True)
        if not self.in_pieces:
            fits = replay_from - start <= budget or budget == self._tokens_per_step
            return _Piece(sequence, start, replay_from, replayed=False) if fits else None
        ends = [beginning.length for beginning in sequence.beginnings if start < beginning.length]
        end = min(ends, default=replay_from)
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
        self, group: list[_Piece], wanted: _Wanted, prompt_bytes: int
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
            for beginning in piece.sequence.beginnings if self._shares_prompts else ():
                if piece.end == beginning.length:
                    self._share(beginning, piece.sequence, logits_V, wanted, prompt_bytes)
        return []

    def _share(
        self, beginning: PromptKey, reader: SequenceState, logits_V: Tensor, wanted: _Wanted, prompt_bytes: int
    ) -> None:
        """Others that wait for this go on from here; those that are yet to come find it in the store."""
        shortest = reader.beginnings[-1]
        num_bytes = beginning.length * self._backend.token_bytes + logits_V.nbytes
        if num_bytes <= prompt_bytes and (beginning is shortest or beginning in wanted.later):
            self._prompts.find(shortest)  # this uses it: others go first
            self._backend.own_storage(reader.context)
            prompt = ReadPrompt(self._backend.copy(reader.context), logits_V.clone(), num_bytes)
            self._prompts.put(beginning, prompt, max_bytes=prompt_bytes)
        for sequence in wanted.now.get(beginning, ()):
            if sequence.num_read < beginning.length:
                self._start_from(sequence, reader.context, logits_V)

    def _start_from(self, sequence: SequenceState, context: Any, logits_V: Tensor) -> None:
        self._counters.shared_prefill_tokens += context.length - sequence.num_read
        sequence.context, sequence.logits_V = self._backend.copy(context), logits_V
