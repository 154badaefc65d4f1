"""What goes into a rollout engine and what comes out: requests, token events, and the rules about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from opd_mesh.errors import InvalidInputError, OpdError, TooLongError
from opd_mesh.grammar import BoolArray, GrammarMatcher, Grammars
from opd_mesh.trajectory import FinishReason, SamplingParams
from rollout_server.prompts import PromptKey


@dataclass(frozen=True, slots=True)
class WrittenToken:
    """A response token that exists already: from the log, or from before a swap."""

    token_id: int
    sampling_logprob: float
    policy_logprob: float
    policy_version: int


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One response to write.

    Attributes:
        written: tokens that are kept as they are; writing goes on behind them.
        shared_prefix_tokens: with so many prompt tokens, fewer than all, the prompts of others begin, too; 0: none.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    written: tuple[WrittenToken, ...] = ()
    shared_prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of one request, or the error that ended it.

    Attributes:
        position: index of the token in its response. With an error: the index of the token that could not be written.
        token_id: −1 with an error.
        finish_reason: set on the last token.
        error: why this request failed; it is gone from the engine, and its neighbours never noticed.
        kept: with ``sampling.keep_mask`` the ids that the token was drawn from, ascending; else empty.
    """

    request_id: str
    position: int
    token_id: int
    sampling_logprob: float
    policy_logprob: float
    policy_version: int
    finish_reason: FinishReason | None = None
    error: OpdError | None = None
    kept: tuple[int, ...] = ()


@dataclass(slots=True)
class EngineCounters:
    """Totals since the engine was made.

    Attributes:
        tokens: written.
        prefill_tokens: of contexts, as often as they were read: again after a swap, once for all answers to a prompt,
            and once for all prompts of a prefix.
        shared_prefill_tokens: of prompts that were not read because another request's had been.
        replayed_tokens: of resumed requests, fed one by one as they were written (deterministic mode alone).
        preempted: running requests that went back to waiting because others outgrew the memory.
    """

    steps: int = 0
    tokens: int = 0
    prefill_tokens: int = 0
    shared_prefill_tokens: int = 0
    replayed_tokens: int = 0
    preempted: int = 0
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    sample_seconds: float = 0.0
    swap_seconds: float = 0.0


