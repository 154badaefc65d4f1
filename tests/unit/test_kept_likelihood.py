"""Policy gradients of truncated responses that tell their masks: over what could be drawn; against float64 autograd."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masked_cases import ADVANTAGES, VERDICT, WrittenCase
from test_likelihood import gradient_error
from torch import Tensor

from opd_mesh.config.training import DapoConfig, GrpoConfig
from opd_mesh.convert import trajectory_from_proto, trajectory_to_proto
from opd_mesh.errors import TrajectoryError
from opd_mesh.trajectory import SamplingParams, Trajectory
from student_trainer.batch import Sample
from student_trainer.likelihood import PolicyGradient
from student_trainer.masks import token_masks
from student_trainer.passes import OpenPass, TokenMeans

TEMPERATURE = 0.75
CUT = {"top_k": 7, "top_p": 0.875, "keep_mask": True}
# Truncated; free; truncated under a grammar; under a grammar alone; truncated.
SAMPLINGS: list[dict[str, Any]] = [CUT, {}, {**CUT, "grammar": VERDICT}, {"grammar": VERDICT}, CUT]


class Case(WrittenCase):
    """Truncated, free and constrained responses."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, SAMPLINGS, temperature=TEMPERATURE, free_tokens=9)

    def exact_R(self, *, masked: bool = True) -> Tensor:
        """Log-probabilities of all response tokens, whole sequences in float64, with gradient; without ``masked`` as if
        nothing had been cut off of what a grammar allows."""
        logprobs = []
        for one in self.trajectories:
            logits = self.exact(input_ids=torch.tensor([one.token_ids]), use_cache=False).logits[0]
            logits_RV = logits[one.predicting_positions, : self.student.vocab_size] / TEMPERATURE
            if masked and one.kept_token_ids:
                forbidden_RV = torch.ones_like(logits_RV, dtype=torch.bool)
                for row, ids in enumerate(one.kept_token_ids):
                    forbidden_RV[row, list(ids)] = False
                logits_RV = logits_RV.masked_fill(forbidden_RV, -torch.inf)
            elif one.sampling.grammar:
                matcher = self.grammars.matcher(one.sampling.grammar, one.sampling.stop_token_ids)
                for row, token in enumerate(one.scored_token_ids):
                    logits_RV[row] = logits_RV[row].masked_fill(torch.from_numpy(~matcher.allowed()), -torch.inf)
                    matcher.advance(token)
            logprobs.append(logits_RV.log_softmax(-1).gather(1, torch.tensor(one.scored_token_ids)[:, None])[:, 0])
        return torch.cat(logprobs)

    def exact_gradients(self, *, masked: bool = True) -> dict[str, Tensor]:
        """Of DAPO's loss where ρ is 1 at every token."""
        self.exact.zero_grad(set_to_none=True)
        weights_R = torch.tensor(ADVANTAGES, dtype=torch.float64).repeat_interleave(torch.tensor(self.lengths))
        (-(weights_R * self.exact_R(masked=masked)).mean()).backward()
        return {name: p.grad.clone() for name, p in self.exact.named_parameters() if p.grad is not None}

    def objective(self, config: Any = None) -> PolicyGradient:
        return PolicyGradient(config or DapoConfig(), TEMPERATURE, 40, grammars=lambda: self.grammars)

    def gradients(
        self, samples: list[Sample], tokens_per_pass: int = 10_000, config: Any = None
    ) -> tuple[float, dict[str, float], dict[str, Tensor]]:
        loss, means, found = self.gradients_of(self.objective(config), samples, tokens_per_pass)
        return loss, means.means(), found


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("kept"))


def test_the_engines_logprobs_are_those_over_the_mask_and_no_others(case: Case) -> None:
    said_R = torch.tensor([value for one in case.trajectories for value in one.sampling_logprobs], dtype=torch.float64)
    torch.testing.assert_close(said_R, case.exact_R().detach(), rtol=0, atol=1e-5)
    samples = case.samples()
    batch = case.objective().of_batch(samples, case.student.head, case.heads, TokenMeans())
    trained_on = batch.of_pass(OpenPass(samples, case.student, keep_graph=True))._logprobs().logprobs_T
    assert float((trained_on.detach().double() - said_R).abs().max()) < 1e-5
    # Without it the ratio is not that of the policy that wrote: it is too small at every token.
    gaps = (said_R - case.exact_R(masked=False).detach()).split(case.lengths)
    assert all(float(gaps[place].abs().max()) < 1e-5 for place in (1, 3))  # nothing was cut off
    assert all(float(gaps[place].min()) > -1e-5 for place in (0, 2, 4))
    assert all(float(gaps[place].max()) > 0.05 for place in (0, 2, 4))


