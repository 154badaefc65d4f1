"""What a domain's prompts come from, how answers to them are verified, and how long those may be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, Tag, field_validator, model_validator

from opd_mesh.config.base import Strict, choice


# --- sources ---------------------------------------------------------------------------------------------------
class ReasoningGymSource(Strict):
    """Prompts drawn from a reasoning-gym task family."""

    task: str
    # Arguments of the family's dataset (for example ``min_terms``), without seed and size.
    params: dict[str, Any] = Field(default_factory=dict)


class JsonlSource(Strict):
    """Prompts of one's own: a JSONL file with ``prompt`` (text) or ``messages`` (chat turns) on every line.

    A line may also hold ``answer`` (text or a number; or the last turn is the assistant's) and ``metadata``, a mapping.
    """

    path: Path
    # A file of prompts for evaluation; unset: as many lines from the end of `path` as evaluation asks for.
    heldout: Path | None = None


class DatasetSource(Strict):
    """A Hugging Face dataset on this machine: a folder of ``save_to_disk``, a Parquet file, or a folder of them.

    All other columns of a row are its metadata.
    """

    path: Path
    # Of a dataset that has splits.
    split: str | None = None
    # Another split of it, held out for evaluation; unset: as many rows from the end as evaluation asks for.
    heldout_split: str | None = None
    # Columns: text, or chat turns as in a JSONL file; one of the two.
    prompt_field: str | None = None
    messages_field: str | None = None
    answer_field: str | None = None

    @model_validator(mode="after")
    def _one_field(self) -> Self:
        if (self.prompt_field is None) == (self.messages_field is None):
            raise ValueError("name exactly one column for prompts: prompt_field (text) or messages_field (chat turns)")
        return self


class TrajectoriesSource(Strict):
    """What a model has written, as token ids, to be learned by SFT: a line of JSON each, as ``opd score`` reads them.

    ``trajectory_id``, ``token_ids``, ``scored_spans`` (one, up to the end) and ``tokenizer_fingerprint``.
    """

    path: Path


# --- answers ---------------------------------------------------------------------------------------------------
class TextExtract(Strict):
    """The whole answer, stripped."""

    name: Literal["text"] = "text"


class RegexExtract(Strict):
    """A group of the last match."""

    name: Literal["regex"] = "regex"
    pattern: str
    # By number or name; 0: the whole match.
    group: int | str = 1

    @model_validator(mode="after")
    def _has_the_group(self) -> Self:
        try:
            pattern = re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern: {error}") from error
        known = [*range(pattern.groups + 1), *pattern.groupindex]
        if self.group not in known:
            raise ValueError(f"group: the pattern has no group {self.group!r}, only {', '.join(map(str, known))}")
        return self


class BoxedExtract(Strict):
    r"""What the last ``\boxed{…}`` holds."""

    name: Literal["boxed"] = "boxed"


class LastNumberExtract(Strict):
    """The last number in the text; commas between thousands are taken out."""

    name: Literal["last_number"] = "last_number"


class TagExtract(Strict):
    """What stands between the last ``<tag>`` and ``</tag>``."""

    name: Literal["tag"] = "tag"
    tag: str = Field("answer", pattern=r"^[^<>\s]+$")


Extract: TypeAlias = Annotated[
    Annotated[TextExtract, Tag("text")]
    | Annotated[RegexExtract, Tag("regex")]
    | Annotated[BoxedExtract, Tag("boxed")]
    | Annotated[LastNumberExtract, Tag("last_number")]
    | Annotated[TagExtract, Tag("tag")],
    choice("text", ("text", "regex", "boxed", "last_number", "tag"), "extraction"),
]


# --- verifiers -------------------------------------------------------------------------------------------------
class AnswerVerifier(Strict):
    """What every verifier takes: how to find the answer in a response, and in which form the scorer reads it."""

    extract: Extract = TextExtract()
    # Template of what the scorer reads, from ``answer`` (extracted), ``question`` and ``metadata``; unset: the answer.
    submit: str | None = None
    # Scores from here on count as 1 and lower ones as 0; unset: as the scorer says.
    threshold: float | None = Field(None, gt=0, le=1)
    # For one answer; beyond it the verifier's process is ended, and the answer has no score.
    timeout_s: float = Field(5.0, gt=0, allow_inf_nan=False)


class ReasoningGymVerifier(AnswerVerifier):
    """The family's own scorer; many give less than 1 for what is nearly right."""

    name: Literal["reasoning_gym"] = "reasoning_gym"


class ExactVerifier(AnswerVerifier):
    """1 where the answer is the gold answer, both stripped."""

    name: Literal["exact"] = "exact"
    casefold: bool = False


class NumberVerifier(AnswerVerifier):
    """1 where the answer is one number and nothing else, and equals the gold answer."""

    name: Literal["number"] = "number"
    # Largest difference that still counts as equal.
    tolerance: float = Field(0.0, ge=0, allow_inf_nan=False)


class TemplateVerifier(AnswerVerifier):
    """A Jinja template that renders the score, a number in [0, 1]."""

    name: Literal["template"] = "template"
    # Of ``answer`` (extracted), ``question``, ``gold`` (empty where there is none) and ``metadata``, for example
    # "{{ 1 if answer | length == 5 else 0 }}".
    score: str


class PythonVerifier(AnswerVerifier):
    """A function of one's own: ``f(answer: str, item: Mapping) -> float`` in [0, 1].

    ``item`` has ``question``, ``answer`` (None where there is no gold answer) and ``metadata``.
    """

    name: Literal["python"] = "python"
    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")  # package.module:name


class VerdictVerifier(AnswerVerifier):
    """Of a judging domain: 1 − |s − s_gold| for the verdict's overall score s, and 0 for what is no verdict."""

    name: Literal["verdict"] = "verdict"


VerifierConfig: TypeAlias = Annotated[
    Annotated[ReasoningGymVerifier, Tag("reasoning_gym")]
    | Annotated[ExactVerifier, Tag("exact")]
    | Annotated[NumberVerifier, Tag("number")]
    | Annotated[TemplateVerifier, Tag("template")]
    | Annotated[PythonVerifier, Tag("python")]
    | Annotated[VerdictVerifier, Tag("verdict")],
    choice(None, ("reasoning_gym", "exact", "number", "template", "python", "verdict"), "verifier"),
]


# --- splits ----------------------------------------------------------------------------------------------------
class SplitsConfig(Strict):
    """Shares of validation and test; the rest is trained on. Which one an item belongs to depends on its key alone."""

    validation: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)
    # Template of ``question``, ``answer`` and ``metadata``: items of one key are never in different splits; unset: the
    # prompt's text.
    key: str | None = None

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation and test are {self.validation + self.test:g} of all items, so none is left to train on"
            )
        return self


