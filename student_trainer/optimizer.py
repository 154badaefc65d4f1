"""AdamW with warm-up, schedule and clipping, and a state that is tensors and numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from opd_mesh.config.recipe import OptimizerConfig
from opd_mesh.errors import CorruptWeightsError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Of optimizer step ``step`` (0 is the first): linear warm-up, then the schedule down to ``final_lr_ratio``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    progress = min(1.0, progress)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * left)


class Optimizer:
    """AdamW over named parameters; matrices decay, vectors (norms, biases) do not."""

    def __init__(
        self, config: OptimizerConfig, parameters: Sequence[tuple[str, nn.Parameter]], *, total_steps: int
    ) -> None:
        self._config = config
        self._named = list(parameters)
        self._total_steps = total_steps
        self.steps_done = 0
        groups = [
            {"params": [p for _, p in self._named if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for _, p in self._named if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps
        )

    def zero_grad(self) -> None:
        """Forget gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def clip(self) -> float:
        """Clip by global norm; returns the norm before."""
        parameters = [parameter for _, parameter in self._named]
        return float(torch.nn.utils.clip_grad_norm_(parameters, self._config.max_grad_norm))

    def step(self) -> float:
        """Apply the gradients; returns the learning rate used."""
        lr = learning_rate(self._config, self.steps_done, self._total_steps)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self.steps_done += 1
        return lr

    def state_tensors(self) -> dict[str, Tensor]:
        """``<moment>.<parameter>`` → tensor, for safetensors."""
        state = {}
        for name, parameter in self._named:
            for moment in _MOMENTS:
                if parameter in self._adamw.state:
                    state[f"{moment}.{name}"] = self._adamw.state[parameter][moment]
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor], steps_done: int) -> None:
        """The inverse of :meth:`state_tensors`.

        A parameter without any moment had no gradient so far (an expert that no token was routed to).

        Raises:
            CorruptWeightsError: a moment is missing, is of another shape, or belongs to no parameter.
        """
        self.steps_done = steps_done
        if steps_done == 0:
            return
        if self._named and not state:
            raise CorruptWeightsError(f"the optimizer state is empty after {steps_done} steps")
        strangers = state.keys() - {f"{moment}.{name}" for name, _ in self._named for moment in _MOMENTS}
        if strangers:
            raise CorruptWeightsError(f"the optimizer state has {min(strangers)}; it belongs to another student")
        for name, parameter in self._named:
            moments = {moment: state[f"{moment}.{name}"] for moment in _MOMENTS if f"{moment}.{name}" in state}
            missing = [moment for moment in _MOMENTS if moment not in moments]
            if len(missing) == len(_MOMENTS):
                continue
            if missing:
                raise CorruptWeightsError(f"the optimizer state has no {missing[0]}.{name}; it is not whole")
            for moment, value in moments.items():
                if value.shape != (parameter.shape if moment != "step" else ()):
                    raise CorruptWeightsError(f"optimizer state {moment}.{name} has shape {tuple(value.shape)}")
            self._adamw.state[parameter] = {
                key: value.clone() if key == "step" else value.clone().to(parameter.device)
                for key, value in moments.items()
            }
