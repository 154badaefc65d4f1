"""Sampling: known answers of the generator, what may be drawn, how often, and that rows do not see each other."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_mesh.errors import DivergedError, InvalidInputError
from opd_mesh.sampling import SampledTokens, _BlockedCdf, philox4x32, sample_tokens, uniform, uniforms
from opd_mesh.trajectory import UINT64_MAX, SamplingParams


def _words(*values: int) -> list[np.ndarray]:
    return [np.array([value], dtype=np.uint64) for value in values]


def _draw(
    logits_V: list[float] | torch.Tensor, params: SamplingParams, position: int = 0, valid: int | None = None
) -> int:
    logits_BV = torch.as_tensor(logits_V, dtype=torch.float32)[None]
    sampled = sample_tokens(logits_BV, [params], [position], valid or logits_BV.shape[1])
    assert sampled.errors == (None,)
    return int(sampled.token_ids_B[0])


def _assert_same(left: SampledTokens, right: SampledTokens) -> None:
    torch.testing.assert_close(left.token_ids_B, right.token_ids_B, rtol=0, atol=0)
    torch.testing.assert_close(left.sampling_logprobs_B, right.sampling_logprobs_B, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(left.policy_logprobs_B, right.policy_logprobs_B, rtol=0, atol=0, equal_nan=True)


# --- the generator ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Random123's own vectors (kat_vectors, philox4x32 10).
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert tuple(int(word[0]) for word in philox4x32(_words(*counter), _words(*key))) == expected


def test_uniform_known_answers() -> None:
    # Logs hold tokens drawn with these numbers: they may never change.
    assert uniform(0, 0) == 0.8805201978886142
    assert uniform(0, 0) == ((0xE169C58D << 32 | 0x6627E8D5) >> 11) / 2**53
    assert uniform(UINT64_MAX, 2**40) == 0.9043739799590275


@given(st.lists(st.tuples(st.integers(0, UINT64_MAX), st.integers(0, UINT64_MAX)), min_size=1, max_size=5))
def test_uniforms_of_a_batch_are_the_lone_ones(pairs: list[tuple[int, int]]) -> None:
    batch = uniforms([seed for seed, _ in pairs], [position for _, position in pairs])
    assert batch.tolist() == [uniform(seed, position) for seed, position in pairs]
    assert all(0 <= number < 1 for number in batch)


def test_neighbouring_seeds_and_positions_are_unrelated() -> None:
    grid = uniforms([seed for seed in range(100) for _ in range(100)], [t for _ in range(100) for t in range(100)])
    grid = grid.reshape(100, 100)
    for axis in (0, 1):
        pairs = np.corrcoef(np.delete(grid, 0, axis).ravel(), np.delete(grid, -1, axis).ravel())
        assert abs(pairs[0, 1]) < 0.04  # four standard deviations
    assert abs(grid.mean() - 0.5) < 0.012
    assert len(np.unique(grid)) == grid.size


# --- what may be drawn -----------------------------------------------------------------------------------------
def _reference_kept(logits_V: np.ndarray, params: SamplingParams) -> list[int]:
    """Ids that survive, by sorting (−logit, id) and adding up in plain Python."""
    order = sorted(range(len(logits_V)), key=lambda token: (-float(logits_V[token]), token))
    if params.top_k:
        order = order[: params.top_k]
    mass = [math.exp((float(logits_V[token]) - float(logits_V[order[0]])) / params.temperature) for token in order]
    kept, reached = [], 0.0
    for token, share in zip(order, mass, strict=True):
        kept.append(token)
        reached += share
        if params.top_p < 1 and reached >= params.top_p * math.fsum(mass):
            break
    return kept


@settings(max_examples=150, deadline=None)
@given(
    # Few distinct values, so that ties at the cuts are common.
    logits=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, -math.inf]), min_size=2, max_size=12),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-6, 0.1237, 0.5123, 0.8971, 0.99991, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    seed=st.integers(0, UINT64_MAX),
)
def test_only_kept_ids_are_drawn(logits: list[float], top_k: int, top_p: float, temperature: float, seed: int) -> None:
    logits = [*logits, 0.25]  # at least one finite logit
    params = SamplingParams(seed=seed, top_k=top_k, top_p=top_p, temperature=temperature)
    kept = _reference_kept(np.array(logits), params)
    padded = torch.tensor([*logits, 90.0, math.nan])  # padding ids: never read
    sampled = sample_tokens(padded[None], [params], [7], len(logits))
    token = int(sampled.token_ids_B[0])
    assert token in kept
    assert logits[token] > -math.inf
    scaled = torch.tensor(logits, dtype=torch.float64)[kept] / temperature
    expected = float(scaled.log_softmax(-1)[kept.index(token)])
    assert float(sampled.sampling_logprobs_B[0]) == pytest.approx(expected, abs=1e-5)
    policy = float(torch.tensor(logits, dtype=torch.float64).log_softmax(-1)[token])
    assert float(sampled.policy_logprobs_B[0]) == pytest.approx(policy, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), valid=st.sampled_from([1, 255, 256, 257, 1000]))
def test_the_draw_inverts_the_cdf_across_blocks(seed: int, valid: int) -> None:
    logits_V = torch.randn(1003, generator=torch.Generator().manual_seed(seed)) * 4
    cumulative = torch.cumsum(logits_V[:valid].double().softmax(-1), -1)
    for position in range(8):
        token = _draw(logits_V, SamplingParams(seed=seed), position, valid)
        draw = uniform(seed, position)
        before = float(cumulative[token - 1]) if token else 0.0
        assert before - 1e-6 <= draw <= float(cumulative[token]) + 1e-6


@pytest.mark.parametrize("offset", [0, 255, 256, 300])
def test_a_draw_on_a_boundary_takes_the_next_id_with_mass(offset: int) -> None:
    mass_V = np.zeros(700, np.float32)
    mass_V[[offset + 2, offset + 4, offset + 260]] = 1
    cdf = _BlockedCdf(mass_V)
    draws = [0.0, np.nextafter(1 / 3, 0), np.nextafter(1 / 3, 1), np.nextafter(1, 0)]
    assert [cdf.invert(float(draw)) - offset for draw in draws] == [2, 2, 4, 260]
    mass_V[offset + 260] = 0
    cdf = _BlockedCdf(mass_V)
    assert [cdf.invert(draw) - offset for draw in (0.0, 0.25, 0.5, 0.75)] == [2, 2, 4, 4]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    sampled = sample_tokens(
        torch.tensor([[1.0, 3.0, 3.0, 9.0]]), [SamplingParams(temperature=0, top_k=2, top_p=0.1)], [5], 3
    )
    assert int(sampled.token_ids_B[0]) == 1
    assert float(sampled.sampling_logprobs_B[0]) == 0.0
    assert float(sampled.policy_logprobs_B[0]) == pytest.approx(-math.log(2 + math.exp(-2)))


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9)
    sampled = sample_tokens(torch.tensor([[0.0, 5.0, 4.9]]), [params], [0], 3)
    assert int(sampled.token_ids_B[0]) == 1
    assert float(sampled.sampling_logprobs_B[0]) == 0.0


def test_ties_at_the_cut_go_to_the_lowest_ids() -> None:
    drawn = {_draw([1.0, 0.0, 1.0, 1.0, 1.0], SamplingParams(seed=seed, top_k=3)) for seed in range(60)}
    assert drawn == {0, 2, 3}


# --- how often -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.6), SamplingParams(top_k=5), SamplingParams(top_p=0.8, top_k=7)],
    ids=str,
)
def test_frequencies_follow_the_distribution(params: SamplingParams) -> None:
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 1.5, -0.5, 0.2, 1.2, -2.0])
    draws = 4000
    rows = [SamplingParams(seed=row // 50, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p)
            for row in range(draws)]  # fmt: skip
    sampled = sample_tokens(logits_V.expand(draws, -1), rows, [row % 50 for row in range(draws)], 10)
    kept = _reference_kept(logits_V.numpy(), params)
    expected = (logits_V[kept].double() / params.temperature).softmax(-1).numpy() * draws
    counts = np.bincount(sampled.token_ids_B.numpy(), minlength=10)
    assert counts[kept].sum() == draws
    # Chi-square, at most 9 degrees of freedom: 27.9 is its 99.9% quantile. The seeds are fixed.
    assert float(((counts[kept] - expected) ** 2 / expected).sum()) < 27.9


# --- rows ------------------------------------------------------------------------------------------------------
def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(3)
    logits_BV = torch.randn(6, 777, generator=generator) * 3
    logits_BV[2, 5] = math.nan
    logits_BV[4, 0] = math.inf
    params = [
        SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.7), SamplingParams(seed=3),
        SamplingParams(temperature=0), SamplingParams(seed=4), SamplingParams(seed=5, top_k=9, temperature=1.3),
    ]  # fmt: skip
    positions = [0, 3, 4, 5, 6, 2**33]
    together = sample_tokens(logits_BV, params, positions, 770)
    for row in range(6):
        alone = sample_tokens(logits_BV[row : row + 1].clone(), [params[row]], [positions[row]], 770)
        _assert_same(alone, SampledTokens(
            together.token_ids_B[row : row + 1], together.sampling_logprobs_B[row : row + 1],
            together.policy_logprobs_B[row : row + 1], together.errors[row : row + 1], together.kept_ids[row : row + 1],
        ))  # fmt: skip
    assert [type(error) for error in together.errors] == [type(None)] * 2 + [DivergedError, type(None)] * 2
    assert "response token 4" in str(together.errors[2])
    assert together.token_ids_B.tolist()[2] == -1


def test_global_generators_are_neither_used_nor_moved() -> None:
    logits_V = torch.linspace(-1, 1, 50)
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state()
    first = _draw(logits_V, SamplingParams(seed=9), 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    np.random.seed(1)
    assert _draw(logits_V, SamplingParams(seed=9), 1) == first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    logits_V = torch.tensor([0.0, 1.0, 2.0])
    params = SamplingParams(seed=11)
    assert int(sample_tokens(logits_V[None].to(dtype), [params], [0], 3).token_ids_B[0]) == _draw(logits_V, params)


def test_last_bit_changes_seldom_matter() -> None:
    logits_V = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2
    nudged_V = torch.nextafter(logits_V, torch.tensor(math.inf))
    same = sum(_draw(logits_V, SamplingParams(seed=s)) == _draw(nudged_V, SamplingParams(seed=s)) for s in range(200))
    assert same == 200


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(InvalidInputError, match="valid_vocab_size"):
        sample_tokens(torch.zeros(1, 4), [SamplingParams()], [0], 5)
    with pytest.raises(InvalidInputError, match="params"):
        sample_tokens(torch.zeros(2, 4), [SamplingParams()], [0, 0], 4)
    for allowed in ([None, None], [np.ones(5, np.bool_)]):
        with pytest.raises(InvalidInputError, match="allowed"):
            sample_tokens(torch.zeros(1, 5), [SamplingParams()], [0], 4, allowed)


# --- what is allowed -------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, 9.0]), min_size=2, max_size=300),
    top_k=st.sampled_from([0, 0, 2, 5]),
    top_p=st.sampled_from([0.5123, 1.0, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    seed=st.integers(0, UINT64_MAX),
)
def test_only_allowed_ids_are_drawn_and_truncation_counts_them_alone(
    logits: list[float], top_k: int, top_p: float, temperature: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    allowed_V = generator.random(len(logits)) < 0.4
    allowed_V[generator.integers(len(logits))] = True
    params = SamplingParams(seed=seed, top_k=top_k, top_p=top_p, temperature=temperature)
    ids = np.flatnonzero(allowed_V)
    kept = ids[_reference_kept(np.array(logits)[ids], params)]
    sampled = sample_tokens(torch.tensor([logits]), [params], [3], len(logits), [allowed_V])
    token = int(sampled.token_ids_B[0])
    assert token in kept
    mass = {int(i): math.exp(logits[i] / temperature) for i in kept}
    of_drawn = math.log(mass[token] / math.fsum(mass.values()))
    of_policy = logits[token] - math.log(math.fsum(map(math.exp, logits)))
    assert float(sampled.sampling_logprobs_B[0]) == pytest.approx(of_drawn, abs=1e-5)
    assert float(sampled.policy_logprobs_B[0]) == pytest.approx(of_policy, abs=1e-5)
    greedy = sample_tokens(torch.tensor([logits]), [SamplingParams(temperature=0)], [3], len(logits), [allowed_V])
    assert int(greedy.token_ids_B[0]) == ids[np.array(logits)[ids].argmax()]
    assert float(greedy.sampling_logprobs_B[0]) == 0


def test_all_allowed_is_the_draw_without_a_mask_to_the_bit() -> None:
    for vocab in (61, 5000):
        logits_BV = 4 * torch.randn(7, vocab, generator=torch.Generator().manual_seed(vocab))
        params = [SamplingParams(seed=row, temperature=0.5 + row / 3, top_k=row % 3) for row in range(7)]
        free = sample_tokens(logits_BV, params, range(7), vocab)
        _assert_same(free, sample_tokens(logits_BV, params, range(7), vocab, [np.ones(vocab, np.bool_)] * 7))


def test_a_row_that_may_draw_nothing_fails_alone() -> None:
    logits_BV = torch.zeros(4, 6)
    logits_BV[1, :3] = -math.inf
    none, some, every = np.zeros(6, np.bool_), np.arange(6) < 3, np.ones(6, np.bool_)
    sampled = sample_tokens(logits_BV, [SamplingParams()] * 4, [0, 1, 2, 3], 6, [none, some, every, None])
    assert [type(error) for error in sampled.errors] == [InvalidInputError, DivergedError, type(None), type(None)]
    assert "response token 0" in str(sampled.errors[0])
    assert sampled.token_ids_B.tolist()[:2] == [-1, -1]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 61, 255, 256, 257, 512, 700, 4096]),
    st.lists(
        st.tuples(
            st.integers(0, UINT64_MAX),
            st.integers(0, 500),
            st.sampled_from([0.0, 1.0, 1.0, 0.7, 1e-40, 100.0]),
            st.sampled_from([(0, 1.0), (0, 1.0), (3, 1.0), (0, 0.8)]),
            st.sampled_from([0.0, 1.0, 30.0]),
        ),
        min_size=2,
        max_size=24,
    ),
    st.sampled_from([None, math.nan, math.inf, -math.inf]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_rows_drawn_together_are_to_the_bit_those_drawn_alone(
    vocab: int, rows: list[tuple[int, int, float, tuple[int, float], float]], odd: float | None, masked: float
) -> None:
    generator = torch.Generator().manual_seed(len(rows) * vocab)
    scales = torch.tensor([row[4] for row in rows])[:, None]
    logits_BV = scales * torch.randn(len(rows), vocab + 3, generator=generator)
    if odd is not None:
        logits_BV[1, vocab // 2] = odd
    params = [
        SamplingParams(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
        for seed, _, temperature, (top_k, top_p), _ in rows
    ]
    positions = [row[1] for row in rows]
    random = np.random.default_rng(len(rows) * vocab)
    allowed = [random.random(vocab) < 0.3 if random.random() < masked else None for _ in rows]
    together = sample_tokens(logits_BV, params, positions, vocab, allowed)
    for row in range(len(rows)):
        one = slice(row, row + 1)
        alone = sample_tokens(logits_BV[one], params[one], positions[one], vocab, allowed[one])
        for name in ("token_ids_B", "sampling_logprobs_B", "policy_logprobs_B"):
            assert getattr(together, name)[row].numpy().tobytes() == getattr(alone, name)[0].numpy().tobytes()
        assert str(together.errors[row]) == str(alone.errors[0])


# --- what a token was drawn from --------------------------------------------------------------------------------
def _assert_drawn_from(
    kept: tuple[int, ...], logits: list[float], params: SamplingParams, token: int, logprob: float
) -> None:
    """Over exactly these ids the token has the probability that is told."""
    scaled = torch.tensor(logits, dtype=torch.float64)[list(kept)] / params.temperature
    assert float(scaled.log_softmax(-1)[kept.index(token)]) == pytest.approx(logprob, abs=1e-5)
    assert all(logits[i] > -math.inf for i in kept)


@settings(max_examples=150, deadline=None)
@given(
    # Few distinct values, so that ties at the cuts are common.
    logits=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, -math.inf]), min_size=2, max_size=12),
    top_k=st.integers(1, 14),
    top_p=st.sampled_from([1e-6, 0.1237, 0.5123, 0.8971, 0.99991, 1.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    masked=st.booleans(),
    seed=st.integers(0, UINT64_MAX),
)
def test_the_kept_ids_are_what_the_token_was_drawn_from(
    logits: list[float], top_k: int, top_p: float, temperature: float, masked: bool, seed: int
) -> None:
    logits = [*logits, 0.25]  # at least one finite logit
    params = SamplingParams(seed=seed, top_k=top_k, top_p=top_p, temperature=temperature, keep_mask=True)
    allowed_V = None
    if masked:  # often fewer than top_k
        allowed_V = np.random.default_rng(seed).random(len(logits)) < 0.3
        allowed_V[-1] = True
    rows = [params, replace(params, keep_mask=False)]
    padded_BV = torch.tensor([[*logits, 90.0, math.nan]] * 2)  # padding ids: never read
    both = sample_tokens(padded_BV, rows, [7, 7], len(logits), [allowed_V] * 2)
    for values_B in (both.token_ids_B, both.sampling_logprobs_B, both.policy_logprobs_B):
        assert values_B[0].numpy().tobytes() == values_B[1].numpy().tobytes()  # it changes no draw
    kept, unasked = both.kept_ids
    token, logprob = int(both.token_ids_B[0]), float(both.sampling_logprobs_B[0])
    assert unasked is None
    assert kept is not None
    if temperature == 0:
        assert (kept, logprob) == ((token,), 0.0)
        return
    open_ids = [i for i, logit in enumerate(logits) if logit > -math.inf and (allowed_V is None or allowed_V[i])]
    reference = _reference_kept(np.array(logits)[open_ids], params)
    assert kept == tuple(sorted(open_ids[place] for place in reference))
    _assert_drawn_from(kept, logits, params, token, logprob)


def test_a_top_k_beyond_what_is_allowed_keeps_no_impossible_id() -> None:
    logits, allowed_V = [3.0, 1.0, 2.0, 0.0, 4.0], np.array([False, True, False, True, False])
    params = SamplingParams(top_k=4, keep_mask=True)
    sampled = sample_tokens(torch.tensor([logits]), [params], [0], 5, [allowed_V])
    assert sampled.kept_ids == ((1, 3),)


def test_kept_ids_of_ties_go_to_the_lowest_and_top_p_counts_within_top_k() -> None:
    ties = torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0]])
    assert sample_tokens(ties, [SamplingParams(top_k=3, keep_mask=True)], [0], 5).kept_ids == ((0, 2, 3),)
    even = torch.zeros(1, 8)  # of the four that top_k leaves half the mass is two
    assert sample_tokens(even, [SamplingParams(top_k=4, top_p=0.5, keep_mask=True)], [0], 8).kept_ids == ((0, 1),)


def test_a_top_k_of_the_whole_vocabulary_keeps_it_and_failed_rows_keep_nothing() -> None:
    logits_BV = torch.zeros(3, 4)
    logits_BV[0, 1] = -math.inf
    logits_BV[2, 0] = math.nan
    params = SamplingParams(top_k=9, keep_mask=True)
    sampled = sample_tokens(logits_BV, [params, SamplingParams(top_k=2), params], [0, 0, 0], 4)
    assert sampled.kept_ids == ((0, 2, 3), None, None)
