"""From votes to verdicts: means, agreement, and whose reasons are told. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from opd.v1 import generative_reward_service_pb2 as pb

from opd_mesh.config.rubrics import Rubric, weighted_mean
from opd_mesh.judging.verdict import ParsedVerdict, VerdictError, parse_verdict

_DIGITS = 9  # to which two scores that are the same agree


@dataclass(frozen=True, slots=True)
class Vote:
    """One text that the judge wrote, or why there is none.

    Attributes:
        answer_index: pairwise 0.
        swapped: of a pair, the second answer stood first.
        parsed: None where it is no verdict; then ``failure`` says why.
    """

    answer_index: int
    swapped: bool
    text: str
    request_id: str
    parsed: ParsedVerdict | None = None
    failure: str = ""

    @property
    def score(self) -> float:
        """In [0, 1]; of a pair, of the answer that the client gave first. Of a vote that is parsed."""
        return self._unswapped(self.parsed.overall if self.parsed else 0.0)

    def criterion(self, name: str) -> float:
        """As :attr:`score`, of one criterion; pointwise on its own scale."""
        return self._unswapped(self.parsed.scores[name] if self.parsed else 0.0)

    def _unswapped(self, value: float) -> float:
        return 1.0 - value if self.swapped else value

    def to_proto(self) -> pb.Vote:
        """As it is told."""
        return pb.Vote(
            answer_index=self.answer_index,
            swapped=self.swapped,
            text=self.text,
            score=self.score if self.parsed else 0.0,
            failure=self.failure,
            request_id=self.request_id,
        )


def read_vote(
    rubric: Rubric, text: str, *, answer_index: int, swapped: bool, pairwise: bool, request_id: str, failure: str = ""
) -> Vote:
    """Parse what was written, strictly. ``failure``: why it is no verdict whatever it says, or empty."""
    vote = Vote(answer_index, swapped, text, request_id, None, failure)
    if failure:
        return vote
    try:
        parsed = parse_verdict(rubric, text, pairwise=pairwise)
    except VerdictError as error:
        return Vote(answer_index, swapped, text, request_id, None, f"not a verdict: {error}")
    return Vote(answer_index, swapped, text, request_id, parsed)


def verdict_of(rubric: Rubric, votes: Sequence[Vote]) -> pb.Verdict:
    """On one answer, from all votes on it."""
    parsed = [vote for vote in votes if vote.parsed is not None]
    if not parsed:
        return _failed(votes)
    return _told(rubric, parsed, [1.0] * len(parsed), asked=len(votes), second=False)


def pair_verdicts(rubric: Rubric, votes: Sequence[Vote]) -> list[pb.Verdict]:
    """On both answers of a pair: each order counts as one half, so that a judge with eyes for a place says nothing."""
    parsed = [vote for vote in votes if vote.parsed is not None]
    counts = Counter(vote.swapped for vote in parsed)
    if len(counts) < 2:
        failed = _failed(votes)
        if parsed:
            alone = "swapped" if counts[True] else "given"
            failed.failure = f"only the {alone} order parsed, and one order alone says nothing: {failed.failure}"
        return [failed, failed]
    weights = [1 / counts[vote.swapped] for vote in parsed]
    return [_told(rubric, parsed, weights, asked=len(votes), second=second) for second in (False, True)]


def _failed(votes: Sequence[Vote]) -> pb.Verdict:
    reasons = Counter(vote.failure for vote in votes if vote.failure)
    told = "; ".join(f"{reason} ({count} of {len(votes)})" for reason, count in reasons.most_common(3))
    parsed = sum(vote.parsed is not None for vote in votes)
    return pb.Verdict(samples_asked=len(votes), samples_parsed=parsed, failure=f"no verdict: {told}")


def _told(rubric: Rubric, parsed: Sequence[Vote], weights: Sequence[float], *, asked: int, second: bool) -> pb.Verdict:
    """The verdict of votes that parsed; ``second``: on the other answer of the pair."""
    scores = [vote.score for vote in parsed]
    mean = weighted_mean(weights, scores)
    counts = Counter(round(score, _DIGITS) for score in scores)
    majority, most = counts.most_common(1)[0]  # of equals, the first that was voted
    telling = [vote for vote in parsed if round(vote.score, _DIGITS) == majority]
    # Reasons speak of A and B: rather those that mean by it what the client does.
    teller = next((vote for vote in telling if not vote.swapped), telling[0])
    assert teller.parsed is not None
    criteria = []
    for criterion in rubric.criteria:
        value = weighted_mean(weights, [vote.criterion(criterion.name) for vote in parsed])
        criteria.append(
            pb.CriterionScore(
                name=criterion.name,
                score=1.0 - value if second else value,
                reason=teller.parsed.reasons.get(criterion.name, ""),
            )
        )
    return pb.Verdict(
        criteria=criteria,
        score=1.0 - mean if second else mean,
        score_variance=weighted_mean(weights, [(score - mean) ** 2 for score in scores]),
        agreement=most / len(parsed),
        samples_parsed=len(parsed),
        samples_asked=asked,
        samples_repaired=sum(vote.parsed.repaired for vote in parsed if vote.parsed),
    )
