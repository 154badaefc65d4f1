"""Policy gradients of responses with a grammar: over what could be drawn, as the engine drew it; against autograd."""

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

from opd_mesh.config.base import parse_config
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.training import DapoConfig, GrpoConfig
from opd_mesh.errors import InternalError, TrajectoryError
from opd_mesh.grammar import Grammars
from student_trainer.batch import Sample
from student_trainer.importance import check_behaviour
from student_trainer.likelihood import PolicyGradient, Sft
from student_trainer.objective import build_objective
from student_trainer.passes import OpenPass, TokenMeans

TEMPERATURE = 0.8
WORDS = "start: /[a-c]{2,3}/ (/ / /[a-c]{2,3}/){1,2}"
GRAMMARS = [VERDICT, "", WORDS, VERDICT, ""]


class Case(WrittenCase):
    """Verdicts and other texts by a grammar, and texts without one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, [{"grammar": one} for one in GRAMMARS], temperature=TEMPERATURE, free_tokens=7)

    def rewritten(self, behaviour_R: Tensor) -> list[Sample]:
        """As if another policy had drawn them."""
        parts = behaviour_R.split(self.lengths)
        return [
            replace(one, trajectory=replace(one.trajectory, sampling_logprobs=tuple(part.tolist())))
            for one, part in zip(self.samples(), parts, strict=True)
        ]

    def exact_R(self, *, masked: bool = True) -> tuple[Tensor, Tensor]:
        """(log-probabilities with gradient, entropies) of all response tokens, whole sequences in float64."""
        logprobs, entropies = [], []
        for one in self.trajectories:
            logits = self.exact(input_ids=torch.tensor([one.token_ids]), use_cache=False).logits[0]
            logits_RV = logits[one.predicting_positions, : self.student.vocab_size] / TEMPERATURE
            if masked and one.sampling.grammar:
                matcher = self.grammars.matcher(one.sampling.grammar, one.sampling.stop_token_ids)
                for row, token in enumerate(one.scored_token_ids):
                    forbidden = torch.from_numpy(~matcher.allowed())
                    logits_RV[row] = logits_RV[row].masked_fill(forbidden, -torch.inf)
                    matcher.advance(token)
            log_p_RV = logits_RV.log_softmax(-1)
            logprobs.append(log_p_RV.gather(1, torch.tensor(one.scored_token_ids)[:, None])[:, 0])
            entropies.append(torch.special.entr(log_p_RV.detach().exp()).sum(-1))
        return torch.cat(logprobs), torch.cat(entropies)

    def objective(self, config: Any = None, **changes: Any) -> PolicyGradient:
        fields = {"grammars": lambda: self.grammars, **changes}
        return PolicyGradient(config or DapoConfig(), TEMPERATURE, 40, **fields)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("constrained"))


def test_the_engines_logprobs_are_those_over_what_was_allowed(case: Case) -> None:
    masked, _ = case.exact_R()
    whole, _ = case.exact_R(masked=False)
    said = torch.tensor([value for one in case.trajectories for value in one.sampling_logprobs], dtype=torch.float64)
    torch.testing.assert_close(said, masked.detach(), rtol=0, atol=1e-5)
    samples = case.samples()
    whole_batch = case.objective().of_batch(samples, case.student.head, case.heads, TokenMeans())
    trained_on = whole_batch.of_pass(OpenPass(samples, case.student, keep_graph=True))._logprobs().logprobs_T
    torch.testing.assert_close(said, trained_on.detach().double(), rtol=0, atol=1e-5)
    constrained = [bool(one.sampling.grammar) for one in case.trajectories]
    rows = torch.tensor(constrained).repeat_interleave(torch.tensor(case.lengths))
    assert float((said - whole.detach())[~rows].abs().max()) < 1e-5
    assert float((said - whole.detach())[rows].min()) > -1e-5
    assert float((said - whole.detach())[rows].mean()) > 1  # nat


@pytest.mark.parametrize("tokens_per_pass", [10_000, 60, 1])
def test_on_policy_every_ratio_is_one(case: Case, tokens_per_pass: int) -> None:
    loss, means, found = case.gradients_of(case.objective(), case.samples(), tokens_per_pass)
    metrics = means.means()
    assert abs(metrics["kl_behaviour"]) < 1e-6
    assert metrics["clip_fraction"] == 0
    weights = torch.tensor(ADVANTAGES, dtype=torch.float64).repeat_interleave(torch.tensor(case.lengths))
    assert loss == pytest.approx(-float(weights.mean()), rel=1e-4)  # ρ = 1 at every token
    log_p, entropy_R = case.exact_R()
    case.exact.zero_grad(set_to_none=True)
    (-(weights * log_p).mean()).backward()
    wanted = {name: p.grad for name, p in case.exact.named_parameters() if p.grad is not None}
    assert gradient_error(found, wanted) < 2e-5
    assert metrics["entropy/student"] == pytest.approx(float(entropy_R.mean()), rel=1e-5)
    of_judging = torch.cat([part for part, g in zip(entropy_R.split(case.lengths), GRAMMARS, strict=True) if g])
    assert metrics["entropy_domain/judging"] == pytest.approx(float(of_judging.mean()), rel=1e-5)


def test_off_policy_the_clipped_ratio_is_of_what_could_be_drawn(case: Case) -> None:
    log_p, _ = case.exact_R()
    gaps_R = 0.3 * torch.randn(len(log_p), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    behaviour_R = log_p.detach() - gaps_R
    config = GrpoConfig(kl=None)
    ratio_R = (log_p - behaviour_R).exp()
    advantages_R = torch.tensor(ADVANTAGES, dtype=torch.float64).repeat_interleave(torch.tensor(case.lengths))
    bounded_R = ratio_R.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss_R = -torch.minimum(ratio_R * advantages_R, bounded_R * advantages_R)
    exact = torch.stack([part.mean() for part in loss_R.split(case.lengths)]).mean()
    case.exact.zero_grad(set_to_none=True)
    exact.backward()
    wanted = {name: p.grad for name, p in case.exact.named_parameters() if p.grad is not None}
    loss, means, found = case.gradients_of(case.objective(config), case.rewritten(behaviour_R), 60)
    assert loss == pytest.approx(float(exact.detach()), rel=1e-5, abs=1e-6)
    assert gradient_error(found, wanted) < 2e-5
    assert means.means()["clip_fraction"] > 0
    assert means.means()["kl_behaviour"] == pytest.approx(-float(gaps_R.mean()), abs=1e-5)


def test_a_batch_of_verdicts_alone(case: Case) -> None:
    """No rows without a grammar; and the same gradient as in company, where the others have no advantage."""
    only = [sample for sample in case.samples() if sample.trajectory.sampling.grammar]
    loss, _, found = case.gradients_of(case.objective(), only)
    total, alone = sum(case.lengths), sum(sample.trajectory.num_scored for sample in only)
    mixed = [
        sample if sample.trajectory.sampling.grammar else replace(sample, advantage=0.0) for sample in case.samples()
    ]
    other_loss, _, others = case.gradients_of(case.objective(), mixed)
    assert loss * alone == pytest.approx(other_loss * total, rel=1e-5)
    scaled = {name: grad.double() * total / alone for name, grad in others.items()}
    assert gradient_error(found, scaled) < 1e-5


def test_without_a_grammar_nobody_asks_for_the_tokenizer(case: Case) -> None:
    def unasked() -> Grammars:
        raise AssertionError("asked for")

    free = [sample for sample in case.samples() if not sample.trajectory.sampling.grammar]
    case.gradients_of(case.objective(grammars=unasked), free)
    with pytest.raises(InternalError, match="no tokenizer"):
        case.gradients_of(case.objective(grammars=None), case.samples())


def test_what_was_not_drawn_under_its_grammar_is_refused(case: Case) -> None:
    sample = case.samples()[0]
    other = replace(sample.trajectory, sampling=replace(sample.trajectory.sampling, grammar=WORDS))
    with pytest.raises(TrajectoryError, match=r"t0 was not drawn under its grammar.*response token 0") as caught:
        case.gradients_of(case.objective(), [replace(sample, trajectory=other)])
    assert caught.value.field == "sampling.grammar"


def test_a_reference_that_knows_no_grammar_is_refused(case: Case) -> None:
    config = GrpoConfig(kl={"reference": "reference", "coefficient": 0.2})  # type: ignore[arg-type]
    with pytest.raises(TrajectoryError, match=r"set objective\.kl to null") as caught:
        case.gradients_of(case.objective(config), case.samples())
    assert caught.value.field == "sampling.grammar"


def test_sft_does_not_ask_how_an_answer_came_about(case: Case) -> None:
    loss, *_ = case.gradients_of(Sft(), [Sample(one) for one in case.trajectories])
    logits = []
    for one in case.trajectories:
        rows = case.exact(input_ids=torch.tensor([one.token_ids]), use_cache=False).logits[0, one.predicting_positions]
        log_p = rows[:, : case.student.vocab_size].log_softmax(-1)
        logits.append(log_p.gather(1, torch.tensor(one.scored_token_ids)[:, None]))
    assert loss == pytest.approx(-float(torch.cat(logits).mean().detach()), rel=1e-5)


def test_the_behaviour_of_a_constrained_response_is_known_where_masks_are_applied(case: Case) -> None:
    check_behaviour(case.trajectories[0])
    check_behaviour(case.trajectories[1], masks_applied=False)
    with pytest.raises(TrajectoryError, match="drawn under a grammar") as caught:
        check_behaviour(case.trajectories[0], masks_applied=False)
    assert caught.value.field == "sampling.grammar"
    truncated = replace(case.trajectories[0], sampling=replace(case.trajectories[0].sampling, top_k=5))
    with pytest.raises(TrajectoryError, match=r"t0 was drawn with top_p below 1 or a top_k.*keep_mask") as caught:
        check_behaviour(truncated)
    assert caught.value.field == "kept_token_ids"
    told = replace(truncated, kept_token_ids=tuple((token,) for token in truncated.scored_token_ids))
    check_behaviour(told)
    with pytest.raises(TrajectoryError, match="top_k 0") as caught:
        check_behaviour(told, masks_applied=False)
    assert caught.value.field == "sampling"


def test_a_recipes_objective_reads_grammars_by_the_students_tokenizer(case: Case) -> None:
    recipe = parse_config(
        Recipe,
        {
            "run": {"name": "tiny", "steps": 1},
            "student": {"path": str(case.student.config.path)},
            "domains": {"sums": {"reasoning_gym": {"task": "chain_sum"}, "verifier": {"name": "reasoning_gym"}}},
            "objective": {"name": "dapo"},
            "batch": {"responses_per_prompt": 2},
            "rollout": {"temperature": TEMPERATURE, "max_new_tokens": 40},
        },
        source="test",
    )
    objective = build_objective(recipe, case.student)
    assert isinstance(objective, PolicyGradient)
    loss, *_ = case.gradients_of(objective, case.samples())
    assert loss == pytest.approx(case.gradients_of(case.objective(objective.config), case.samples())[0], rel=1e-6)
    assert objective.grammars is not None
    assert objective.grammars() is objective.grammars()  # compiled grammars are kept from step to step
    assert np.isfinite(loss)
