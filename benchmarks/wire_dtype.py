"""What a narrower dtype on the wire costs in KL, on the held-out responses of a finished run.

The marks of a run are kept as they came (float32 in the demo). Here they are rounded as a narrower wire would round
them, and the per-token reverse KL of the run's own student is computed again, with the same heads.

    python benchmarks/wire_dtype.py runs/smollm2-…     # one JSON object on stdout
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def parse_arguments() -> argparse.Namespace:
    """Before torch is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    return parser.parse_args()


def main() -> None:
    """Print the figures, by dtype: mean and largest |change| of a token's KL, in nats."""
    run_dir = parse_arguments().run_dir

    import torch

    from opd_mesh.config.base import load_config
    from opd_mesh.config.recipe import Recipe
    from opd_mesh.torch_tensors import TORCH_DTYPES, from_numpy, to_numpy
    from student_trainer.batch import HeldAnswer, Mark, Sample, plan_batch
    from student_trainer.distillation import reverse_kl_measure
    from student_trainer.evaluation import SET_NAMES, HeldoutSets
    from student_trainer.heads import HeadStore
    from student_trainer.shares import shares_of
    from student_trainer.student import Student

    recipe = load_config(Recipe, run_dir / "recipe.yaml")
    student = Student(
        recipe.student.replace(path=run_dir / "student"), device="cpu", deterministic=False, seed=recipe.run.seed
    )
    measure = reverse_kl_measure(recipe.objective.implementation)
    sets, heads = HeldoutSets(run_dir / "heldout"), HeadStore(run_dir / "heads", "cpu")
    samples = [sample for domain in recipe.domains for name in SET_NAMES for sample in sets.get(domain, name) or []]

    @torch.no_grad()
    def token_kls(sample: Sample) -> torch.Tensor:
        (rows,) = student.hidden_rows([sample.trajectory.token_ids], [sample.trajectory.predicting_positions])
        total = torch.zeros(len(rows), dtype=torch.float64)
        plan = plan_batch([sample], tokens_per_pass=1, heads_together=1)
        for visit in plan.visits:
            for share in shares_of([sample], plan.shares(visit), heads, rows.device):
                found = measure(
                    rows,
                    student.head,
                    share.teachers,
                    reference=None,
                    sampled_ids_R=share.sampled_ids_R,
                    token_weights_NR=share.weights_NR,
                )
                total += (share.weights_NR * found.kl_T.double()).sum(0)
                del share  # its heads leave before the next ones arrive
        return total

    def rounded(sample: Sample, dtype: str) -> Sample:
        def narrowed(mark: Mark) -> Mark:
            said = {
                name: to_numpy(from_numpy(array).to(TORCH_DTYPES[dtype]).float())
                for name, array in mark.answer.tensors().items()
            }
            return replace(mark, answer=HeldAnswer(said))

        return Sample(sample.trajectory, tuple(narrowed(mark) for mark in sample.marks))

    exact = torch.cat([token_kls(sample) for sample in samples])
    result: dict[str, float | int] = {"tokens": exact.numel(), "kl_float32": float(exact.mean())}
    for dtype in ("bfloat16", "float16"):
        narrow = torch.cat([token_kls(rounded(sample, dtype)) for sample in samples])
        result[f"kl_{dtype}"] = float(narrow.mean())
        result[f"mean_change_{dtype}"] = float((narrow - exact).abs().mean())
        result[f"largest_change_{dtype}"] = float((narrow - exact).abs().max())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
