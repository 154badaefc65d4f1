"""The model that learns: loading, LoRA, hidden states with gradient, its head, its weights as a policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opd_kernels import LinearHead
from torch import Tensor, nn

from opd_mesh.config.sections import LoraConfig, StudentConfig
from opd_mesh.errors import ConfigError, PreconditionError
from opd_mesh.models.checkpoint import load_causal_lm, served_tensors
from opd_mesh.models.forward import BatchLayout, prove_layouts, sequence_hidden_states
from opd_mesh.models.heads import extract_head, prove_head
from opd_mesh.models.tokenizer import load_tokenizer, valid_vocab_size
from opd_mesh.policy_weights import LoraFactors, PolicyWeights
from opd_mesh.torch_tensors import TORCH_DTYPES, to_numpy


class Student:
    """A causal LM that is trained whole, or through a LoRA adapter.

    Args:
        seed: of the adapter's initialization.

    Raises:
        PreconditionError: hidden × head does not reproduce the model's own logits, or checkpointing of activations
            would change the model.
        ConfigError: the adapter would touch the head.
        ModelNotFoundError, CorruptWeightsError: as :func:`load_causal_lm`.
    """

    def __init__(self, config: StudentConfig, *, device: str, deterministic: bool, seed: int) -> None:
        self.config = config
        loaded = load_causal_lm(config.path, dtype=TORCH_DTYPES[config.dtype], device=device)
        self.model: Any = loaded.model
        self.tokenizer = load_tokenizer(config.path)
        self.vocab_size = valid_vocab_size(self.tokenizer)
        self.initial_digest = loaded.weights_digest
        self.model_type = loaded.model_type
        proof = prove_head(self.model, extract_head(self.model, valid_vocab_size=self.vocab_size))
        if not proof.ok:
            raise PreconditionError(
                f"the student's logits are not its hidden states times its head: {proof.reason}", field="student.path"
            )
        self.layout = BatchLayout.LONE if deterministic else prove_layouts(self.model).allowed[0]
        self._adapter: Any = None
        if config.lora is not None:
            self._adapter = _with_lora(self.model, config.lora, seed)
        else:
            self.model.requires_grad_(True)
        self.model.eval()  # no dropout: the student that learns is the student that wrote
        if config.activation_checkpointing:
            self._checkpoint_activations()
        # After LoRA: the adapter may have wrapped the head, whose live parameters the loss must reach.
        self.head: LinearHead = extract_head(self.model, valid_vocab_size=self.vocab_size)

    def _checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass. transformers does so in train mode only, which must not differ.

        Raises:
            PreconditionError: in train mode the model still draws at random.
        """
        probe = [list(range(min(32, self.vocab_size)))]
        with torch.no_grad():
            (wanted,) = sequence_hidden_states(self.model, probe, BatchLayout.LONE)
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.enable_input_require_grads()
            self.model.train()
            _switch_dropout_off(self.model)
            (found,) = sequence_hidden_states(self.model, probe, BatchLayout.LONE)
        if not torch.equal(wanted, found):
            raise PreconditionError(
                f"{self.model_type} draws at random in train mode (dropout or layer drop that cannot be switched off): "
                "set its rates to 0 in config.json, or leave activation_checkpointing out",
                field="student.activation_checkpointing",
            )

    def hidden_rows(self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[Tensor]:
        """Per sequence [R_i, d]: the last hidden states at the given positions, with gradient where it is enabled."""
        hidden = sequence_hidden_states(self.model, sequences, self.layout)
        return [
            states_Td[torch.tensor(rows, device=states_Td.device)]
            for states_Td, rows in zip(hidden, positions, strict=True)
        ]

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """What the optimizer moves, tied parameters once."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def embedding_names(self) -> frozenset[str]:
        """Of the trainable parameters that are token embeddings or the head."""
        tables = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        owned = {
            id(p) for module in self.model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
        }
        owned |= {id(parameter) for module in tables if module is not None for parameter in module.parameters()}
        return frozenset(name for name, parameter in self.trainable() if id(parameter) in owned)

    @torch.no_grad()
    def policy_tensors(self) -> list[tuple[str, Tensor]]:
        """The weights as a rollout server takes them: those of the plain model, adapter merged in."""
        if self._adapter is None:
            return list(served_tensors(self.model))
        return _merged(self.model)

    def policy_weights(self) -> PolicyWeights:
        """What a rollout server has to be given: the adapter's factors where that is all that changes, else all
        weights. They share the memory of the weights themselves where these lie in this machine's memory."""
        lora = self._lora_factors()
        if lora is None:
            return self.merged_weights()
        factors, scaling, transposed = lora
        return PolicyWeights.of(factors, LoraFactors(self.initial_digest, scaling, transposed))

    def merged_weights(self) -> PolicyWeights:
        """All weights of the plain model, adapter merged in."""
        return PolicyWeights.of({name: to_numpy(tensor) for name, tensor in self.policy_tensors()})

    def _lora_factors(self) -> tuple[dict[str, np.ndarray], dict[str, float], frozenset[str]] | None:
        """(factors by the names of :class:`LoraFactors`, scaling and transposed modules); None: there is more to the
        student's change than low-rank products on linear layers."""
        if self._adapter is None:
            return None
        from peft.tuners.lora import LoraLayer

        factors: dict[str, np.ndarray] = {}
        scaling: dict[str, float] = {}
        transposed = set()
        for name, module in self.model.named_modules():
            if not isinstance(module, LoraLayer):
                continue
            (adapter,) = module.active_adapters
            if adapter not in module.lora_A or any(module.use_dora.values()):
                return None  # an embedding, or DoRA
            for letter, layers in (("A", module.lora_A), ("B", module.lora_B)):
                weight: Any = layers[adapter].weight
                factors[f"{name}.lora_{letter}"] = to_numpy(weight)
            scaling[name] = float(module.scaling[adapter])
            if getattr(module, "fan_in_fan_out", False):
                transposed.add(name)
        trained = sum(parameter.numel() for _, parameter in self.trainable())
        return (factors, scaling, frozenset(transposed)) if trained == sum(f.size for f in factors.values()) else None

    def save(self, folder: Path) -> None:
        """A Hugging Face checkpoint, or a PEFT adapter where the student is LoRA, with the tokenizer."""
        (self._adapter or self.model).save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))


def _with_lora(model: Any, config: LoraConfig, seed: int) -> Any:
    import peft

    torch.manual_seed(seed)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, settings)  # puts the adapter's layers into `model` itself
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if _is_adapted(head) or (tied and _is_adapted(embedding)):
        raise ConfigError(
            "an adapter on the head, or on an embedding that is tied to it, cannot be folded into the policy: take "
            "lm_head and the token embedding out of target_modules",
            field="student.lora.target_modules",
        )
    return adapted


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def _switch_dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _merged(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The plain model's tensors: LoRA layers folded into their base, adapter parameters left out."""
    from peft.tuners.lora import LoraLayer  # its subclasses have get_delta_weight

    deltas: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                deltas[f"{name}.weight"] = module.get_delta_weight(adapter)  # type: ignore[attr-defined]
    tensors = []
    for name, tensor in served_tensors(model):
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        tensors.append((plain, tensor + deltas[plain] if plain in deltas else tensor))
    return tensors