@pytest.mark.parametrize("tokens_per_pass", [10_000, 60, 1])
def test_on_policy_every_ratio_is_one_and_the_gradient_is_autograds(case: Case, tokens_per_pass: int) -> None:
    loss, metrics, found = case.gradients(case.samples(), tokens_per_pass)
    assert abs(metrics["kl_behaviour"]) < 1e-6
    assert metrics["clip_fraction"] == 0
    weights_R = np.repeat(ADVANTAGES, case.lengths)
    assert loss == pytest.approx(-float(weights_R.mean()), rel=1e-4)  # ρ = 1 at every token
    assert gradient_error(found, case.exact_gradients()) < 2e-5
    assert gradient_error(found, case.exact_gradients(masked=False)) > 0.1


def test_without_its_mask_a_truncated_response_is_refused(case: Case) -> None:
    sample = case.samples()[0]
    blind = replace(sample, trajectory=replace(sample.trajectory, kept_token_ids=()))
    with pytest.raises(TrajectoryError, match=r"t0 was drawn with top_p below 1 or a top_k.*keep_mask") as caught:
        case.gradients([blind])
    assert caught.value.field == "kept_token_ids"
    # Taken as if nothing had been cut off it would not be on policy.
    free = replace(blind.trajectory, sampling=replace(blind.trajectory.sampling, top_k=0, top_p=1.0, keep_mask=False))
    _, metrics, _ = case.gradients([replace(blind, trajectory=free)])
    assert metrics["kl_behaviour"] > 0.1


def test_masks_that_cannot_be_are_refused_by_field(case: Case) -> None:
    sample = case.samples()[0]
    kept = sample.trajectory.kept_token_ids
    for wrong, field in [
        (kept[1:], "kept_token_ids"),
        (((*kept[0], 131), *kept[1:]), "kept_token_ids[0]"),  # padding of the head
        ((*kept[:2], (), *kept[3:]), "kept_token_ids[2]"),
    ]:
        with pytest.raises(TrajectoryError) as caught:
            case.gradients([replace(sample, trajectory=replace(sample.trajectory, kept_token_ids=wrong))])
        assert caught.value.field == field


def test_a_reference_over_all_ids_is_refused(case: Case) -> None:
    config = GrpoConfig(kl={"reference": "reference", "coefficient": 0.2})  # type: ignore[arg-type]
    with pytest.raises(TrajectoryError, match=r"set objective\.kl to null") as caught:
        case.gradients([case.samples()[0]], config=config)
    assert caught.value.field == "kept_token_ids"


def test_equal_sets_are_packed_once_and_no_grammar_is_replayed() -> None:
    def of(*kept: tuple[int, ...]) -> Trajectory:
        tokens = tuple(ids[0] for ids in kept)
        return Trajectory("t", "d", (1, *tokens), ((1, 1 + len(kept)),), kept_token_ids=kept)

    constrained = replace(of((0, 19)), sampling=SamplingParams(grammar=VERDICT))
    masks = token_masks([of((3, 8), (0,), (3, 8)), of((0,), (7, 16)), constrained], 20, None)
    assert masks.index_R.tolist() == [0, 1, 0, 1, 2, 3]
    bits_MV = np.unpackbits(masks.packed_MB, axis=1, bitorder="little")[:, :20]
    assert [np.flatnonzero(row).tolist() for row in bits_MV] == [[3, 8], [0], [7, 16], [0, 19]]


def test_what_went_over_the_wire_has_the_same_gradient(case: Case) -> None:
    sent = [
        replace(one, trajectory=trajectory_from_proto(trajectory_to_proto(one.trajectory))) for one in case.samples()
    ]
    _, _, found = case.gradients(case.samples())
    _, _, again = case.gradients(sent)
    assert all(torch.equal(found[name], again[name]) for name in found)
