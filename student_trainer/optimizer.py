"""AdamW or Muon with warm-up, schedule and clipping, and a state that is tensors and numbers alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from opd_mesh.config.training import MuonConfig, OptimizerConfig, ScheduledOptimizerConfig
from opd_mesh.errors import CorruptWeightsError

# What each optimizer keeps of a parameter.
ADAMW_STATE: tuple[str, ...] = ("exp_avg", "exp_avg_sq", "step")
MUON_STATE: tuple[str, ...] = ("momentum_buffer",)


def learning_rate(config: ScheduledOptimizerConfig, step: int, total_steps: int) -> float:
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
    """One rate for all named parameters; matrices decay, vectors (norms, biases) do not.

    With Muon the hidden matrices are orthogonalized, everything else goes by AdamW. Adapters of LoRA are matrices.

    Args:
        embeddings: names of token embeddings and of the head: matrices whose rows are looked up one by one, which
            Muon is not for.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        total_steps: int,
        embeddings: Collection[str] = (),
    ) -> None:
        self._config = config
        self._named = list(parameters)
        self._total_steps = total_steps
        self.steps_done = 0
        by_muon = {n for n, p in self._named if p.ndim == 2 and n not in embeddings and isinstance(config, MuonConfig)}
        self._state_keys = {name: MUON_STATE if name in by_muon else ADAMW_STATE for name, _ in self._named}
        self._optimizers: list[torch.optim.Optimizer] = []
        if by_adamw := [p for name, p in self._named if name not in by_muon]:
            self._optimizers.append(_adamw(config, by_adamw))
        if by_muon and isinstance(config, MuonConfig):
            self._optimizers.append(_muon(config, [p for name, p in self._named if name in by_muon]))
        self._owner = {
            parameter: optimizer
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def zero_grad(self) -> None:
        """Forget gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def clip(self) -> float:
        """Clip by global norm; returns the norm before."""
        parameters = [parameter for _, parameter in self._named]
        return float(torch.nn.utils.clip_grad_norm_(parameters, self._config.max_grad_norm))

    def step(self) -> float:
        """Apply the gradients; returns the learning rate used."""
        lr = learning_rate(self._config, self.steps_done, self._total_steps)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.zero_grad()
        self.steps_done += 1
        return lr

    def state_tensors(self) -> dict[str, Tensor]:
        """``<what is kept>.<parameter>`` → tensor, for safetensors."""
        state: dict[str, Tensor] = {}
        for name, parameter in self._named:
            if kept := self._owner[parameter].state.get(parameter):
                state |= {f"{key}.{name}": kept[key] for key in self._state_keys[name]}
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor], steps_done: int) -> None:
        """The inverse of :meth:`state_tensors`.

        A parameter without any had no gradient so far (an expert that no token was routed to).

        Raises:
            CorruptWeightsError: a tensor is missing, is of another shape, or belongs to no parameter.
        """
        self.steps_done = steps_done
        if steps_done == 0:
            return
        if self._named and not state:
            raise CorruptWeightsError(f"the optimizer state is empty after {steps_done} steps")
        strangers = state.keys() - {f"{key}.{name}" for name, keys in self._state_keys.items() for key in keys}
        if strangers:
            raise CorruptWeightsError(
                f"the optimizer state has {min(strangers)}; it belongs to another student, or another optimizer.name"
            )
        for name, parameter in self._named:
            keys = self._state_keys[name]
            kept = {key: state[f"{key}.{name}"] for key in keys if f"{key}.{name}" in state}
            missing = [key for key in keys if key not in kept]
            if len(missing) == len(keys):
                continue
            if missing:
                raise CorruptWeightsError(f"the optimizer state has no {missing[0]}.{name}; it is not whole")
            for key, value in kept.items():
                if value.shape != (parameter.shape if key != "step" else ()):
                    raise CorruptWeightsError(f"optimizer state {key}.{name} has shape {tuple(value.shape)}")
            self._owner[parameter].state[parameter] = {
                key: value.clone().to(parameter.device) for key, value in kept.items()
            }


def _adamw(config: ScheduledOptimizerConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,  # one pass over memory instead of a dozen
    )


def _muon(config: MuonConfig, matrices: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(
        matrices,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        adjust_lr_fn="match_rms_adamw",
    )
