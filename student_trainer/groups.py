"""Groups of responses to one prompt: rewards become advantages, and what teaches nothing is told apart and counted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from opd_mesh.config.training import PolicyGradientConfig
from opd_mesh.trajectory import Trajectory
from student_trainer.batch import Sample
from student_trainer.policy_gradient import all_equal, group_advantages
from student_trainer.rewards import Reward, Rewards
from student_trainer.tasks import Prompt


class Groups:
    """Of one run. The counts are those of the step in progress."""

    def __init__(self, objective: PolicyGradientConfig, rewards: Rewards) -> None:
        self.objective = objective
        self._rewards = rewards
        self._counts: Counter[str] = Counter()
        self._sums: defaultdict[str, list[float]] = defaultdict(list)
        self.last_failure = "no reason given"

    def ask(self, prompt: Prompt, trajectory: Trajectory) -> None:
        """Have a response graded."""
        self._rewards.ask(prompt, trajectory)

    async def with_advantages(self, group: Sequence[Sample]) -> tuple[list[Sample], bool]:
        """The samples that have a reward, with their advantages; and whether the group teaches nothing.

        Dynamic sampling asks for groups that the verifier tells apart: lengths alone do not make one worth keeping.
        """
        group = sorted(group, key=lambda sample: sample.trajectory.trajectory_id)
        rewards = await self._rewards.take([sample.trajectory.trajectory_id for sample in group])
        for sample, reward in zip(group, rewards, strict=True):
            self._note(sample.trajectory, reward)
        found = group_advantages([reward.total for reward in rewards], self.objective.advantage_scale)
        degenerate = found.degenerate
        if self.objective.dynamic_sampling is not None and degenerate is None:
            scores = [reward.grade.score for reward in rewards if reward.grade.score is not None]
            degenerate = "equal" if all_equal(scores) else None
        self._counts[f"groups_{degenerate or 'taught'}"] += 1
        samples = []
        for sample, advantage in zip(group, found.values, strict=True):
            if advantage is not None:
                samples.append(replace(sample, advantage=advantage))
            elif sample.reference is not None:
                sample.reference.answer.release()
        return samples, degenerate is not None

    @property
    def taught(self) -> int:
        """Groups of this step that something is learned from."""
        return self._counts["groups_taught"]

    def drop(self, samples: Sequence[Sample]) -> None:
        """Dynamic sampling leaves these out."""
        self._counts["samples_dropped"] += len(samples)

    def _note(self, trajectory: Trajectory, reward: Reward) -> None:
        domain = trajectory.domain
        if reward.judged is not None:
            self._sums[f"judge_version/{domain}"].append(reward.judged.judge.version)
            self._sums[f"judge_unparsed/{domain}"].append(reward.judged.unparsed / max(1, reward.judged.votes))
        self._sums[f"ungraded/{domain}"].append(reward.total is None)
        if reward.total is None:
            self._counts["ungraded"] += 1
            self.last_failure = reward.grade.failure or self.last_failure
            return
        self._counts["unparsed"] += not reward.grade.parsed
        self._sums[f"unparsed/{domain}"].append(not reward.grade.parsed)
        self._sums[f"reward/{domain}"].append(reward.total)
        self._sums[f"score/{domain}"].append(reward.grade.score or 0.0)
        self._sums[f"length_penalty/{domain}"].append(reward.penalty)
        if reward.judged is not None:
            self._sums[f"judge_variance/{domain}"].append(reward.judged.variance)

    def take_counted(self) -> dict[str, float]:
        """Metrics of the step; the next one begins. Of a domain they are means: ``ungraded/<domain>``
        over all its responses, ``judge_version/<domain>`` and ``judge_unparsed/<domain>`` (share of the votes) over
        those that were judged, the others over those that were graded."""
        named = ("groups_taught", "groups_equal", "groups_single", "samples_dropped", "ungraded", "unparsed")
        line: dict[str, float] = {name: self._counts[name] for name in named}
        line |= {name: sum(values) / len(values) for name, values in self._sums.items()}
        self._counts.clear()
        self._sums.clear()
        return line

    async def close(self) -> None:
        """Nobody waits any more."""
        await self._rewards.close()
