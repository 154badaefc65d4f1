"""What a checkpoint's files say before TensorRT-LLM loads them: digest, quantization, sizes, the head."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from opd_kernels import LinearHead
from safetensors import safe_open
from torch import Tensor

from opd_mesh.errors import ConfigError, CorruptWeightsError
from opd_mesh.models.checkpoint import check_safetensors, skeleton, state_digest, weight_files
from opd_mesh.models.heads import extract_head
from opd_mesh.models.mapped import FileIdentity, check_unchanged

HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONFIG_FILE = "config.json"
# ModelOpt writes its own file, other tools a section of config.json; TensorRT-LLM reads both by itself.
QUANT_FILE, QUANT_SECTION = "hf_quant_config.json", "quantization_config"


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """A folder, read without a model.

    Attributes:
        digest: :func:`opd_mesh.models.checkpoint.state_digest` over the tensors as the files hold them: quantized ones
            with their scales, and before any cast.
        num_bytes: of the safetensors files.
        architecture: the first of ``architectures``, by which TensorRT-LLM finds its model class; "" if none is named.
        quantization: the algorithm's name, such as "FP8"; "" for weights that are not quantized.
        identities: of the weights' and the configuration's files, from before they were read.
    """

    folder: Path
    files: tuple[Path, ...]
    digest: str
    num_bytes: int
    model_type: str
    architecture: str
    hidden_size: int
    vocab_size: int  # padding included
    quantization: str
    config: Mapping[str, Any]  # of the language model
    identities: Mapping[Path, FileIdentity]

    @classmethod
    def read(cls, folder: Path) -> CheckpointFacts:
        """Raises :class:`ModelNotFoundError`, :class:`CorruptWeightsError`, :class:`ConfigError`."""
        files = tuple(weight_files(folder))
        configs = [file for name in (CONFIG_FILE, QUANT_FILE) if (file := folder / name).is_file()]
        identities = {file: FileIdentity.of(file) for file in (*files, *configs)}
        whole = _json(folder / CONFIG_FILE)
        config = whole.get("text_config", whole)
        try:
            digest = state_digest(_tensors(files))
        except ValueError as error:
            raise CorruptWeightsError(f"{folder}: two safetensors files hold the same tensor: {error}") from error
        facts = cls(
            folder=folder,
            files=files,
            digest=digest,
            num_bytes=sum(identities[file].size for file in files),
            model_type=str(whole.get("model_type", "")),
            architecture=next(iter(whole.get("architectures") or ()), ""),
            hidden_size=int(_first(config, "hidden_size", "n_embd", folder=folder)),
            vocab_size=int(_first(config, "vocab_size", folder=folder)),
            quantization=_quantization(folder, whole),
            config=config,
            identities=identities,
        )
        facts.check()  # what was read belongs to these identities only if nothing was replaced meanwhile
        return facts

    def check(self) -> None:
        """Raises :class:`CorruptWeightsError` where a file is gone, or another one than before it was read."""
        check_unchanged(self.identities, since="it was first read")

    def kv_bytes_per_token(self, width: int) -> int:
        """Of the KV cache over all layers, for elements of ``width`` bytes; more than it takes where windows bound it.

        Raises:
            ConfigError: config.json names no layers or heads.
        """
        layers = int(_first(self.config, "num_hidden_layers", "n_layer", folder=self.folder))
        if latent := self.config.get("kv_lora_rank"):  # multi-head latent attention caches one vector for all heads
            return layers * (int(latent) + int(self.config.get("qk_rope_head_dim", 0))) * width
        heads = int(_first(self.config, "num_attention_heads", "n_head", folder=self.folder))
        head_dim = int(self.config.get("head_dim") or self.hidden_size // heads)
        return 2 * layers * int(self.config.get("num_key_value_heads") or heads) * head_dim * width

    def head(self, *, vocab_size: int, dtype: torch.dtype) -> LinearHead:
        """The head as TensorRT-LLM computes it: its form by the architecture, its weights from the files, cast.

        Raises:
            ConfigError: transformers does not know the architecture, the files hold the head under no name that it
                knows, or quantized.
        """
        model = skeleton(self.folder)
        form = extract_head(model, valid_vocab_size=vocab_size)
        # A tied head is stored as the embedding.
        names = {id(form.weight): "weight", id(form.bias): "bias"}
        stored: dict[str, Tensor] = {}
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(str(file), framework="pt")) for file in self.files]
            places = {name: file for file in files for name in file.keys()}  # noqa: SIM118  not a mapping
            for name, parameter in model.named_parameters(remove_duplicate=False):
                if id(parameter) in names and name in places:
                    stored[names[id(parameter)]] = places[name].get_tensor(name)
        for part, expected in (("weight", form.weight), ("bias", form.bias)):
            if expected is None:
                continue
            found = stored.get(part)
            if found is None:
                raise ConfigError(f"{self.folder}: the files do not hold the head's {part} under its usual name")
            if found.dtype not in HEAD_DTYPES or found.shape != expected.shape:
                raise ConfigError(
                    f"{self.folder}: the head's {part} is {found.dtype} {list(found.shape)}, expected a floating-point "
                    f"one of shape {list(expected.shape)}; is the head quantized?"
                )
        bias = None if form.bias is None else stored["bias"].to(dtype)
        return replace(form, weight=stored["weight"].to(dtype), bias=bias)


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Mapped, so that a digest reads a checkpoint larger than the memory."""
    for file in files:
        check_safetensors(file)
        with safe_open(str(file), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  not a mapping
                yield name, handle.get_tensor(name)


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}; copy the checkpoint again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} must hold an object")
    return value


def _first(config: Mapping[str, Any], *names: str, folder: Path) -> Any:
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise ConfigError(f"{folder}/config.json names no {names[0]}; is it a causal language model?")


def _quantization(folder: Path, config: Mapping[str, Any]) -> str:
    section = dict(config.get(QUANT_SECTION) or {})
    if (folder / QUANT_FILE).is_file():
        section |= _json(folder / QUANT_FILE).get("quantization") or {}
    return str(section.get("quant_algo") or section.get("quant_method") or "")
