"""Responses drawn from a teacher through its scoring service are those of plain sequential decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mesh import serving_teachers, teacher_config, tiny_recipe
from tiny_models import save_tiny_checkpoint, tiny_tokenizer

from opd_mesh.models.checkpoint import load_causal_lm
from opd_mesh.models.tokenizer import tokenizer_fingerprint
from opd_mesh.sampling import sample_tokens
from opd_mesh.trajectory import FinishReason, SamplingParams, Trajectory
from student_trainer.evaluation import sample_from_teacher
from student_trainer.heads import HeadStore
from student_trainer.teachers import Teachers


def decoded_one_by_one(model: object, prompt: list[int], sampling: SamplingParams) -> list[int]:
    """The reference: one forward pass per token."""
    tokens: list[int] = []
    while len(tokens) < sampling.max_new_tokens:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[:, -1]  # type: ignore[operator]
        token = int(sample_tokens(logits, [sampling], [len(tokens)], logits.shape[1]).token_ids_B[0])
        tokens.append(token)
        if token in sampling.stop_token_ids:
            break
    return tokens


@pytest.mark.parametrize("signal", ["hidden_states", "logits"])
async def test_fixed_point_equals_sequential_decoding(tmp_path: Path, signal: str) -> None:
    path = save_tiny_checkpoint(tmp_path / "teacher", "llama", 1, logit_std=5.0)
    recipe = tiny_recipe(path, {"one": path}, objective={"signal": signal})
    prompts = [[1, 5, 6], [1, 9, 10, 11, 12], [1, 20], [1, 30, 31, 32]]
    drafts = [
        Trajectory(
            trajectory_id=f"d{index}",
            domain="domain_0",
            token_ids=(*prompt, 40, 41, 42),  # a draft that is wrong almost everywhere
            scored_spans=((len(prompt), len(prompt) + 3),),
            sampling=SamplingParams(
                seed=100 + index,
                temperature=1.3,
                top_p=(1.0, 0.9)[index % 2],
                max_new_tokens=14,
                stop_token_ids=(2, 60),
            ),
        )
        for index, prompt in enumerate(prompts)
    ]
    fingerprint = tokenizer_fingerprint(tiny_tokenizer().get_vocab())
    async with serving_teachers(teacher_config({"one": path})) as address:
        addressed = {"one": recipe.teachers["one"].replace(addresses=[address])}
        teachers = Teachers(recipe.replace(teachers=addressed), fingerprint)
        await teachers.connect()
        heads = HeadStore(tmp_path / "heads", "cpu")
        for name in teachers.head_digests:
            heads.add(await teachers.get_head(name))
        drawn = await sample_from_teacher(teachers, "one", heads, drafts)
        await teachers.close()
    model = load_causal_lm(path).model
    for prompt, draft, response in zip(prompts, drafts, drawn, strict=True):
        wanted = decoded_one_by_one(model, prompt, draft.sampling)
        assert response.scored_token_ids == wanted
        stopped = wanted[-1] in draft.sampling.stop_token_ids
        assert response.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
        response.validate()
