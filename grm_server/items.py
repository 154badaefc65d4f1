"""A ``JudgeItem``, checked: everything that can be said before the judge is asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property

from opd.v1 import common_pb2
from opd.v1 import generative_reward_service_pb2 as pb

from opd_mesh.config.rubrics import Rubric, RubricLibrary
from opd_mesh.config.services import GrmServerConfig
from opd_mesh.convert import sampling_from_proto
from opd_mesh.errors import InvalidInputError, NotFoundError, PreconditionError, TooLongError
from opd_mesh.judging.messages import rubric_from_proto
from opd_mesh.judging.verdict import VERDICT_FORMAT

MAX_ANSWERS = 256
MAX_SAMPLES = 64
MODES = (pb.JUDGE_MODE_UNSPECIFIED, pb.JUDGE_MODE_POINTWISE, pb.JUDGE_MODE_PAIRWISE)


@dataclass(frozen=True)
class CheckedItem:
    """What is to be judged, and how.

    Attributes:
        samples: votes for each answer; of a pair, in each order.
        too_long: index of an answer → why it is not judged. Of a pair nothing is, where there is one.
    """

    rubric: Rubric
    pairwise: bool
    prompt: str
    answers: tuple[str, ...]
    reference: str
    samples: int
    seed: int
    temperature: float
    top_p: float
    top_k: int
    timeout_s: float
    too_long: dict[int, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over all that a vote depends on but for who judges; so not over how many votes there are."""
        return digest_of(
            VERDICT_FORMAT, self.rubric.digest, self.pairwise, self.prompt, self.answers, self.reference,
            self.seed, self.temperature, self.top_p, self.top_k,
        )  # fmt: skip


def digest_of(*parts: object) -> str:
    """SHA-256 (hex) over the parts as JSON."""
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


def check_item(item: pb.JudgeItem, config: GrmServerConfig, rubrics: RubricLibrary) -> CheckedItem:
    """Raises:
    InvalidInputError, TooLongError, NotFoundError, PreconditionError: naming the field.
    """
    if item.mode not in MODES:
        raise InvalidInputError(f"{item.mode} is no known mode", field="mode")
    pairwise = item.mode == pb.JUDGE_MODE_PAIRWISE
    count = len(item.answers)
    if pairwise and count != 2:
        raise InvalidInputError(f"{count} answers: a pair has two", field="answers")
    if not 1 <= count <= MAX_ANSWERS:
        raise InvalidInputError(f"{count} answers: give from 1 to {MAX_ANSWERS}", field="answers")
    for name, text in (("prompt", item.prompt), ("reference", item.reference)):
        if len(text) > config.max_prompt_chars:
            most = config.max_prompt_chars
            raise TooLongError(f"{len(text)} characters, but at most {most} are read (max_prompt_chars)", field=name)
    too_long = {
        index: f"answers[{index}] has {len(answer)} characters, but at most {config.max_answer_chars} are judged "
        "(max_answer_chars)"
        for index, answer in enumerate(item.answers)
        if len(answer) > config.max_answer_chars
    }
    seed, temperature, top_p, top_k = _sampling(item, config)
    samples = item.samples or config.samples
    if samples > MAX_SAMPLES:
        raise InvalidInputError(f"{samples} votes, but at most {MAX_SAMPLES} are asked for", field="samples")
    if samples > 1 and temperature == 0:
        raise InvalidInputError(
            f"at temperature 0 all {samples} votes are the same: give sampling with a temperature above 0, or 1 vote",
            field="samples",
        )
    timeout_s = item.timeout.ToNanoseconds() / 1e9
    if timeout_s < 0:
        raise InvalidInputError(f"{timeout_s:g} s is before now", field="timeout")
    return CheckedItem(
        rubric=_rubric(item, config, rubrics),
        pairwise=pairwise,
        prompt=item.prompt,
        answers=tuple(item.answers),
        reference=item.reference,
        samples=samples,
        seed=seed,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        timeout_s=timeout_s or config.item_timeout_s,
        too_long=too_long,
    )


def _rubric(item: pb.JudgeItem, config: GrmServerConfig, rubrics: RubricLibrary) -> Rubric:
    match item.WhichOneof("rubric"):
        case "rubric_name":
            rubric = rubrics.get(item.rubric_name)
            if rubric is None:
                known = ", ".join(rubrics.names) or "none"
                raise NotFoundError(
                    f"no rubric {item.rubric_name!r} is held here, but {known}; or send it inline", field="rubric_name"
                )
            return rubric
        case "rubric_inline":
            rubric = rubric_from_proto(item.rubric_inline, "rubric_inline")
            name = "template" if rubric.template is not None else "pairwise_template"
            if not config.inline_templates and (rubric.template, rubric.pairwise_template) != (None, None):
                raise PreconditionError(
                    "templates are not taken from requests here: put the rubric among those of the server, or set "
                    "inline_templates in its configuration",
                    field=f"rubric_inline.{name}",
                )
            return rubric
    raise InvalidInputError("give a rubric, by name or inline", field="rubric_name")


def _sampling(item: pb.JudgeItem, config: GrmServerConfig) -> tuple[int, float, float, int]:
    """(seed, temperature, top_p, top_k)."""
    if not item.HasField("sampling"):
        return config.seed, config.sampling.temperature, config.sampling.top_p, config.sampling.top_k
    counted = common_pb2.SamplingParams(
        seed=item.sampling.seed,
        temperature=item.sampling.temperature,
        top_p=item.sampling.top_p,
        top_k=item.sampling.top_k,
        max_new_tokens=1,
    )
    sampling = sampling_from_proto(counted)
    return sampling.seed, sampling.temperature, sampling.top_p, sampling.top_k
