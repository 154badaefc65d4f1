"""What :mod:`signals` measures on: answers of a recipe's student, as the hidden states of both sides.

Letters: T response tokens, N tokens of one sequence, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servers import say

if TYPE_CHECKING:
    from opd_kernels import LinearHead
    from torch import Tensor

    from opd_mesh.config.recipe import Recipe


class Refusal(Exception):
    """A figure would not be worth reporting."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The same response tokens, seen by both sides: float32 hidden states [T, D], and heads [V, D]."""

    student_TD: Tensor
    student_head: LinearHead
    teacher_TD: Tensor
    teacher_head: LinearHead

    def chunks(self, tokens: int) -> Iterator[Rows]:
        """``tokens`` rows at a time."""
        parts = zip(self.student_TD.split(tokens), self.teacher_TD.split(tokens), strict=True)
        for student_TD, teacher_TD in parts:
            yield Rows(student_TD, self.student_head, teacher_TD, self.teacher_head)


def write_answers(model: Any, prompts: list[tuple[int, ...]], recipe: Recipe, stops: set[int], seed: int) -> list[Any]:
    """Token ids of prompt and response for each prompt, sampled as the recipe says, through transformers."""
    import torch

    torch.manual_seed(seed)
    width, pad = max(map(len, prompts)), min(stops)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rollout = recipe.rollout
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_new_tokens=rollout.max_new_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=pad,
    )
    answers = []
    for prompt, row in zip(prompts, output[:, width:].tolist(), strict=True):
        end = next((index + 1 for index, token in enumerate(row) if token in stops), len(row))
        answers.append((*prompt, *row[:end]))
    return answers


def rows_by_teacher(recipe: Recipe, prompts_per_domain: int, seed: int) -> dict[str, Rows]:
    """Domain and teacher → what both say of the domain's answers; one model in memory at a time."""
    import torch

    from opd_mesh.models.checkpoint import load_causal_lm
    from opd_mesh.models.forward import BatchLayout, sequence_hidden_states
    from opd_mesh.models.heads import extract_head
    from opd_mesh.models.tokenizer import load_tokenizer, valid_vocab_size
    from opd_mesh.torch_tensors import TORCH_DTYPES
    from student_trainer.tasks import Domain

    tokenizer = load_tokenizer(recipe.student.path)
    vocab_size = valid_vocab_size(tokenizer)
    stops = {tokenizer.eos_token_id, *recipe.rollout.stop_token_ids}
    room = recipe.rollout.engine.max_context_tokens - recipe.rollout.max_new_tokens
    prompts = {
        name: [
            prompt.token_ids
            for prompt in Domain(name, config, recipe, tokenizer, max_prompt_tokens=room).after(0, prompts_per_domain)[
                0
            ]
        ]
        for name, config in recipe.domains.items()
    }

    def hidden_rows(model: Any, domain: str) -> Tensor:
        hidden = sequence_hidden_states(model, answers[domain], BatchLayout.LONE)
        responses = zip(hidden, prompts[domain], strict=True)
        return torch.cat([hidden_ND[len(prompt) - 1 : -1] for hidden_ND, prompt in responses]).float()

    def loaded(path: Path | str, adapter: Path | str | None, dtype: str) -> tuple[Any, LinearHead]:
        say(f"loading {path}" + (f" with {adapter}" if adapter else ""))
        model = load_causal_lm(path, adapter=adapter, dtype=TORCH_DTYPES[dtype]).model.requires_grad_(False)
        return model, extract_head(model, valid_vocab_size=vocab_size)

    with torch.no_grad():
        model, student_head = loaded(recipe.student.path, None, recipe.student.dtype)
        say("answering")
        answers = {
            name: write_answers(model, texts, recipe, stops, seed + index)
            for index, (name, texts) in enumerate(prompts.items())
        }
        student = {name: hidden_rows(model, name) for name in prompts}
        rows = {}
        for teacher_id, teacher in recipe.teachers.items():
            if teacher.path is None:
                raise Refusal(f"teacher {teacher_id!r} has no path; this benchmark loads the models itself")
            model, head = loaded(teacher.path, teacher.adapter, teacher.dtype)
            for name, domain in recipe.domains.items():
                if teacher_id in domain.teachers:
                    rows[f"{name}/{teacher_id}"] = Rows(student[name], student_head, hidden_rows(model, name), head)
    return rows