# --- lengths and efforts ---------------------------------------------------------------------------------------
class LinearLengthPenalty(Strict):
    """−min(limit, per_token · max(0, R − free_tokens)) for a response of R tokens."""

    name: Literal["linear"] = "linear"
    free_tokens: int = Field(0, ge=0)
    per_token: float = Field(gt=0, allow_inf_nan=False)
    limit: float = Field(1.0, gt=0, allow_inf_nan=False)


class SoftOverlongPenalty(Strict):
    """DAPO's: 0 up to max_new_tokens − buffer_tokens, then linearly down to −1 at max_new_tokens."""

    name: Literal["soft_overlong"] = "soft_overlong"
    buffer_tokens: int = Field(ge=1)


LengthPenalty: TypeAlias = Annotated[
    Annotated[LinearLengthPenalty, Tag("linear")] | Annotated[SoftOverlongPenalty, Tag("soft_overlong")],
    choice(None, ("linear", "soft_overlong"), "length penalty"),
]


class EffortConfig(Strict):
    """A reasoning effort: the form of prompt and response, and how long the response may be."""

    # At the very beginning, right after BOS.
    prefix: str = ""
    # Directly behind the generation prompt.
    opening: str = ""
    # Ends the reasoning in a response; what follows is the answer. Empty: all of the response is the answer.
    closing: str = ""
    # Of the response, reasoning included; a domain's own wins.
    max_new_tokens: int | None = Field(None, ge=1)
    length_penalty: LengthPenalty | None = None


# DeepSeek-V4's three. The text that it puts before prompts of the greatest effort is not published; this one is ours.
_EXHAUSTIVE = (
    "Reasoning effort: maximum. Deliberate exhaustively before you answer: take the problem apart, work out every "
    "step, try other ways, and check the result against the question.\n\n"
)
DEFAULT_EFFORTS: dict[str, EffortConfig] = {
    "non_think": EffortConfig(opening="</think>"),
    "high": EffortConfig(opening="<think>", closing="</think>"),
    "max": EffortConfig(prefix=_EXHAUSTIVE, opening="<think>", closing="</think>"),
}


# --- other prompts ---------------------------------------------------------------------------------------------
class OthersConfig(Strict):
    """Prompts of another kind among a domain's training prompts: marked by the same teachers, never verified."""

    # Of the domain's training prompts.
    share: float = Field(0.2, gt=0, lt=1)
    reasoning_gym: ReasoningGymSource | None = None
    jsonl: JsonlSource | None = None
    dataset: DatasetSource | None = None
    # As a domain's.
    prompt: str | None = None

    @field_validator("jsonl", "dataset")
    @classmethod
    def _nothing_is_held_out(cls, source: Any) -> Any:
        for key in ("heldout", "heldout_split"):
            if getattr(source, key, None) is not None:
                raise ValueError(f"{key}: nothing is held out of prompts that are only trained on; leave it out")
        return source

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.reasoning_gym, self.jsonl, self.dataset)) != 1:
            raise ValueError("name exactly one source: reasoning_gym, jsonl or dataset")
        return self