class SequenceState:
    """A request in progress.

    Attributes:
        arrival: its number in the order of submission.
        beginnings: the prompt, then its prefix that is shared, if it has one and the model can read on from there.
            What was read of either may be copied, and a pass over the context ends with each.
        tokens: all response tokens; ``versions`` the policy that wrote each.
        context: while it waits, what has been read of it: the backend's; None at first.
        logits_V: fp32 [V] behind the last token read.
        restored: ``context`` came from another process: it lacks the newest token, which decoding feeds.
        alone: a pass with it has failed; it is read again in a pass of its own.
        joins_alone: it could not join the running ones together with others.
        matcher: where its tokens stand in its grammar, if it has one; as they are kept, so is this.
    """

    def __init__(
        self, request: GenerationRequest, arrival: int, matcher: GrammarMatcher | None = None, *, in_pieces: bool = True
    ) -> None:
        self.request = request
        self.arrival = arrival
        shared = request.shared_prefix_tokens if in_pieces else 0
        prefix = (PromptKey(request.prompt_ids[:shared]),) if shared else ()
        self.beginnings = (PromptKey(request.prompt_ids, shared), *prefix)
        self.tokens = [token.token_id for token in request.written]
        self.versions = [token.policy_version for token in request.written]
        self.context: Any = None
        self.logits_V: Tensor | None = None
        self.restored = False
        self.alone = False
        self.joins_alone = False
        self.matcher = matcher

    def allowed(self) -> BoolArray | None:
        """The ids that its grammar allows next; None: all."""
        return None if self.matcher is None else self.matcher.allowed()

    def append(self, token: int, policy_version: int) -> None:
        """A token was drawn, of those that are allowed."""
        if self.matcher is not None:
            self.matcher.advance(token)
        self.tokens.append(token)
        self.versions.append(policy_version)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and response."""
        return [*self.request.prompt_ids, *self.tokens]

    @property
    def length(self) -> int:
        """Of prompt and response."""
        return len(self.request.prompt_ids) + len(self.tokens)

    @property
    def most_read(self) -> int:
        """Tokens that the model will have read of it at most: the last one written never is."""
        return most_tokens_read(self.request)

    @property
    def num_read(self) -> int:
        """Tokens of it that have been read while it waits."""
        return 0 if self.context is None else int(self.context.length)

    @property
    def is_read(self) -> bool:
        """It can decode."""
        return self.context is not None and (self.restored or self.context.length == self.length)

    def forget_context(self) -> None:
        """Read it again from the start."""
        self.context, self.logits_V, self.restored = None, None, False

    def written_under(self, policy_version: int) -> int:
        """How many of the newest tokens this version wrote."""
        count = 0
        while count < len(self.versions) and self.versions[-1 - count] == policy_version:
            count += 1
        return count


def most_tokens_read(request: GenerationRequest) -> int:
    """Tokens of prompt and response that a model reads at most: the last one written is not read."""
    return len(request.prompt_ids) + request.sampling.max_new_tokens - 1


def validate_request(request: GenerationRequest, *, valid_vocab_size: int, max_context_tokens: int) -> None:
    """Check a request against the limits of an engine.

    Raises:
        InvalidInputError: naming the field.
        TooLongError: prompt and ``max_new_tokens`` exceed ``max_context_tokens``.
    """
    sampling = request.sampling
    if not request.request_id:
        raise InvalidInputError("must not be empty", field="request_id")
    sampling.validate()
    if not request.prompt_ids:
        raise InvalidInputError("must hold at least one token", field="prompt_ids")
    written_ids = [token.token_id for token in request.written]
    for name, ids in (("prompt_ids", request.prompt_ids), ("written", written_ids)):
        if not ids or 0 <= min(ids) <= max(ids) < valid_vocab_size:
            continue
        for index, token in enumerate(ids):
            if not 0 <= token < valid_vocab_size:
                raise InvalidInputError(
                    f"{token} is outside the vocabulary of {valid_vocab_size}", field=f"{name}[{index}]"
                )
    prompt_length = len(request.prompt_ids)
    if not 0 <= request.shared_prefix_tokens < prompt_length:
        raise InvalidInputError(
            f"{request.shared_prefix_tokens} of {prompt_length} prompt tokens; give fewer than all, or 0 for none",
            field="shared_prefix_tokens",
        )
    if prompt_length + sampling.max_new_tokens > max_context_tokens:
        raise TooLongError(
            f"{prompt_length} prompt tokens and {sampling.max_new_tokens} new ones, "
            f"but a context holds {max_context_tokens}",
            field="prompt_ids" if prompt_length >= max_context_tokens else "sampling.max_new_tokens",
        )
    if finish_reason_after(sampling, written_ids):
        raise InvalidInputError("the response is finished: there is nothing to resume", field="written")


def matcher_of(request: GenerationRequest, grammars: Grammars | None) -> GrammarMatcher:
    """Where a request with a grammar goes on, behind what is written of it.

    Args:
        grammars: None: none are taken.

    Raises:
        InvalidInputError: the grammar does not compile, what is written does not fit it, or there is no stop token.
    """
    if grammars is None:
        raise InvalidInputError(
            "none are taken here: the bytes of the tokenizer's tokens cannot be told (the server's log says why)",
            field="sampling.grammar",
        )
    matcher = grammars.matcher(request.sampling.grammar, request.sampling.stop_token_ids)
    matcher.resume([token.token_id for token in request.written])
    return matcher


def finish_reason_after(sampling: SamplingParams, tokens: Sequence[int]) -> FinishReason | None:
    """Why a response with these tokens is over, or None."""
    if not tokens:
        return None
    if tokens[-1] in sampling.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(tokens) >= sampling.max_new_tokens else None
