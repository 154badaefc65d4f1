"""A domain: its prompts in three splits, the items behind them, and what SFT is to learn."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

from opd_mesh.config.domains import DomainConfig
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.rubrics import Rubric
from opd_mesh.config.tasks import ExactVerifier, NumberVerifier, OthersConfig
from opd_mesh.errors import ConfigError
from opd_mesh.judging.plain import special_tokens
from opd_mesh.rendering import PLAIN, ResponseDecoder, render, render_answer, split_reasoning
from student_trainer.tasks.items import PASSED_OVER, Item, Messages, Prompt, Split
from student_trainer.tasks.judging import open_judging, open_rubric, shows_prompt
from student_trainer.tasks.length_penalty import penalty
from student_trainer.tasks.sources import Lines, Source, SourceConfig, open_source
from student_trainer.tasks.splits import split_of
from student_trainer.tasks.templates import compiled
from student_trainer.tasks.verifiers import VerifierSpec

MAX_SKIPPED = 10_000
REASONING = "reasoning"  # the metadata that holds what stands before the answer of a thinking effort


def _source_of(config: DomainConfig | OthersConfig) -> tuple[str, SourceConfig]:
    """(key, source) of what is no judging domain: the recipe has checked that there is one."""
    for key in ("reasoning_gym", "jsonl", "dataset", "trajectories"):
        if (source := getattr(config, key, None)) is not None:
            return key, source
    raise ConfigError("names no source")


@dataclass
class _HeldOut:
    """What was found of one split so far."""

    prompts: list[Prompt] = field(default_factory=list)
    seen: set[Any] = field(default_factory=set)  # keys and token ids
    index: int = 0
    exhausted: bool = False


class Domain:
    """One domain, for any thread. Opening one is slow: files are read, held-out prompts are tokenized.

    Attributes:
        max_new_tokens: of a response.
        effort: the form of prompt and response.
        heldout: the first ``evaluation.prompts_per_domain`` validation prompts.
        rubric: of a judging domain.
        heldout_keys: of items whose keys the source tells, what no training prompt may have.

    Args:
        answering: the domain whose answers this one judges, where its configuration names one.

    Raises:
        ConfigError: naming the field.
        TokenizerMismatchError: trajectories of another tokenizer.
    """

    def __init__(
        self,
        name: str,
        config: DomainConfig,
        recipe: Recipe,
        tokenizer: Any,
        *,
        max_prompt_tokens: int | None = None,
        answering: Domain | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self._judged = config.answering_domain  # whose keys are ours
        self.effort = PLAIN if config.effort is None else recipe.efforts[config.effort]
        self.max_new_tokens = recipe.max_new_tokens(config)
        self._length_penalty = recipe.length_penalty(config)
        room = recipe.rollout.engine.max_context_tokens - self.max_new_tokens
        self._max_prompt_tokens = room if max_prompt_tokens is None else max_prompt_tokens
        self._tokenizer = tokenizer
        self._stop_token_ids = recipe.rollout.stop_token_ids
        self._decoder = ResponseDecoder(tokenizer, self.effort)
        self._lock = threading.Lock()  # sources and held-out sets; a tokenizer is safe by itself
        self._open_templates()
        count = self._kept_out(recipe)
        self.rubric: Rubric | None = None
        if config.judging is not None:
            self.rubric = open_rubric(config.judging.rubric, self._key("judging.rubric"))
        self._source = self._open_source(recipe.run.seed, count, answering)
        self._others = self._open_others(recipe.run.seed)
        self._held_out: dict[Split, _HeldOut] = {"validation": _HeldOut(), "test": _HeldOut()}
        self._held_out_texts: set[int] = set()  # hashes of judges' prompts whose keys are not for training
        self._check_judged_key(answering)
        self._kept = self._found("validation", count)
        accuracy = recipe.evaluation.accuracy
        if answering is not None and config.splits is not None and accuracy is not None:
            self._found(accuracy.split, accuracy.prompts_per_domain)  # before anything like them is trained on
        self.heldout = self._kept[: recipe.evaluation.prompts_per_domain]
        self._heldout_ids = {prompt.token_ids for prompt in self._kept}
        self.heldout_keys = frozenset(self.key(self.item(prompt)) for prompt in self._kept)
        if answering is not None:
            self.heldout_keys |= answering.heldout_keys

    def _kept_out(self, recipe: Recipe) -> int:
        """Validation prompts that are looked for at once; without ``splits`` no others are kept out of the training."""
        count, accuracy = recipe.evaluation.prompts_per_domain, recipe.evaluation.accuracy
        if accuracy is None or accuracy.split != "validation" or self.config.splits or not self.has_verifier:
            return count
        return max(count, accuracy.prompts_per_domain)

    def _key(self, key: str) -> str:
        return f"domains.{self.name}.{key}"

    def _open_templates(self) -> None:
        config = self.config
        self._prompt_template = compiled(config.prompt, self._key("prompt"))
        self._answer_template = compiled(config.answer, self._key("answer"))
        # The items of another domain that are judged have its keys.
        splits = None if self._judged else config.splits
        self._key_template = compiled(splits.key if splits else None, self._key("splits.key"))
        self._others_template = compiled(config.others.prompt if config.others else None, self._key("others.prompt"))

    def _check_judged_key(self, answering: Domain | None) -> None:
        """By default another question is another key, and may be in another split, but the judge must see that."""
        judging = self.config.judging
        if answering is None or self.rubric is None or judging is None or self.config.splits is None:
            return
        if shows_prompt(self.rubric, pairwise=judging.pairwise):
            return
        if self.config.splits.key is None:
            field = f"domains.{answering.name}.splits.key"
            raise ConfigError(
                f"domain {self.name}: rubric {self.rubric.name} does not show the judge the whole question, so a "
                f"prompt that is held out may be trained on under another one; set {field} to what all questions of "
                "one answer have in common, or show the question in the rubric's template",
                field=field,
            )

    def _open_source(self, seed: int, count: int, answering: Domain | None) -> Source:
        config = self.config
        held_out: dict[str, Any] = {
            "seed": seed,
            "heldout_count": count,
            "trained": config.share > 0,
            "by_key": config.splits is not None,
        }
        if config.judging is not None and self.rubric is not None:
            return open_judging(
                config.judging,
                self.rubric,
                answering,
                field=self._key("judging"),
                special=special_tokens(self._tokenizer),
                **held_out,
            )
        key, source = _source_of(config)
        needs_answers = ""
        if config.verifier is not None and isinstance(config.verifier, ExactVerifier | NumberVerifier):
            needs_answers = f"verifier {config.verifier.name}"
        elif config.reward is not None and config.reward.reference == "answer":
            needs_answers = "reward.reference"
        return open_source(
            source, field=self._key(key), tokenizer=self._tokenizer, needs_answers=needs_answers, **held_out
        )

    def _open_others(self, seed: int) -> Source | None:
        if self.config.others is None:
            return None
        key, source = _source_of(self.config.others)
        field = self._key(f"others.{key}")
        return open_source(source, seed=seed, field=field, tokenizer=self._tokenizer, heldout_count=0)

    # --- items -------------------------------------------------------------------------------------------------
    def _train_item(self, index: int) -> tuple[bool, Item]:
        """(is it one of the others, the item). Both streams are drawn from without gaps."""
        if self._others is None or self.config.others is None:
            return False, self._source.train(index)
        share = self.config.others.share
        others_before = math.floor(index * share)
        if math.floor((index + 1) * share) > others_before:
            return True, self._others.train(others_before)
        return False, self._source.train(index - others_before)

    def item(self, prompt: Prompt) -> Item:
        """What a prompt was made of."""
        with self._lock:
            if prompt.split == "train":
                return self._train_item(prompt.index)[1]
            item = self._source.heldout(prompt.index)
        if item is None:
            raise ConfigError(f"there is no held-out item {prompt.index}", field=f"domains.{self.name}")
        return item

    def source_item(self, index: int, *, heldout: bool) -> Item | None:
        """Of the domain's own source, whatever its split; None beyond the last one that is held out."""
        with self._lock:
            return self._source.heldout(index) if heldout else self._source.train(index)

    def question(self, item: Item) -> str:
        """What is asked, as the template of prompts has it: the text of the turn; of several, each behind its role."""
        messages = self._messages(item, other=False)
        if len(messages) == 1:
            return messages[0]["content"]
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)

    def gold_answer(self, item: Item) -> str | None:
        """What SFT learns, without the reasoning; None where the item has no gold answer."""
        text = item.answer if self._answer_template is None else self._answer_template.of(item)
        if text is None or self.effort.closing not in text:
            return text
        return split_reasoning(text, self.effort.closing).answer

    def key(self, item: Item) -> str:
        """What the item's split is told by."""
        return self._split_key(item, other=False)

    def split(self, item: Item) -> Split | None:
        """The item's; None where the domain has no ``splits``."""
        return None if self.config.splits is None else self._split_of(item, other=False)

    def _messages(self, item: Item, *, other: bool) -> Messages:
        template = self._others_template if other else self._prompt_template
        if template is None:
            return item.messages
        return [*item.messages[:-1], {**item.messages[-1], "content": template.of(item)}]

    def _split_of(self, item: Item, *, other: bool) -> Split | None:
        """None of one of the others that has no key, so that it is none of the domain's own."""
        assert self.config.splits is not None
        try:
            return split_of(self._split_key(item, other=other), self.config.splits)
        except ConfigError:
            if other:
                return None
            raise

    def _split_key(self, item: Item, *, other: bool) -> str:
        """Of an item; without a template the prompt's text, which is the same under every effort and chat template."""
        if self._key_template is not None:
            return self._key_template.of(item)
        if item.key is not None:
            return item.key
        if not item.messages:
            return " ".join(map(str, item.prompt_ids))
        messages = self._messages(item, other=other)
        return messages[0]["content"] if len(messages) == 1 else json.dumps(messages)

    def _rendered(self, index: int, item: Item, *, other: bool = False, split: Split = "train") -> Prompt:
        if item.messages:
            messages = self._messages(item, other=other)
            token_ids = render(self._tokenizer, messages, self.config.system_prompt, self.effort)
        else:
            token_ids = tuple(item.prompt_ids)
        if not 1 <= len(token_ids) <= self._max_prompt_tokens:
            raise ConfigError(
                f"prompt {index} renders to {len(token_ids)} tokens; between 1 and {self._max_prompt_tokens} fit "
                "beside the response (rollout.engine.max_context_tokens)",
                field=f"domains.{self.name}",
            )
        return Prompt(self.name, index, token_ids, other, split)

    # --- prompts -----------------------------------------------------------------------------------------------
    def after(self, cursor: int, count: int) -> tuple[list[Prompt], int]:
        """The next ``count`` training prompts from ``cursor`` on, and the cursor behind them."""
        prompts: list[Prompt] = []
        index, skipped, unusable = cursor, 0, 0
        with self._lock:
            while len(prompts) < count:
                other, item = self._train_item(index)
                prompt = None if item is PASSED_OVER else self._train_prompt(index, item, other=other)
                index += 1
                if prompt is not None:
                    prompts.append(prompt)
                    skipped = unusable = 0
                    continue
                skipped += 1
                unusable += item is PASSED_OVER
                if skipped == MAX_SKIPPED:
                    raise self._too_few(unusable)
        return prompts, index

    def _too_few(self, unusable: int) -> ConfigError:
        why = []
        if kept := MAX_SKIPPED - unusable:
            why.append(f"{kept} are held out for evaluation: the source has too few different ones")
        if unusable:
            why.append(
                f"{unusable} passed over, as the verifier of {self._judged} does not find their gold answers right, or "
                "no corruption of them wrong: see both"
            )
        text = f"{MAX_SKIPPED} prompts in a row cannot be trained on: {'; '.join(why)}"
        return ConfigError(text, field=f"domains.{self.name}")

    def _train_prompt(self, index: int, item: Item, *, other: bool) -> Prompt | None:
        if item.key is not None and item.key in self.heldout_keys:
            return None
        splits = self.config.splits
        if splits is not None and self._split_of(item, other=other) not in (None, "train"):
            self._hold_out_text(item)
            return None
        prompt = self._rendered(index, item, other=other)
        if splits is not None and not other and (self._judged is not None or self._reads_keys):
            self._check_key(prompt, item)
        return None if prompt.token_ids in self._heldout_ids else prompt

    @property
    def _reads_keys(self) -> bool:
        return self._key_template is not None and isinstance(self._source, Lines)

    def _hold_out_text(self, item: Item) -> None:
        if self._judged is not None:
            self._held_out_texts.add(hash(item.question))

    def _check_key(self, prompt: Prompt, item: Item) -> None:
        """Of items that anyone can read, and of what a judge is shown of them, what is trained on and what is held out
        may differ in the key alone."""
        held_out = any(prompt.token_ids in found.seen for found in self._held_out.values())
        if held_out or (self._judged is not None and hash(item.question) in self._held_out_texts):
            field = f"domains.{self._judged or self.name}.splits.key"
            raise ConfigError(
                f"domain {self.name}: training prompt {prompt.index} is also held out, under another key; make "
                f"{field} a function of {'what the judge is shown, right or wrong' if self._judged else 'the prompt'}",
                field=field,
            )

    def held_out(self, split: Literal["validation", "test"], count: int) -> list[Prompt]:
        """The first ``count`` prompts of a split, fewer where the source has no more.

        Without ``splits`` that is at most as many validation prompts as ``evaluation`` asks for: no others are kept
        out of the training.
        """
        if split == "test" and not self.config.has_test_prompts:
            raise ConfigError(
                f"domain {self.name} has no test prompts; give it a share of them, for example "
                "splits: {validation: 0.1, test: 0.1}",
                field=self._key("splits.test"),
            )
        return self._kept[:count] if self.config.splits is None else self._found(split, count)

    def _found(self, split: Split, count: int) -> list[Prompt]:
        with self._lock:
            found = self._held_out[split]
            skipped = 0
            while len(found.prompts) < count and not found.exhausted:
                item = self._source.heldout(found.index)
                if item is None:
                    found.exhausted = True
                    break
                prompt = self._held_out_prompt(split, found, item)
                found.index += 1
                skipped = 0 if prompt else skipped + 1
                if prompt:
                    found.prompts.append(prompt)
                # Of a family with few different items all are found by then.
                found.exhausted = skipped == MAX_SKIPPED
            return found.prompts[:count]

    def _held_out_prompt(self, split: Split, found: _HeldOut, item: Item) -> Prompt | None:
        if item is PASSED_OVER:
            return None
        splits = self.config.splits
        keys: list[Any] = [] if item.key is None else [(item.key, item.part)]
        if splits is not None:
            key = self._split_key(item, other=False)
            belongs = split_of(key, splits)
            if belongs != "train":
                self._hold_out_text(item)
            if belongs != split:
                return None
            keys = keys or [key]
        if any(key in found.seen for key in keys):
            return None
        prompt = self._rendered(found.index, item, split=split)
        if prompt.token_ids in found.seen:
            return None
        found.seen.update([*keys, prompt.token_ids])
        return prompt

    # --- answers -----------------------------------------------------------------------------------------------
    def solution(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids of the gold answer in the effort's form, EOS at the end; of a trajectory, its response as it is.

        Raises:
            ConfigError: there is no gold answer, or no reasoning where the effort wants it.
        """
        item = self.item(prompt)
        if item.response_ids:
            return tuple(item.response_ids)
        if self._answer_template is not None and not prompt.other:
            text = self._answer_template.of(item)
        elif item.answer is not None:
            text = item.answer
        else:
            raise ConfigError(
                f"domain {self.name}: item {prompt.index} has no gold answer to learn; give the source answers, or "
                "write them with the template `answer`",
                field=self._key("answer"),
            )
        return (*render_answer(self._tokenizer, self._with_reasoning(text, item)), self._end_token_id())

    def _with_reasoning(self, answer: str, item: Item) -> str:
        closing = self.effort.closing
        if not closing or closing in answer:
            return answer
        reasoning = item.metadata.get(REASONING)
        if not isinstance(reasoning, str):
            raise ConfigError(
                f"domain {self.name}: effort {self.config.effort} writes reasoning before {closing}, but the items "
                f"hold none; give it as metadata.{REASONING}, or write it, {closing} and the answer with the template "
                "`answer`",
                field=self._key("answer"),
            )
        return reasoning + closing + answer

    def _end_token_id(self) -> int:
        end = self._tokenizer.eos_token_id
        if end is None and self._stop_token_ids:
            end = self._stop_token_ids[0]
        if end is None:
            raise ConfigError(
                "the student's tokenizer has no EOS, so an answer has no end; name one", field="rollout.stop_token_ids"
            )
        return int(end)

    def text(self, response_ids: Any) -> str:
        """A response as text, without special tokens but with the effort's marks."""
        return self._decoder.text(response_ids)

    def length_penalty(self, num_tokens: int) -> float:
        """What a response of so many tokens costs, at most 0."""
        if self._length_penalty is None:
            return 0.0
        return penalty(self._length_penalty, num_tokens, self.max_new_tokens)

    # --- verifying ---------------------------------------------------------------------------------------------
    @property
    def has_verifier(self) -> bool:
        """Whether answers can be graded."""
        return self.config.verifier is not None

    @property
    def verifier_spec(self) -> VerifierSpec:
        """What a process needs to grade answers. Only of a domain that has a verifier."""
        config = self.config
        assert config.verifier is not None
        return VerifierSpec(self.name, config.verifier, self.effort.closing, config.reasoning_gym, self.rubric)


def open_domains(recipe: Recipe, tokenizer: Any) -> list[Domain]:
    """All domains of a recipe. Slow: prompts are read, and tokenized."""
    opened: dict[str, Domain] = {}
    for name, config in sorted(recipe.domains.items(), key=lambda one: one[1].answering_domain is not None):
        judged = config.answering_domain
        opened[name] = Domain(name, config, recipe, tokenizer, answering=opened[judged] if judged else None)
    return [opened[name] for name in recipe.domains]
