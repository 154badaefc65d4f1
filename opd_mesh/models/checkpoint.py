"""Loading a causal language model so that what is served is what was saved, or an error that says what is wrong.

transformers fills a missing or misshapen weight with random numbers and logs a table; a teacher must not. Nothing here
reaches the network, runs code from a checkpoint, or reads a pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd_mesh.errors import ConfigError, CorruptWeightsError, ModelNotFoundError

_LOG = logging.getLogger(__name__)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
_FINITE_CHUNK = 1 << 24  # elements checked at a time, so that the mask of a large embedding stays small


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode.

    Attributes:
        weights_digest: :func:`state_digest` over :func:`served_tensors`, after a merge, in the dtype loaded.
    """

    model: Any
    path: Path
    weights_digest: str
    model_type: str


def load_causal_lm(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    expected_digest: str | None = None,
    attn_implementation: str | None = None,
) -> LoadedModel:
    """Load a Hugging Face folder with safetensors, optionally with a PEFT adapter merged into it.

    Args:
        dtype: what the weights are cast to; an architecture may keep some in float32.
        expected_digest: ``weights_digest`` that the result must have.

    Raises:
        ModelNotFoundError: no folder, no config.json, or no safetensors there.
        ConfigError: transformers does not know the architecture, or the adapter cannot be merged.
        CorruptWeightsError: a file is truncated, a tensor missing, misshapen or not finite, or the digest another.
    """
    folder = Path(path)
    weight_files(folder)
    model = _load_base(folder, dtype, attn_implementation)
    if adapter is not None:
        from opd_mesh.models.adapters import merge_adapter

        model = merge_adapter(model, Path(adapter))
    model.to(device).eval()
    _check_finite(model, f"{folder}" + (f" with adapter {adapter}" if adapter else "") + f" as {dtype}")
    weights_digest = state_digest(served_tensors(model))
    check_digest(folder, weights_digest, expected_digest)
    return LoadedModel(model, folder, weights_digest, model.config.model_type)


def check_digest(folder: Path, digest: str, expected: str | None) -> None:
    """Raises :class:`CorruptWeightsError` where another digest was expected."""
    if expected is not None and digest != expected:
        raise CorruptWeightsError(
            f"{folder}: weights have digest {digest}, expected {expected}; this is another checkpoint, another "
            "adapter, or another dtype than the one that was recorded"
        )


# --- digests ---------------------------------------------------------------------------------------------------
def served_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers (DeepSeek-V4 routes by them), tied ones once, under their first name."""
    yield from model.named_parameters(remove_duplicate=True)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=True):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The row-major little-endian bytes; no copy for a contiguous tensor in CPU memory."""
    if sys.byteorder != "little":
        raise NotImplementedError("digests are over little-endian bytes, and this machine is big-endian")
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def state_digest(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) over (name, dtype, shape, bytes) of the tensors, sorted by name.

    Per tensor: ``len(header) as 8 bytes little-endian ‖ header ‖ bytes``, where header is the JSON ``[name, dtype,
    shape]`` with dtype as torch prints it without the prefix (``"bfloat16"``). The order they come in does not matter.

    Raises:
        ValueError: a name occurs twice.
    """
    tensors = sorted(named_tensors, key=lambda item: item[0])
    digest = hashlib.sha256()
    previous = None
    for name, tensor in tensors:
        if name == previous:
            raise ValueError(f"tensor name {name!r} occurs twice")
        previous = name
        header = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode()
        digest.update(len(header).to_bytes(8, "little"))
        digest.update(header)
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


# --- files -----------------------------------------------------------------------------------------------------
def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, opened and found whole.

    Raises:
        ModelNotFoundError, CorruptWeightsError: as :func:`load_causal_lm`.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"model folder {folder} does not exist; give the folder of a local Hugging Face checkpoint"
        )
    if (folder / ADAPTER_CONFIG).exists():
        # transformers would load the base model named inside, from wherever that is.
        raise ModelNotFoundError(
            f"{folder} is a PEFT adapter; give its base model as the path, and this folder as the adapter"
        )
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{folder} holds no config.json; give the folder that save_pretrained wrote")
    if (folder / _WEIGHTS).is_file():
        files = [folder / _WEIGHTS]
    elif (folder / _INDEX).is_file():
        files = _shards(folder)
    else:
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        raise ModelNotFoundError(
            f"{folder} holds neither {_WEIGHTS} nor {_INDEX}"
            + (f"; {pickles[0]} is a pickle, which is never loaded" if pickles else "")
            + "; write the weights with save_pretrained(safe_serialization=True)"
        )
    for file in files:
        check_safetensors(file)
    return files


def _shards(folder: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptWeightsError(f"{folder / _INDEX} is not a safetensors index: {error!r}; copy it again") from error
    for name in names:
        if not (folder / name).is_file():
            raise CorruptWeightsError(
                f"{folder / name} is named in {_INDEX} but missing; copy the whole checkpoint again"
            )
    return [folder / name for name in names]


def check_safetensors(file: Path) -> set[str]:
    """The names inside; raises :class:`CorruptWeightsError`.

    Opening checks the header, and that its offsets cover exactly the bytes that are there.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as handle:
            return set(handle.keys())
    except (SafetensorError, OSError) as error:
        raise CorruptWeightsError(
            f"{file} ({file.stat().st_size} bytes) is truncated or not safetensors: {error}; copy it again"
        ) from error


