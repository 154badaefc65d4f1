"""One item from question to judgement.

Texts become prompts, prompts become votes on a rollout server, votes become verdicts. A vote is a generation whose id,
seed and parameters follow from the item and the policy asked for: whoever asks again, after whatever broke, attaches to
what is being written or was written, and nothing is judged twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from opd.v1 import generative_reward_service_pb2 as pb

from grm_server.ballots import Ballot, Texts
from grm_server.items import CheckedItem, digest_of
from grm_server.judges import Judge, Judges
from grm_server.verdicts import Vote, pair_verdicts, read_vote, verdict_of
from opd_mesh import telemetry
from opd_mesh.clients.patience import Patience
from opd_mesh.clients.rollout import GenerateSpec
from opd_mesh.config.services import GrmServerConfig
from opd_mesh.convert import policy_to_proto
from opd_mesh.errors import (
    DeadlineError,
    InvalidInputError,
    JudgeUnavailableError,
    OpdError,
    PreconditionError,
    UnavailableError,
)
from opd_mesh.judging.verdict import verdict_grammar
from opd_mesh.policy import PolicyId
from opd_mesh.seeds import derive_seed
from opd_mesh.trajectory import FinishReason, SamplingParams, Trajectory

log = logging.getLogger("grm_server")
ROUNDS = 3  # that policies may spoil before an item is given up
DOMAIN = "judge"
RETRY_S = 0.5
ASKED_AGAIN = 2  # a vote that somebody cancelled


@dataclass(slots=True)
class Counts:
    """Since the process started."""

    items_judged: int = 0
    items_cached: int = 0
    votes: int = 0
    votes_unparsed: int = 0


def policy_behind(trajectories: Iterable[Trajectory], asked: PolicyId, now: PolicyId) -> PolicyId | None:
    """The one policy that wrote all of it, or None where there was more than one, or it cannot be told.

    Args:
        asked: what was served before they were asked for.
        now: what is served after the last one has come.
    """
    written = {(one.lineage, version) for one in trajectories for version in one.policy_versions}
    if not written:
        return now
    # In a lineage a version has one set of weights and never comes again. Across lineages and runs it may.
    if len(written) > 1 or (asked != now and (asked.run_id, asked.lineage) != (now.run_id, now.lineage)):
        return None
    return next((policy for policy in (now, asked) if (policy.lineage, policy.version) in written), None)


class Judging:
    """Judges items. For one event loop."""

    def __init__(self, config: GrmServerConfig, judges: Judges, texts: Texts) -> None:
        self._config = config
        self._judges = judges
        self._texts = texts
        self._cache: OrderedDict[str, pb.JudgeResponse] = OrderedDict()
        # The same after a restart, and another where the same item makes other prompts.
        way = digest_of(texts.fingerprint, texts.template, config.system_prompt, config.max_verdict_tokens)
        self._run_id = f"judge.{way[:16]}"
        self.counts = Counts()
        self._cancelling: set[asyncio.Task[None]] = set()

    async def judge(self, item: CheckedItem, given_up: asyncio.Event | None = None) -> pb.JudgeResponse:
        """The judgement on one item.

        Args:
            given_up: set where nobody will ask for it again, before this is cancelled: its votes are, too. Without it
                they are written to their end, for whoever asks again.

        Raises:
            DeadlineError: not done within its time.
            JudgeUnavailableError: policies came too fast for one of them to judge all of it.
            OpdError: nobody judges, or what the rollout server says of the item.
        """
        last: UnavailableError | None = None
        patience = Patience(self._config.judge.channel.connect_timeout_s)
        try:
            with telemetry.span("grm.judge", {"rubric": item.rubric.name, "answers": len(item.answers)}):
                async with asyncio.timeout(item.timeout_s):
                    while True:
                        refused: PreconditionError | None = None
                        may_come_back = False
                        for judge in self._judges.ranked(item.digest):
                            try:
                                policy = await judge.policy_now()
                                patience.reached()
                                return await self._judged_by(judge, policy, item, given_up)
                            except JudgeUnavailableError:
                                raise
                            except UnavailableError as error:
                                last, may_come_back = error, True
                            except PreconditionError as error:  # of this judge: another may have our tokenizer
                                refused = error
                        if refused is not None and not may_come_back:
                            raise refused
                        if patience.is_over() and last is not None:
                            raise last
                        await asyncio.sleep(RETRY_S)
        except TimeoutError:
            why = f" (last: {last})" if last else ""
            raise DeadlineError(f"not judged within {item.timeout_s:g} s{why}") from last

    async def _judged_by(
        self, judge: Judge, policy: PolicyId, item: CheckedItem, given_up: asyncio.Event | None
    ) -> pb.JudgeResponse:
        """By the policy that it serves now, or one that comes meanwhile."""
        grammar = ""
        if judge.constrained:
            grammar = verdict_grammar(item.rubric, pairwise=item.pairwise)
        if (known := self._known(policy, item, grammar)) is not None:
            self.counts.items_cached += 1
            return known
        ballots = await self._texts.ballots(item)
        asked: Counter[PolicyId] = Counter()
        for _ in range(ROUNDS):
            # A policy that is asked again was not alone the first time: what was written then must not come back.
            specs = [self.spec(item, ballot, policy, asked[policy], grammar) for ballot in ballots]
            specs, outcomes = await self._write(judge, specs, item.timeout_s, given_up)
            asked[policy] += 1
            now = await judge.policy_now()
            author = policy_behind((one for one in outcomes if isinstance(one, Trajectory)), policy, now)
            if author is not None:
                return await self._judgement(item, author, ballots, specs, outcomes, grammar)
            policy = now
        raise JudgeUnavailableError(
            f"{ROUNDS} times another policy came while the item was judged, and one must judge all of it; ask again "
            "when updates pause",
            retry_delay_s=1.0,
        )

    def spec(self, item: CheckedItem, ballot: Ballot, policy: PolicyId, again: int, grammar: str) -> GenerateSpec:
        """The generation that is a vote.

        Args:
            again: how often all votes of the item were asked of this policy before.
        """
        place = (ballot.answer_index, ballot.vote, int(ballot.swapped))
        sampling = SamplingParams(
            seed=derive_seed(item.seed, item.digest, *place),
            temperature=item.temperature,
            top_p=item.top_p,
            top_k=item.top_k,
            max_new_tokens=self._config.max_verdict_tokens,
            stop_token_ids=(self._texts.eos_token_id,),
            grammar=grammar,
        )
        weights = (policy.run_id, policy.lineage, policy.version, policy.digest, again)
        request_id = digest_of(item.digest, weights, place, ballot.prompt_ids, grammar)
        return GenerateSpec(
            request_id=request_id,
            run_id=self._run_id,
            domain=DOMAIN,
            prompt_token_ids=ballot.prompt_ids,
            sampling=sampling,
            tokenizer_fingerprint=self._texts.fingerprint,
            shared_prefix_tokens=ballot.shared_tokens,
        )

    async def _write(
        self, judge: Judge, specs: Sequence[GenerateSpec], timeout_s: float, given_up: asyncio.Event | None
    ) -> tuple[list[GenerateSpec], list[Trajectory | OpdError]]:
        """All votes, as they were asked for in the end; an error stands for one that can never be written."""
        writing: set[str] = set()

        async def write_once(spec: GenerateSpec) -> Trajectory | OpdError:
            async with judge.places:
                writing.add(spec.request_id)
                try:
                    trajectory: Trajectory | OpdError = await judge.client.generate(spec, timeout_s=timeout_s)
                except InvalidInputError as error:  # too long for the engine, or beyond what its tokens can spell
                    trajectory = error
                writing.discard(spec.request_id)
                return trajectory

        async def write(spec: GenerateSpec) -> tuple[GenerateSpec, Trajectory | OpdError]:
            outcome = await write_once(spec)
            for _ in range(ASKED_AGAIN):
                if not _cancelled(outcome):
                    break
                # Somebody gave the same vote up, and the rollout server has nothing else under its id from now on.
                spec = replace(spec, request_id=digest_of(spec.request_id, "cancelled"))
                outcome = await write_once(spec)
            return spec, outcome

        tasks = [asyncio.create_task(write(spec)) for spec in specs]
        try:
            written = await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            if given_up is not None and given_up.is_set():
                self._cancel_votes(judge, sorted(writing))
            raise
        finally:
            for task in tasks:  # where one failed the others are of no use
                task.cancel()
        return [spec for spec, _ in written], [outcome for _, outcome in written]

    def _cancel_votes(self, judge: Judge, request_ids: Sequence[str]) -> None:
        """Free their slots, behind the item's back."""

        async def cancel(request_id: str) -> None:
            try:
                await judge.client.cancel(request_id, run_id=self._run_id)
            except OpdError as error:  # it was not begun, or is written to its end
                log.info("vote %s is not cancelled: %s", request_id, error)

        for request_id in request_ids:
            task = asyncio.create_task(cancel(request_id))
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)

    async def _judgement(
        self,
        item: CheckedItem,
        author: PolicyId,
        ballots: Sequence[Ballot],
        specs: Sequence[GenerateSpec],
        outcomes: Sequence[Trajectory | OpdError],
        grammar: str,
    ) -> pb.JudgeResponse:
        votes = [
            read_vote(
                item.rubric,
                text,
                answer_index=ballot.answer_index,
                swapped=ballot.swapped,
                pairwise=item.pairwise,
                request_id=spec.request_id,
                failure=self._failure(outcome),
            )
            for ballot, spec, outcome, text in zip(
                ballots, specs, outcomes, await self._texts.written(outcomes), strict=True
            )
        ]
        response = pb.JudgeResponse(
            verdicts=_verdicts(item, votes),
            judge=policy_to_proto(author),
            rubric_digest=item.rubric.digest,
            votes=[vote.to_proto() for vote in votes],
        )
        self.counts.items_judged += 1
        self.counts.votes += len(votes)
        self.counts.votes_unparsed += sum(vote.parsed is None for vote in votes)
        if not any(map(_cancelled, outcomes)):  # somebody's whim is no judgement
            self._keep(author, item, grammar, response)
        return response

    def _failure(self, outcome: Trajectory | OpdError) -> str:
        if isinstance(outcome, OpdError):
            return f"not written: {outcome}"
        match outcome.finish_reason:
            case FinishReason.LENGTH:
                return f"cut at max_verdict_tokens ({self._config.max_verdict_tokens})"
            case FinishReason.CANCELLED:
                return "cancelled on the rollout server"
        return ""

    # --- judgements that are known -----------------------------------------------------------------------------
    def _key(self, policy: PolicyId, item: CheckedItem, grammar: str) -> str:
        return digest_of(policy.digest, self._run_id, item.digest, item.samples, grammar)

    def _known(self, policy: PolicyId, item: CheckedItem, grammar: str) -> pb.JudgeResponse | None:
        key = self._key(policy, item, grammar)
        found = self._cache.get(key)
        if found is None:
            return None
        self._cache.move_to_end(key)
        response = pb.JudgeResponse()
        response.CopyFrom(found)
        response.judge.CopyFrom(policy_to_proto(policy))  # the same weights, maybe under another version
        response.cached = True
        return response

    def _keep(self, policy: PolicyId, item: CheckedItem, grammar: str, response: pb.JudgeResponse) -> None:
        if not self._config.cache_entries:
            return
        self._cache[self._key(policy, item, grammar)] = response
        if len(self._cache) > self._config.cache_entries:
            self._cache.popitem(last=False)


def _cancelled(outcome: Trajectory | OpdError) -> bool:
    return isinstance(outcome, Trajectory) and outcome.finish_reason is FinishReason.CANCELLED


def _verdicts(item: CheckedItem, votes: Sequence[Vote]) -> list[pb.Verdict]:
    if item.pairwise:
        if item.too_long:
            return [pb.Verdict(failure="; ".join(item.too_long.values()))] * 2
        return pair_verdicts(item.rubric, votes)
    return [
        pb.Verdict(failure=item.too_long[index])
        if index in item.too_long
        else verdict_of(item.rubric, [vote for vote in votes if vote.answer_index == index])
        for index in range(len(item.answers))
    ]
