"""Hidden states of several sequences at once, and the proofs of which ways of batching them are safe.

Letters: B rows, T tokens, d width. A batch is a list of token sequences of differing lengths T_i; a layout is how they
are put into tensors. An architecture may leak between packed neighbours (compressed attention, recurrent states); no
list of architectures is kept here: each model proves on load what it can do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from opd_mesh.errors import InvalidInputError

# Largest |difference| of hidden states allowed, in standard deviations of the LONE states. Measured on tiny models:
# rounding alone (other GEMM shapes) gives up to 2e-5 in float32, 7e-3 in float16 and 5e-2 in bfloat16, a leak 0.1 and
# more. There is no room for an expert or an index chosen otherwise near a tie: such a model is refused that layout,
# which costs speed and never correctness.
LAYOUT_TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
LAYOUT_TOLERANCES_DEFAULT = 1e-3
# A trained model with massive activations amplifies rounding a hundredfold at some tokens (SmolLM2-135M on random ids:
# its float32 states are 1e-2 from its float64 ones). So the bound rises to a multiple of what rounding the embeddings
# changes in a lone sequence, but never to where leaks begin.
ROUNDING_FACTOR = 20.0
# A row of the layout SHARED is at least so long where there is enough to fill it: below it attention costs next to
# nothing beside the rest of a layer, and every border may part what is shared.
SHARED_ROW_TOKENS = 128
LARGEST_TOLERANCE = 5e-2


class BatchLayout(StrEnum):
    """How sequences share a forward pass."""

    SHARED = "shared"  # packed into a few rows, in which what sequences have in common at their beginning stands once
    PACKED = "packed"  # one row, no padding; position ids start again with every sequence
    PADDED = "padded"  # one row each, padded on the right, with an attention mask
    LONE = "lone"  # one forward pass each


# --- forward ---------------------------------------------------------------------------------------------------
def trunk(model: Any) -> Any:
    """The model below its head: what returns the last hidden states. A PEFT wrapper is looked through."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    base = causal_lm.base_model
    if base is causal_lm:
        raise InvalidInputError(f"{type(causal_lm).__name__} has no base model below its head", field="model")
    return base


def last_hidden_states(
    model: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """[B, T] → [B, T, d]: what the model multiplies by its head, after the final norm, hyper-connections collapsed.

    No logits are computed. Differentiable. :func:`opd_mesh.models.heads.prove_head` shows whether it is the right one.
    """
    batch: dict[str, Tensor] = {"input_ids": input_ids}
    if attention_mask is not None:
        batch["attention_mask"] = attention_mask
    if position_ids is not None:
        batch["position_ids"] = position_ids
    hidden_BTD: Tensor = trunk(model)(**batch, use_cache=False, return_dict=True).last_hidden_state
    return hidden_BTD


def sequence_hidden_states(model: Any, sequences: Sequence[Sequence[int]], layout: BatchLayout) -> list[Tensor]:
    """Last hidden states [T_i, d] of each sequence, on the model's device, with or without grad as the caller set it.

    Raises:
        InvalidInputError: there is no sequence, or one is empty.
    """
    if not sequences or not all(sequences):
        raise InvalidInputError("needs at least one sequence, and none of them empty", field="sequences")
    device = input_device(model)
    rows = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    lengths = [len(row) for row in rows]
    if layout is BatchLayout.LONE:
        return [last_hidden_states(model, row[None].to(device))[0] for row in rows]
    if layout is BatchLayout.SHARED:
        return _shared_hidden_states(model, sequences)
    if layout is BatchLayout.PACKED:
        # Without an attention mask transformers finds the borders where position ids do not ascend by one, and builds a
        # block-diagonal causal (or windowed) mask for eager and sdpa, or cu_seqlens for flash attention.
        position_ids = torch.cat([torch.arange(length) for length in lengths])
        hidden_1TD = last_hidden_states(
            model, torch.cat(rows)[None].to(device), position_ids=position_ids[None].to(device)
        )
        return list(hidden_1TD[0].split(lengths))
    # Padding on the right keeps positions and compression windows where they are in a lone sequence; what is in the
    # padded cells is never seen by a token (causality), so any valid id does.
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0).to(device)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).to(device=device, dtype=torch.long)
    hidden_BTD = last_hidden_states(model, input_ids, attention_mask=mask)
    return [hidden_BTD[row, :length] for row, length in enumerate(lengths)]


