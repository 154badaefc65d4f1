"""Between texts and a judge's tokens: the prompts of an item's votes, and what was written for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

from grm_server.items import CheckedItem
from opd_mesh.config.rubrics import Rubric
from opd_mesh.errors import ConfigError, OpdError
from opd_mesh.judging.plain import all_taken_apart, special_tokens
from opd_mesh.judging.prompt import judge_prompt
from opd_mesh.models.tokenizer import tokenizer_fingerprint, tokenizer_roles
from opd_mesh.rendering import render
from opd_mesh.trajectory import FinishReason, Trajectory

# Texts that begin differently, and so do the tags that are drawn from them: what their prompts share, all prompts do.
PROBES = ("a", "Bc", "7", "(", "z y")
MIN_SHARED_TOKENS = 16
BEGINNINGS_KEPT = 256
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Ballot:
    """One vote to be asked for.

    Attributes:
        shared_tokens: of the prompt; all prompts by the rubric begin with them.
    """

    answer_index: int
    vote: int
    swapped: bool
    prompt_ids: tuple[int, ...]
    shared_tokens: int


class Texts:
    """The judge's tokenizer, off the event loop, in one thread: it bears no second one."""

    def __init__(self, tokenizer: Any, system_prompt: str | None) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the judge's tokenizer names no EOS token, so that a verdict has no end", field="model")
        self.fingerprint = tokenizer_fingerprint(tokenizer.get_vocab())
        self.eos_token_id: int = tokenizer.eos_token_id
        self.template = tokenizer_roles(tokenizer).chat_template_sha256
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._special = special_tokens(tokenizer)
        self._beginnings: dict[tuple[str, bool], tuple[int, ...]] = {}
        self._thread = ThreadPoolExecutor(1, "texts")

    async def ballots(self, item: CheckedItem) -> list[Ballot]:
        """All votes on an item. Raises :class:`ConfigError` where its rubric's template cannot be rendered."""
        return await self._in_thread(lambda: list(self._ballots(item)))

    def _ballots(self, item: CheckedItem) -> Iterator[Ballot]:
        prompt, reference, *answers = all_taken_apart((item.prompt, item.reference, *item.answers), self._special)
        shown: list[tuple[int, bool, list[str]]]
        if item.pairwise:
            shown = [] if item.too_long else [(0, False, answers), (0, True, answers[::-1])]
        else:
            shown = [(index, False, [answer]) for index, answer in enumerate(answers) if index not in item.too_long]
        for index, swapped, texts in shown:
            ids = self._prompt_ids(item.rubric, prompt, texts, reference)
            beginning = self._beginning(item.rubric, item.pairwise)
            shared = len(beginning) if len(beginning) < len(ids) and ids[: len(beginning)] == beginning else 0
            for vote in range(item.samples):
                yield Ballot(index, vote, swapped, ids, shared)

    def _prompt_ids(self, rubric: Rubric, prompt: str, answers: Sequence[str], reference: str) -> tuple[int, ...]:
        content = judge_prompt(rubric, prompt, answers, reference)
        return render(self._tokenizer, [{"role": "user", "content": content}], self._system_prompt)

    def _beginning(self, rubric: Rubric, pairwise: bool) -> tuple[int, ...]:
        """What all prompts by a rubric begin with; empty where it is not worth a word."""
        key = (rubric.digest, pairwise)
        if key not in self._beginnings:
            if len(self._beginnings) >= BEGINNINGS_KEPT:
                self._beginnings.clear()
            count = 2 if pairwise else 1
            try:
                probes = [self._prompt_ids(rubric, text, [text] * count, text) for text in PROBES]
            except ConfigError:  # a template may ask for more of a text than ours have
                probes = []
            common = tuple(
                column[0] for column in takewhile(lambda ids: len(set(ids)) == 1, zip(*probes, strict=False))
            )
            self._beginnings[key] = common if len(common) >= MIN_SHARED_TOKENS else ()
        return self._beginnings[key]

    async def written(self, trajectories: Sequence[Trajectory | OpdError]) -> list[str]:
        """What the judge wrote, without the stop token at its end; any other special token stands in it as such."""

        def text(trajectory: Trajectory | OpdError) -> str:
            if isinstance(trajectory, OpdError):
                return ""
            ids = trajectory.scored_token_ids
            if trajectory.finish_reason is FinishReason.STOP:
                ids = ids[:-1]
            decoded: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return decoded

        return await self._in_thread(lambda: [text(trajectory) for trajectory in trajectories])

    async def _in_thread(self, work: Callable[[], ResultT]) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