# --- the base model --------------------------------------------------------------------------------------------
_OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def skeleton(folder: Path) -> Any:
    """The model without weights (on the meta device), to be looked at.

    Raises:
        ModelNotFoundError, CorruptWeightsError, ConfigError: as :func:`load_causal_lm`.
    """
    from transformers import AutoModelForCausalLM

    weight_files(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(folder))


def _config(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), **_OFFLINE)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise ConfigError(
                f"{folder}: model_type {config.model_type!r} has no causal language model in transformers"
            )
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ConfigError(f"{folder}/config.json cannot be used (remote code is never run): {error}") from error
    return config


def _load_base(folder: Path, dtype: torch.dtype, attn_implementation: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    config = _config(folder)
    offline = dict(_OFFLINE)
    if attn_implementation is not None:
        offline["attn_implementation"] = attn_implementation
    try:
        auto: Any = AutoModelForCausalLM  # typed as if it never returned the loading info
        model, info = auto.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below with both shapes, rather than as one long table
            **offline,
        )
    except RuntimeError as error:
        # For instance an expert missing among those that are stacked into one tensor.
        raise CorruptWeightsError(
            f"{folder}: weights cannot be assembled as config.json asks; transformers' load report, logged just "
            f"before this, names the tensor: {error}"
        ) from error
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{folder}: cannot be loaded: {error}") from error
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise CorruptWeightsError(
            f"{folder}: {name} has shape {list(found)}, but config.json asks for {list(wanted)}"
            f"{_and_others(len(info['mismatched_keys']))}; the weights belong to another configuration"
        )
    if info["missing_keys"]:
        raise CorruptWeightsError(
            f"{folder}: {min(info['missing_keys'])} is missing{_and_others(len(info['missing_keys']))}; it would be "
            "filled with random numbers: copy the whole checkpoint, or correct config.json"
        )
    if info["unexpected_keys"]:
        # Old checkpoints hold recomputed buffers, new ones extra prediction layers: neither is part of the model.
        unused = info["unexpected_keys"]
        _LOG.warning("%s: %s is not part of the model%s", folder, min(unused), _and_others(len(unused)))
    return model


def _and_others(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def _check_finite(model: nn.Module, where: str) -> None:
    for name, tensor in served_tensors(model):
        if not tensor.is_floating_point():
            continue
        for chunk in tensor.detach().reshape(-1).split(_FINITE_CHUNK):
            # isfinite has no float8 kernel
            if not torch.isfinite(chunk.float() if chunk.element_size() == 1 else chunk).all():
                raise CorruptWeightsError(
                    f"{where}: {name} holds NaN or infinity; load an earlier checkpoint, or in a wider dtype"
                )