def _shared_hidden_states(model: Any, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Attention costs a row's square, so the sequences are dealt out to several rows, neighbours in lexical order to
    the same one; what is shared across a border is computed once for each side.
    """
    device = input_device(model)
    order = sorted(range(len(sequences)), key=lambda index: list(sequences[index]))
    limit = max(SHARED_ROW_TOKENS, 2 * max(map(len, sequences)))
    rows: list[list[int]] = []
    room = 0
    for place, index in enumerate(order):
        own = len(sequences[index]) - (_shared_length(sequences[order[place - 1]], sequences[index]) if rows else 0)
        if own > room:
            rows.append([])
            own, room = len(sequences[index]), limit
        rows[-1].append(index)
        room -= own
    trees = [_PrefixTree.of([sequences[index] for index in row]) for row in rows]
    longest = max(len(tree.input_ids) for tree in trees)

    def padded(rows: Iterator[Tensor]) -> Tensor:
        return torch.stack([nn.functional.pad(row, (0, longest - len(row))) for row in rows]).to(device)

    hidden_BTD = last_hidden_states(
        model,
        padded(tree.input_ids for tree in trees),
        attention_mask=torch.stack([tree.additive_mask(model.dtype, longest) for tree in trees])[:, None].to(device),
        position_ids=padded(tree.position_ids for tree in trees),
    )
    found: dict[int, Tensor] = {}
    for number, (row, tree) in enumerate(zip(rows, trees, strict=True)):
        for index, path in zip(row, tree.paths, strict=True):
            found[index] = hidden_BTD[number, path.to(device)]
    return [found[index] for index in range(len(sequences))]


def _shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True, slots=True)
class _PrefixTree:
    """Sequences as paths through one row of T tokens, in which each sees those on its own path up to itself.

    Answers to one prompt share all of it, and all prompts share the beginning of the chat template. A token's hidden
    state depends on nothing behind it, so what is shared is computed once and its gradient is the sum over its users.
    """

    input_ids: Tensor  # [T]
    position_ids: Tensor  # [T]
    paths: tuple[Tensor, ...]  # per sequence: which of the T tokens it consists of

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> _PrefixTree:
        input_ids: list[int] = []
        position_ids: list[int] = []
        paths: dict[int, list[int]] = {}
        previous: list[int] = []
        path: list[int] = []
        # In lexical order the longest beginning that a sequence shares with any before it, it shares with the last one.
        for index, tokens in sorted(((i, list(sequence)) for i, sequence in enumerate(sequences)), key=lambda x: x[1]):
            shared = _shared_length(previous, tokens)
            path = path[:shared] + list(range(len(input_ids), len(input_ids) + len(tokens) - shared))
            input_ids += tokens[shared:]
            position_ids += range(shared, len(tokens))
            paths[index], previous = path, tokens
        return cls(
            torch.tensor(input_ids),
            torch.tensor(position_ids),
            tuple(torch.tensor(paths[index]) for index in range(len(paths))),
        )

    def additive_mask(self, dtype: torch.dtype, size: int) -> Tensor:
        """[size, size], T and padding behind it: 0 where a token (row) sees another, the lowest number elsewhere."""
        mask_TT = torch.full((size, size), torch.finfo(dtype).min, dtype=dtype)
        for path in self.paths:
            sees = torch.ones(len(path), len(path), dtype=torch.bool).tril()
            rows, columns = path[:, None].expand_as(sees), path[None].expand_as(sees)
            mask_TT[rows[sees], columns[sees]] = 0.0
        return mask_TT


def input_device(model: Any) -> torch.device:
    """Where token ids must be."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode and no grad inside; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# --- proofs ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class LayoutProof:
    """Which layouts give the hidden states of lone sequences.

    Attributes:
        allowed: best first; ends with LONE.
        errors: largest difference from LONE, or between two runs that differ in the neighbours alone, in standard
            deviations; infinite where the layout raised.
        reason: one line per layout, for a card or a log.
    """

    allowed: tuple[BatchLayout, ...]
    errors: dict[BatchLayout, float]
    tolerance: float
    probe_lengths: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class CacheProof:
    """Whether prefill and decoding token by token with the model's own cache give the uncached hidden states."""

    ok: bool
    max_rel_error: float
    tolerance: float
    reason: str

    def __bool__(self) -> bool:
        return self.ok


def prove_layouts(model: Any, *, seed: int = 0, max_probe_tokens: int = 512) -> LayoutProof:
    """Compare every layout with LONE on four random sequences of awkward lengths that begin alike.

    The longest exceeds every window of the architecture below ``max_probe_tokens``. Each layout runs three times: as
    is, and with the odd or the even sequences replaced, which must not change the others.
    """
    windows, unreached = _windows(model, max_probe_tokens)
    long = min(2 * max([*windows, 19]) + 3, max_probe_tokens)
    lengths = (long, 1, 17, long // 2 + 2)
    sequences, others = _probe(model, lengths, seed), _probe(model, lengths, seed + 1)
    allowed: list[BatchLayout] = []
    errors: dict[BatchLayout, float] = {}
    lines: list[str] = []
    with evaluation(model):
        lone = sequence_hidden_states(model, sequences, BatchLayout.LONE)
        tolerance = _layout_tolerance(model, sequences, lone)
        for layout in (BatchLayout.SHARED, BatchLayout.PACKED, BatchLayout.PADDED):
            if layout is BatchLayout.SHARED and (windows or unreached):
                # Its mask knows none, and a window that is longer than the probe would not be found out.
                errors[layout] = float("inf")
                lines.append(f"{layout}: refused, this model attends within windows")
                continue
            try:
                hidden = sequence_hidden_states(model, sequences, layout)
                difference = _largest_error(hidden, lone)
                leak = max(
                    _largest_error(
                        sequence_hidden_states(
                            model, [(sequences, others)[i % 2 != kept][i] for i in range(len(lengths))], layout
                        )[kept::2],
                        hidden[kept::2],
                    )
                    for kept in (0, 1)
                )
            except Exception as error:  # noqa: BLE001  whatever it is, a layout that raises is not offered, and says why
                errors[layout] = float("inf")
                lines.append(f"{layout}: refused, {type(error).__name__}: {_first_line(error)}")
                continue
            errors[layout] = max(difference, leak)
            if errors[layout] <= tolerance:
                allowed.append(layout)
                lines.append(f"{layout}: ok, {errors[layout]:.1e}")
            elif not leak <= tolerance:
                lines.append(f"{layout}: refused, neighbours leak into each other by {leak:.1e}")
            else:
                lines.append(f"{layout}: refused, differs from a lone sequence by {difference:.1e}")
    if BatchLayout.SHARED in allowed and BatchLayout.PADDED not in allowed:
        # The probe fills one row of it, but more tokens fill several, padded to the same length.
        allowed.remove(BatchLayout.SHARED)
        errors[BatchLayout.SHARED] = errors[BatchLayout.PADDED]
        lines[0] = f"{BatchLayout.SHARED}: refused, its rows stand beside each other as {BatchLayout.PADDED} ones do"
    allowed.append(BatchLayout.LONE)
    errors[BatchLayout.LONE] = 0.0
    lines.append(
        f"{BatchLayout.LONE}: the reference; tolerance {tolerance:.0e} standard deviations, probe lengths {lengths}"
    )
    if unreached:
        lines.append(f"windows of {unreached} tokens are longer than the probe and were not crossed")
    return LayoutProof(tuple(allowed), errors, tolerance, lengths, "\n".join(lines))


def prove_cached(model: Any, *, seed: int = 0, max_probe_tokens: int = 512) -> CacheProof:
    """Prefill, then decode token by token with the cache that the model makes, against one uncached forward.

    Two probes: a prefill of 3 tokens and 24 decoded ones (small windows close while decoding), and a prefill just
    short of a multiple of the largest window with 12 decoded ones.
    """
    windows, unreached = _windows(model, max_probe_tokens)
    long = max([*windows, 19]) * 2
    tolerance = _tolerance(model)
    worst = 0.0
    with evaluation(model):
        for prefill, decoded in ((3, 24), (min(long, max_probe_tokens) - 5, 12)):
            (sequence,) = _probe(model, (prefill + decoded,), seed)
            input_ids = torch.tensor(sequence, device=input_device(model))[None]
            try:
                cached = _decode(model, input_ids, prefill)
            except Exception as error:  # noqa: BLE001  see prove_layouts
                reason = f"decoding with the model's own cache raises {type(error).__name__}: {_first_line(error)}"
                return CacheProof(False, float("inf"), tolerance, reason)
            worst = max(worst, _largest_error([cached], [last_hidden_states(model, input_ids)[0]]))
            if not worst <= tolerance:
                reason = f"after a prefill of {prefill}, decoding differs from the uncached forward by {worst:.1e}"
                return CacheProof(False, worst, tolerance, reason)
    suffix = f"; windows of {unreached} tokens were not crossed" if unreached else ""
    return CacheProof(True, worst, tolerance, f"cached and uncached agree to {worst:.1e} standard deviations{suffix}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _decode(model: Any, input_ids: Tensor, prefill: int) -> Tensor:
    """[1, T] → [T, d], the first ``prefill`` tokens in one step."""
    base = trunk(model)
    total = input_ids.shape[1]
    cache, hidden = None, []
    for start, end in [(0, prefill), *((t, t + 1) for t in range(prefill, total))]:
        output = base(
            input_ids=input_ids[:, start:end],
            attention_mask=torch.ones_like(input_ids[:, :end]),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        cache = output.past_key_values
        if cache is None:
            raise NotImplementedError("the model returns no cache in past_key_values")
        hidden.append(output.last_hidden_state[0])
    return torch.cat(hidden)


def _windows(model: Any, max_probe_tokens: int) -> tuple[list[int], list[int]]:
    """Spans after which the past is treated differently: (those a probe crosses, those too long for it)."""
    config = model.config.get_text_config().to_dict()
    spans = {config.get(name) for name in ("sliding_window", "attention_chunk_size", "chunk_size", "mamba_chunk_size")}
    rates = config.get("compress_rates") or {}
    spans |= set(rates.values())
    # DeepSeek's indexer drops entries only once there are more than index_topk of them.
    spans |= {rate * config["index_topk"] for rate in rates.values() if config.get("index_topk")}
    found = sorted(span for span in spans if isinstance(span, int) and span > 1)
    return [span for span in found if span < max_probe_tokens], [span for span in found if span >= max_probe_tokens]


def _probe(model: Any, lengths: Sequence[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    first, *others = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
    # Half of each is the beginning of the first one; a sequence of one token is that beginning.
    return [first, *((first[: (len(ids) + 1) // 2] + ids[(len(ids) + 1) // 2 :])[: len(ids)] for ids in others)]


def _tolerance(model: Any) -> float:
    return LAYOUT_TOLERANCES.get(model.dtype, LAYOUT_TOLERANCES_DEFAULT)


def _layout_tolerance(model: Any, sequences: Sequence[Sequence[int]], lone: Sequence[Tensor]) -> float:
    """The bound for this model: see ``ROUNDING_FACTOR``."""
    base = _tolerance(model)
    rounding = 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):

        def nudge(_module: nn.Module, _inputs: Any, embedded: Tensor) -> Tensor:
            noise = torch.rand(embedded.shape, generator=generator).to(embedded.device) - 0.5
            return embedded * (1 + 2 * torch.finfo(embedded.dtype).eps * noise).to(embedded.dtype)

        hook = model.get_input_embeddings().register_forward_hook(nudge)
        try:
            nudged = sequence_hidden_states(model, sequences, BatchLayout.LONE)
        finally:
            hook.remove()
        rounding = max(rounding, _largest_error(nudged, lone))
    return max(base, min(ROUNDING_FACTOR * rounding, LARGEST_TOLERANCE))


def _largest_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest |difference| in standard deviations of what is wanted; NaN, which no bound accepts, if any is."""
    wanted_TD, found_TD = torch.cat(list(wanted)).float(), torch.cat(list(found)).float()
    return float((found_TD - wanted_TD).abs().max() / wanted_TD.std())
