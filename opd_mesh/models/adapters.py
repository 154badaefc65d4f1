"""PEFT adapters: merged into a model of their own, or many of them above one base."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd_mesh.errors import ConfigError, CorruptWeightsError, ModelNotFoundError
from opd_mesh.models.checkpoint import ADAPTER_CONFIG, check_safetensors, state_digest

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Of LoRA's configuration, what leaves the base's own weights and its embeddings alone. Other fields, those of later
# versions of PEFT too, must be as PEFT has them by default.
_HARMLESS = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
        "use_rslora", "use_dora", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
        "init_lora_weights", "runtime_config", "ensure_weight_tying",
    }
)  # fmt: skip
# Others (PiSSA, OLoRA, CorDA, LoftQ, …) take something out of the base's weights.
_INITS = (True, False, "gaussian", "orthogonal")
# PEFT puts it before the names of the model it wraps.
_PREFIX = "base_model.model."


def read_adapter(folder: Path) -> tuple[Any, set[str]]:
    """(PEFT's configuration, names of the tensors stored) of an adapter folder.

    Raises:
        ModelNotFoundError, ConfigError, CorruptWeightsError: naming the file.
    """
    from peft import PeftConfig

    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelNotFoundError(
            f"adapter folder {folder} holds no {ADAPTER_CONFIG}; give the folder PEFT's save wrote"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelNotFoundError(f"adapter folder {folder} holds no {ADAPTER_WEIGHTS}; pickles are never loaded")
    stored = check_safetensors(folder / ADAPTER_WEIGHTS)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}/{ADAPTER_CONFIG} cannot be used: {error}") from error
    if config.is_prompt_learning:
        raise ConfigError(f"{folder}: a {config.peft_type} adapter has no weights to merge; train a LoRA adapter")
    config.inference_mode = True
    return config, stored


def _inject(model: Any, peft_model: Any, folder: Path, name: str) -> Any:
    """Put an adapter into a model, as ``name``; the first one makes the PEFT model. Nothing is left to chance."""
    from peft import PeftModel, get_peft_model_state_dict

    config, stored = read_adapter(folder)
    with warnings.catch_warnings():
        # PEFT warns that ties make merging hard; _untie and _retie below are the answer.
        warnings.filterwarnings("ignore", message=".*(tie_word_embeddings|no longer tied|missing adapter keys).*")
        try:
            if peft_model is None:
                peft_model = PeftModel(model, config, adapter_name=name)
            else:
                peft_model.add_adapter(name, config)
            # PEFT reports a missing LoRA factor, but dies of a missing modules_to_save.
            wanted = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
            if missing := wanted.keys() - stored:
                raise CorruptWeightsError(
                    f"{folder}: {min(missing)} is missing from the adapter; it is of another model, or copied in part"
                )
            device = next(model.parameters()).device
            unused = peft_model.load_adapter(str(folder), name, torch_device=str(device)).unexpected_keys
        except RuntimeError as error:  # load_state_dict: size mismatch, with both shapes
            raise CorruptWeightsError(f"{folder}: the adapter does not fit the base model: {error}") from error
        except ValueError as error:  # target modules that the model does not have
            raise ConfigError(f"{folder}: the adapter does not fit the base model: {error}") from error
    if unused:
        raise CorruptWeightsError(f"{folder}: {min(unused)} has no place in the base model; it is of another model")
    return peft_model


# --- many above one base ---------------------------------------------------------------------------------------
def reason_not_to_share(model: Any, folder: Path) -> str | None:
    """Why an adapter cannot stand above a base that others use, or None.

    LoRA factors of linear layers within the trunk can. What changes the head or an embedding, or replaces a module,
    makes a model of its own.

    Raises:
        ModelNotFoundError, ConfigError, CorruptWeightsError: as :func:`read_adapter`.
    """
    from peft import LoraConfig

    config, stored = read_adapter(folder)
    if type(config) is not LoraConfig:
        return f"it is {config.peft_type}, not LoRA"
    plain = LoraConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _HARMLESS and value != getattr(plain, field.name) and value not in (None, False, [], {}):
            return f"it has {field.name}: {value!r}"
    if config.init_lora_weights not in _INITS:
        return f"it was begun by {config.init_lora_weights!r}, which changes its base"
    outer = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    for key in sorted(stored):
        path, factor, _ = key.removeprefix(_PREFIX).partition(".lora_")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            return f"it holds {key}"  # such as a copy of an embedding; or it is of another model, which merging tells
        if not factor or id(module) in outer or not isinstance(module, nn.Linear | _conv1d()):
            return f"it changes {path}"
    return None


def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    return Conv1D


@dataclass(frozen=True, slots=True)
class InjectedAdapter:
    """One of a shared base.

    Attributes:
        tensors: its parameters by name, without its own name in them.
        digest: over tensors and scalings, whatever its folder is called.
    """

    peft_name: str
    tensors: Mapping[str, Tensor]
    digest: str


_UNKNOWN = "?"


class SharedBase:
    """A model with LoRA adapters of which at most one is active. Not for two threads at once."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._peft: Any = None
        self._active: str | None = None
        self._count = 0

    def add(self, folder: Path) -> InjectedAdapter:
        """Load an adapter; it is not active yet.

        Raises:
            ModelNotFoundError, ConfigError, CorruptWeightsError: the adapter cannot be used with this base.
        """
        from peft.tuners.lora import LoraLayer

        name = f"adapter{self._count}"  # a teacher's id may hold a dot, a module's name may not
        self._count += 1
        self._peft = _inject(self._model, self._peft, folder, name)
        self._model.eval().requires_grad_(False)
        part = f".{name}."
        tensors = {
            key.replace(part, "."): tensor for key, tensor in self._model.named_parameters() if part in f"{key}."
        }
        for key, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise CorruptWeightsError(f"{folder}: {key} holds NaN or infinity; load an earlier checkpoint")
        scaling = {
            key: module.scaling[name]
            for key, module in self._model.named_modules()
            if isinstance(module, LoraLayer) and name in module.scaling
        }
        text = json.dumps([state_digest(tensors.items()), scaling], sort_keys=True)
        self._active = _UNKNOWN
        self.activate(None)
        return InjectedAdapter(name, tensors, hashlib.sha256(text.encode()).hexdigest())

    def activate(self, adapter: InjectedAdapter | None) -> None:
        """From now on the model computes with this adapter, or with none."""
        name = None if adapter is None else adapter.peft_name
        if name == self._active:
            return
        tuner = self._peft.base_model
        was, self._active = self._active, _UNKNOWN  # whatever is raised below, nothing is taken for granted then
        if name is None:
            tuner.disable_adapter_layers()
        else:
            if was in (None, _UNKNOWN):
                tuner.enable_adapter_layers()
            tuner.set_adapter(name, inference_mode=True)
        self._active = name

    def remove(self, adapter: InjectedAdapter) -> None:
        """Take it out again."""
        self.activate(None)
        self._peft.delete_adapter(adapter.peft_name)


# --- merged ----------------------------------------------------------------------------------------------------
def merge_adapter(model: Any, folder: Path) -> Any:
    """Merge a PEFT adapter; the result computes what the unmerged model computes.

    Raises:
        ModelNotFoundError, ConfigError, CorruptWeightsError: naming the file.
    """
    was_tied = _is_tied(model)
    peft_model = _inject(model, None, folder, "default")
    if was_tied:
        _untie(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tie_word_embeddings|no longer tied).*")
        merged = peft_model.merge_and_unload()
    if was_tied:
        _retie(merged)
    return merged


def _innermost(module: Any) -> Any:
    """The layer under PEFT's wrappers, whose weight a merge changes in place."""
    while True:
        inner = getattr(module, "base_layer", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def _untie(model: Any) -> None:
    """Give the head its own copy of the tied weight: a delta for one of the two must not change the other.

    Merging in place would put a LoRA delta of the head into the embedding as well, and with ``ensure_weight_tying``
    would add it twice. Modules in ``modules_to_save`` are replaced, not changed in place: they need nothing.
    """
    head, embedding = _innermost(model.get_output_embeddings()), _innermost(model.get_input_embeddings())
    if "weight" in head._parameters and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)


def _retie(model: Any) -> None:
    """Tie again where the adapter left head and embedding equal; otherwise say in the config that they are two."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight.shape == embedding.weight.shape and torch.equal(head.weight, embedding.weight)
    if tied:
        head.weight = embedding.weight
    model.config.get_text_config().tie_word_embeddings = tied
    model.config.tie_word_embeddings = tied
