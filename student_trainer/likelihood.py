"""Objectives of stage one: losses over the student's own log-probabilities of tokens that are there.

Letters: R response tokens of a pass, S responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from opd_kernels import AllowedIds, LinearHead, TokenLogprobs, masked_token_logprobs, token_logprobs
from torch import Tensor

from opd_mesh.config.training import PolicyGradientConfig
from opd_mesh.errors import InternalError, TrajectoryError
from opd_mesh.grammar import Grammars
from opd_mesh.torch_tensors import from_numpy
from student_trainer.batch import Sample
from student_trainer.heads import HeadStore
from student_trainer.masks import is_masked, require_mask, token_masks
from student_trainer.passes import OpenPass, TokenMeans, sampled_ids
from student_trainer.policy_gradient import policy_terms, reference_kl, token_weights


@dataclass(frozen=True, slots=True)
class Sft:
    """Cross entropy, averaged over all answer tokens of the mini-batch."""

    implementation: str = "auto"
    deterministic: bool = False

    def of_batch(self, samples: Sequence[Sample], head: LinearHead, heads: HeadStore, means: TokenMeans) -> _SftBatch:
        """See :class:`student_trainer.objective.Objective`."""
        return _SftBatch(self, head, means, sum(sample.trajectory.num_scored for sample in samples))


@dataclass(frozen=True, slots=True)
class _SftBatch:
    objective: Sft
    head: LinearHead
    means: TokenMeans
    total_tokens: int

    def of_pass(self, current: OpenPass) -> _SftPass:
        return _SftPass(self, current)


@dataclass(frozen=True, slots=True)
class _SftPass:
    whole: _SftBatch
    current: OpenPass

    def visit(self, shares: Mapping[tuple[str, ...], Sequence[int]]) -> float:
        whole = self.whole
        found = token_logprobs(
            self.current.leaf_Rd,
            whole.head,
            sampled_ids(self.current.batch, self.current.device),
            implementation=whole.objective.implementation,
            deterministic=whole.objective.deterministic,
        )
        loss = -found.logprobs_T.sum() / whole.total_tokens
        loss.backward()
        whole.means.add("entropy/student", found.entropy_T)
        for domain, logprobs_R in self.current.by_domain(found.logprobs_T.detach()):
            whole.means.add(f"nll_domain/{domain}", -logprobs_R)
        return float(loss.detach())

    def close(self) -> None:
        """Nothing is kept."""


def _advantage(sample: Sample) -> float:
    if sample.advantage is None:
        name = sample.trajectory.trajectory_id
        raise InternalError(f"response {name} is trained on without an advantage: it belongs to no group")
    return sample.advantage


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """GRPO and its variants, see :mod:`student_trainer.policy_gradient`.

    π and μ are distributions over what could be drawn: of a response that tells the ids that top-k, top-p and its
    grammar left over these, of another with a grammar over the ids that it allowed at each token, so that ρ is 1 where
    the policy has not moved.

    Attributes:
        temperature: that the responses were written at.
        longest: tokens of the longest response that the recipe allows.
        grammars: of the student's tokenizer; asked for when the first response comes that has a grammar, and tells no
            ids.
    """

    config: PolicyGradientConfig
    temperature: float
    longest: int
    deterministic: bool = False
    grammars: Callable[[], Grammars] | None = None

    def of_batch(
        self, samples: Sequence[Sample], head: LinearHead, heads: HeadStore, means: TokenMeans
    ) -> _PolicyGradientBatch:
        """See :class:`student_trainer.objective.Objective`.

        Raises:
            TrajectoryError: a response of which top-k or top-p cut ids off that does not tell those that were left, or
                tells such as cannot be; or a masked one where there is a KL to a reference, whose log-probabilities are
                over all ids: the estimate would be of neither distribution.
        """
        for sample in samples:
            require_mask(sample.trajectory)
            if sample.trajectory.kept_token_ids:
                sample.trajectory.validate(vocab_size=head.vocab_size)
        masked = [sample.trajectory for sample in samples if is_masked(sample.trajectory)]
        if masked and self.config.kl is not None:
            by_grammar = bool(masked[0].sampling.grammar)
            raise TrajectoryError(
                f"response {masked[0].trajectory_id} was drawn {'under a grammar' if by_grammar else 'from some ids'}, "
                "and the reference's log-probabilities know nothing of it; set objective.kl to null",
                field="sampling.grammar" if by_grammar else "kept_token_ids",
            )
        weights = token_weights(
            [sample.trajectory.num_scored for sample in samples],
            self.config.aggregation,
            constant=self.config.length or self.longest,
        )
        by_id = {sample.trajectory.trajectory_id: weight for sample, weight in zip(samples, weights, strict=True)}
        return _PolicyGradientBatch(self, head, means, by_id)


@dataclass(frozen=True, slots=True)
class _PolicyGradientBatch:
    objective: PolicyGradient
    head: LinearHead
    means: TokenMeans
    weights: Mapping[str, float]  # of a response's tokens, by trajectory id

    def of_pass(self, current: OpenPass) -> _PolicyGradientPass:
        return _PolicyGradientPass(self, current)


@dataclass(frozen=True, slots=True)
class _PolicyGradientPass:
    whole: _PolicyGradientBatch
    current: OpenPass

    def visit(self, shares: Mapping[tuple[str, ...], Sequence[int]]) -> float:
        whole, current = self.whole, self.current
        objective = whole.objective
        config = objective.config
        found = self._logprobs()
        behaviour_R = self._rows([sample.trajectory.sampling_logprobs for sample in current.batch])
        terms = policy_terms(
            found.logprobs_T,
            behaviour_R,
            self._of_samples([_advantage(sample) for sample in current.batch]),
            current.lengths,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            mask_above=config.mask_above,
        )
        loss_R = terms.loss_R
        if config.kl is not None:
            kl_R = reference_kl(found.logprobs_T, self._reference_R(), behaviour_R, config.kl.estimator)
            loss_R = loss_R + config.kl.coefficient * kl_R
            whole.means.add("kl_reference", kl_R.detach())
        weights_R = self._of_samples([whole.weights[sample.trajectory.trajectory_id] for sample in current.batch])
        loss = (weights_R * loss_R).sum()
        loss.backward()
        self._tell(found, behaviour_R, terms.clipped_R, terms.masked_R)
        return float(loss.detach())

    def _logprobs(self) -> TokenLogprobs:
        """Of all rows: over the whole vocabulary, or over what could be drawn."""
        whole, current = self.whole, self.current
        objective = whole.objective
        ids_R = sampled_ids(current.batch, current.device)

        def of_rows(hidden_Rd: Tensor, token_ids_R: Tensor) -> TokenLogprobs:
            return token_logprobs(
                hidden_Rd,
                whole.head,
                token_ids_R,
                temperature=objective.temperature,
                implementation=objective.config.implementation,
                deterministic=objective.deterministic,
            )

        masked = [is_masked(sample.trajectory) for sample in current.batch]
        if not any(masked):
            return of_rows(current.leaf_Rd, ids_R)
        rows_R = self._of_samples(masked)
        free_rows, masked_rows = (~rows_R).nonzero()[:, 0], rows_R.nonzero()[:, 0]
        parts = [
            of_rows(current.leaf_Rd[free_rows], ids_R[free_rows]),
            masked_token_logprobs(
                current.leaf_Rd[masked_rows],
                whole.head,
                ids_R[masked_rows],
                self._allowed(),
                temperature=objective.temperature,
            ),
        ]
        order_R = torch.cat([free_rows, masked_rows]).argsort()
        return TokenLogprobs(
            logprobs_T=torch.cat([part.logprobs_T for part in parts])[order_R],
            entropy_T=torch.cat([part.entropy_T for part in parts])[order_R],
        )

    def _allowed(self) -> AllowedIds:
        """Of the rows of masked responses, in order."""
        trajectories = [sample.trajectory for sample in self.current.batch if is_masked(sample.trajectory)]
        masks = token_masks(trajectories, self.whole.head.vocab_size, self.whole.objective.grammars)
        device = self.current.device
        return AllowedIds(torch.from_numpy(masks.packed_MB).to(device), torch.from_numpy(masks.index_R).to(device))

    def _tell(self, found: TokenLogprobs, behaviour_R: Tensor, clipped_R: Tensor, masked_R: Tensor) -> None:
        means = self.whole.means
        means.add("entropy/student", found.entropy_T)
        for domain, entropy_R in self.current.by_domain(found.entropy_T):
            means.add(f"entropy_domain/{domain}", entropy_R)
        means.add("clip_fraction", clipped_R)
        means.add("mask_fraction", masked_R)
        # k1 estimate of KL(μ ‖ π): what the policy has moved since, and how far the two engines are apart.
        means.add("kl_behaviour", behaviour_R - found.logprobs_T.detach())

    def _rows(self, values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([value for row in values for value in row], device=self.current.device)

    def _of_samples(self, values: Sequence[float]) -> Tensor:
        """[R], a response's value at each of its tokens."""
        lengths = torch.tensor(self.current.lengths, device=self.current.device)
        return torch.tensor(values, device=self.current.device).repeat_interleave(lengths)

    def _reference_R(self) -> Tensor:
        rows = []
        for sample in self.current.batch:
            assert sample.reference is not None  # asked for with every response
            rows.append(from_numpy(sample.reference.answer.tensors()["logprobs"]))
        return torch.cat(rows).to(self.current.device, torch.float32)

    def close(self) -> None:
        for sample in self.current.batch:
            if sample.reference is not None:
                sample.reference.answer.release()
