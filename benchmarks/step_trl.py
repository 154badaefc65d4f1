"""TRL's side of ``benchmarks/step.py``: a process that does steps of ``DistillationTrainer`` when told.

Commands come as lines of JSON on stdin, answers go as lines of JSON to stdout. ``{"do": "loss", …}`` computes loss and
gradient norm on a batch that is given; ``{"do": "steps", "count": n}`` does n whole steps and answers with their time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


class Stopwatch:
    """Seconds by phase of the step in progress; one phase inside another is taken out of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    def wrap(self, owner: Any, name: str, phase: str | Callable[..., str]) -> None:
        """Time every call of ``owner.name``."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            key = phase if isinstance(phase, str) else phase(*args)
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - started
                self.seconds[key] = self.seconds.get(key, 0.0) + elapsed - self._inner.pop()
                if self._inner:
                    self._inner[-1] += elapsed

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """What there is, and begin again."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def serve(settings: dict[str, Any], answers: Any) -> None:
    """Set TRL up, then train under command."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    torch.set_num_threads(settings["threads"])
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": len(settings["prompts"]),
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "beta": 1.0,
        "temperature": 1.0,
        "max_completion_length": settings["new_tokens"],
        "generation_kwargs": {"use_cache": True},
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_steps": 100_000,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    tokenizer = AutoTokenizer.from_pretrained(settings["student"], padding_side="left")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(settings[name], dtype=torch.float32) for name in ("student", "teacher")
    )
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in settings["prompts"]])
    drawn = 0
    watch = Stopwatch()

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    class Commands(TrainerCallback):
        """Waits before every step that was not asked for yet."""

        def __init__(self) -> None:
            self.wanted = 0
            self.started = 0.0
            self.steps: list[dict[str, float]] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.obey()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            nonlocal drawn
            seconds = {f"seconds/{name}": value for name, value in watch.take().items()}
            self.steps.append(seconds | {"tokens": drawn})
            drawn = 0
            if len(self.steps) == self.wanted:
                elapsed = time.monotonic() - self.started
                tokens = sum(int(step["tokens"]) for step in self.steps)
                answer({"seconds": elapsed, "tokens": tokens, "steps": self.steps})
                self.obey()

        def obey(self) -> None:
            for line in sys.stdin:
                command = json.loads(line)
                if command["do"] == "loss":
                    answer(batch_loss(command["prompts"], command["completions"]))
                else:
                    self.wanted, self.steps, self.started = command["count"], [], time.monotonic()
                    return
            os._exit(0)  # whoever gave the commands is gone

    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(output_dir=settings["output_dir"], **chosen),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[Commands()],
    )

    def batch_loss(prompts: list[list[int]], completions: list[list[int]]) -> dict[str, float]:
        width = max(map(len, prompts))
        pad = tokenizer.pad_token_id
        batch = {
            "prompt_ids": torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts]),
            "prompt_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
            "completion_ids": torch.tensor(completions),
            "completion_mask": torch.ones(len(completions), settings["new_tokens"], dtype=torch.long),
            "num_items_in_batch": torch.tensor(len(completions) * settings["new_tokens"]),
        }
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])
        trainer.model.zero_grad()
        watch.take()
        return {"loss": float(loss.detach()), "grad_norm": float(norm)}

    generate = trainer._generate_single_turn

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal drawn
        completions = generate(*args, **kwargs)
        drawn += sum(map(len, completions))
        return completions

    trainer._generate_single_turn = counted
    watch.wrap(trainer, "_generate_single_turn", "generate")
    watch.wrap(
        trainer,
        "_get_last_hidden_state",
        lambda model, *_: "teacher" if model is trainer.teacher_model else "student_forward",
    )
    watch.wrap(trainer, "compute_loss", "loss")
    watch.wrap(trainer.accelerator, "backward", "backward")
    watch.wrap(trainer.accelerator, "clip_grad_norm_", "clip")
    create_optimizer = trainer.create_optimizer

    def create_and_wrap(*args: Any, **kwargs: Any) -> Any:
        optimizer = create_optimizer(*args, **kwargs)
        watch.wrap(optimizer, "step", "optimizer")
        return optimizer

    trainer.create_optimizer = create_and_wrap
    rendered = tokenizer.apply_chat_template(
        [row["prompt"] for row in dataset], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    facts = {
        "trainer": "trl.DistillationTrainer",
        "dtype": "float32",
        "attention": student.config._attn_implementation,
        "on_policy_fraction": 1.0,
        "loss": "trl.kernels.ChunkedDivergenceFunction (the only one it has; Liger's kernels are Triton, for GPUs)",
        "max_grad_norm": trainer.args.max_grad_norm,
    }
    answer(chosen | facts | {"prompt_ids": rendered["input_ids"]})
    trainer.train()


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    serve(json.loads(sys.argv[1]), pipe)
