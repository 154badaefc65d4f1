"""Trajectories: what the student wrote, as token ids, with everything training needs to know about each token.

Letters: N tokens in all (prompt and response), R scored (response) tokens.

Alignment (DESIGN §4): row r of every per-token field, and of every teacher signal, speaks of the r-th *scored*
token, in order of position; the distribution that predicts the token at position t comes from position t − 1.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from enum import StrEnum

from opd_mesh.errors import InvalidInputError, TooLongError, TrajectoryError

UINT64_MAX = 2**64 - 1
MAX_GRAMMAR_BYTES = 64 << 10
MAX_KEPT_IDS = 1024  # of one token: what a mask may cost in the log and on the wire


class FinishReason(StrEnum):
    """Why a response ended."""

    STOP = "stop"  # a stop token was written; it is the last scored token
    LENGTH = "length"  # max_new_tokens reached
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn.

    ``seed`` keys a counter-based generator together with the token's position, so a response depends neither on the
    batch around it nor on interruptions. ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 are off.
    ``grammar`` (:mod:`opd_mesh.grammar`) says which tokens may be drawn at all; "" is off. A stop token then ends a
    response exactly where the grammar is complete. ``keep_mask``: with every token, tell the ids that top_k and top_p
    left (DeepSeek-V3.2, arXiv 2512.02556, section 3.1, "Keep Sampling Mask").
    """

    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 32
    stop_token_ids: tuple[int, ...] = ()
    grammar: str = ""
    keep_mask: bool = False

    @property
    def truncates(self) -> bool:
        """Ids are cut off for being unlikely, so that a ratio of probabilities needs to know which were left."""
        return self.top_k > 0 or self.top_p < 1

    def validate(self) -> None:
        """Raises :class:`InvalidInputError` naming the field."""

        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise InvalidInputError(f"must be {rule}, got {getattr(self, name)!r}", field=f"sampling.{name}")

        require(0 <= self.seed <= UINT64_MAX, "seed", "an unsigned 64-bit integer")
        require(math.isfinite(self.temperature) and 0 <= self.temperature <= 100, "temperature", "from 0 to 100")
        require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        require(self.top_k >= 0, "top_k", "0 (off) or more")
        require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        size = len(self.grammar.encode("utf-8", "surrogatepass"))
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidInputError(f"{size} bytes, but at most {MAX_GRAMMAR_BYTES} are read", field="sampling.grammar")
        if self.keep_mask and not 1 <= self.top_k <= MAX_KEPT_IDS:
            raise InvalidInputError(
                f"the ids that were left are told with every token, so top_k has to bound them: set it from 1 to "
                f"{MAX_KEPT_IDS}, not {self.top_k}",
                field="sampling.keep_mask",
            )


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One conversation as token ids, with the spans that the student wrote.

    Attributes:
        trajectory_id: unique in the run; training happens once per id.
        domain: routes the sample to its teacher(s).
        token_ids: [N] prompt and response (and, later, tool output between spans).
        scored_spans: half-open ``(start, end)`` intervals of ``token_ids`` that the student wrote, ascending, apart.
        sampling_logprobs: [R] under the sampling distribution (grammar, temperature, top-p and top-k applied), nats.
        policy_logprobs: [R] under the model itself (temperature 1, whole vocabulary), nats.
        policy_versions: [R] version that wrote each token.
        kept_token_ids: [R] ids that each token was drawn from, ascending, the token among them: ``sampling_logprobs``
            are normalized over exactly these. Empty where ``sampling.keep_mask`` did not ask for them.
    """

    trajectory_id: str
    domain: str
    token_ids: tuple[int, ...]
    scored_spans: tuple[tuple[int, int], ...]
    sampling_logprobs: tuple[float, ...] = ()
    policy_logprobs: tuple[float, ...] = ()
    policy_versions: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    finish_reason: FinishReason = FinishReason.STOP
    run_id: str = ""
    lineage: int = 0
    kept_token_ids: tuple[tuple[int, ...], ...] = ()

    @property
    def num_scored(self) -> int:
        """R, the number of scored tokens."""
        return sum(end - start for start, end in self.scored_spans)

    @property
    def scored_positions(self) -> list[int]:
        """[R] positions in ``token_ids`` of the scored tokens."""
        return [position for start, end in self.scored_spans for position in range(start, end)]

    @property
    def predicting_positions(self) -> list[int]:
        """[R] positions whose output distribution predicts the scored tokens: each scored position − 1."""
        return [position - 1 for position in self.scored_positions]

    @property
    def scored_token_ids(self) -> list[int]:
        """[R] the scored tokens."""
        return [self.token_ids[position] for position in self.scored_positions]

    def validate(self, *, vocab_size: int | None = None, max_tokens: int | None = None) -> None:
        """Check the shape of the trajectory and, where given, the limits of a server.

        Raises:
            TrajectoryError: naming the field.
            TooLongError: more than ``max_tokens`` token ids.
        """
        total = len(self.token_ids)
        if not self.trajectory_id:
            raise TrajectoryError("must not be empty", field="trajectory_id")
        if max_tokens is not None and total > max_tokens:
            raise TooLongError(f"{total} tokens, but at most {max_tokens} are accepted", field="token_ids")
        last_end = 0
        for index, (start, end) in enumerate(self.scored_spans):
            name = f"scored_spans[{index}]"
            if start < 1:
                raise TrajectoryError(
                    f"starts at {start}: the first token has no prediction, so start >= 1", field=name
                )
            if start >= end:
                raise TrajectoryError(f"[{start}, {end}) is empty", field=name)
            if end > total:
                raise TrajectoryError(f"ends at {end}, beyond the {total} token_ids", field=name)
            if start < last_end:
                raise TrajectoryError(f"[{start}, {end}) overlaps or precedes the span before it", field=name)
            last_end = end
        scored = self.num_scored
        if scored == 0:
            raise TrajectoryError(
                "no scored token: the response is empty, there is nothing to mark", field="scored_spans"
            )
        for name in ("sampling_logprobs", "policy_logprobs", "policy_versions", "kept_token_ids"):
            rows = len(getattr(self, name))
            if rows not in (0, scored):
                raise TrajectoryError(f"{rows} values for {scored} scored tokens", field=name)
        if self.token_ids and min(self.token_ids) < 0:
            raise TrajectoryError(f"token id {min(self.token_ids)} is negative", field="token_ids")
        if vocab_size is not None and max(self.token_ids) >= vocab_size:
            index = next(i for i, token in enumerate(self.token_ids) if token >= vocab_size)
            raise TrajectoryError(
                f"token id {self.token_ids[index]} at position {index} is outside the vocabulary of {vocab_size}",
                field="token_ids",
            )
        self._validate_kept(vocab_size)

    def _validate_kept(self, vocab_size: int | None) -> None:
        if not self.kept_token_ids:
            return
        for row, (token, ids) in enumerate(zip(self.scored_token_ids, self.kept_token_ids, strict=True)):
            name = f"kept_token_ids[{row}]"
            if token not in ids:
                raise TrajectoryError(f"scored token {token} is not among the ids that were kept", field=name)
            if not all(map(operator.lt, ids, ids[1:])):
                raise TrajectoryError("the ids are not in ascending order, each once", field=name)
            if ids[0] < 0:
                raise TrajectoryError(f"token id {ids[0]} is negative", field=name)
            if vocab_size is not None and ids[-1] >= vocab_size:
                raise TrajectoryError(f"token id {ids[-1]} is outside the vocabulary of {vocab_size}", field=name)
