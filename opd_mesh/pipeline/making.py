"""Models made without training: random ones, means of several, and adapters merged into their base.

``python -m opd_mesh.pipeline.making --config JOB.json --out DIR`` in a process of its own, because it needs torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_mesh.config.base import parse_config
from opd_mesh.config.pipeline import InitConfig
from opd_mesh.errors import ConfigError, OpdError, PreconditionError, TokenizerMismatchError
from opd_mesh.process import end_with_parent, fail

log = logging.getLogger("opd_mesh.pipeline")
PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"


# --- random ----------------------------------------------------------------------------------------------------
def character_tokenizer(characters: str, extra_tokens: Sequence[str] = (), numbers: int = 0) -> Any:
    """One token per character, and per whole number below ``numbers``.

    Padding, BOS, EOS and the unknown come first; ``extra_tokens`` are special ones, and last. It adds nothing to a text
    by itself, and what it knows survives encode and decode. With ``numbers``, a run of digits is one token: unknown
    where it is larger, or begins with a needless 0.

    Raises:
        ConfigError: an extra token that is one already.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [PAD, BOS, EOS, UNK, *characters, *map(str, range(numbers))]
    for extra in extra_tokens:
        if extra in tokens or list(extra_tokens).count(extra) > 1:
            raise ConfigError(f"the token {extra!r} stands there twice", field="model.init.extra_tokens")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[0-9]+|[\s\S]" if numbers else r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )
    if extra_tokens:
        fast.add_special_tokens({"additional_special_tokens": list(extra_tokens)})
    return fast


def make_random(config: InitConfig, seed: int, out: Path) -> None:
    """Write a checkpoint with weights as transformers draws them.

    Raises:
        ConfigError: transformers cannot build it.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = character_tokenizer(config.characters, config.extra_tokens, config.numbers)
    fields = {key: value for key, value in config.config.items() if key != "model_type"}
    fields |= {
        "vocab_size": config.vocab_size or len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        built = AutoConfig.for_model(config.config["model_type"], **fields)
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(built)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError) as error:
        raise ConfigError(f"transformers cannot build this model: {error}", field="model.init.config") from error
    _save(model.float(), tokenizer, out)
    log.info("%d parameters, %d tokens", sum(p.numel() for p in model.parameters()), len(tokenizer))


# --- means -----------------------------------------------------------------------------------------------------
def make_soup(models: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Write the weighted mean, computed in float64 and rounded once to the first model's dtype.

    Whole numbers (routing tables) must be equal in all. Configuration and tokenizer are the first's.

    Raises:
        PreconditionError: other names, shapes or whole numbers than the first's, or an adapter.
        TokenizerMismatchError: another tokenizer.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from opd_mesh.models.checkpoint import ADAPTER_CONFIG, weight_files
    from opd_mesh.models.tokenizer import first_difference, load_tokenizer

    first = models[0]
    for model in models:
        if (model / ADAPTER_CONFIG).exists():
            raise PreconditionError(
                f"{model} is an adapter, whose factors have no mean: merge it into its base first (stages of a "
                "pipeline do), or take it out of the soup",
                field="of",
            )
    vocabulary = load_tokenizer(first).get_vocab()
    for model in models[1:]:
        found = first_difference(vocabulary, load_tokenizer(model).get_vocab(), name_a=str(first), name_b=str(model))
        if found is not None:
            raise TokenizerMismatchError(f"models of a soup need the same tokenizer: {found}", field="of")
    places: list[dict[str, Any]] = []
    for model in models:
        files = [safe_open(str(file), framework="pt") for file in weight_files(model)]
        places.append({name: file for file in files for name in file.keys()})  # noqa: SIM118 - it is no mapping
    for model, place in zip(models[1:], places[1:], strict=True):
        if place.keys() != places[0].keys():
            name = min(place.keys() ^ places[0].keys())
            raise PreconditionError(f"only one of {first} and {model} has the tensor {name}", field="of")
    mean = {}
    for name in places[0]:
        tensors = [place[name].get_tensor(name) for place in places]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        for model, shape in zip(models, shapes, strict=True):
            if shape != shapes[0]:
                raise PreconditionError(f"{name} is {shapes[0]} in {first}, but {shape} in {model}", field="of")
        if not tensors[0].is_floating_point():
            if any(not torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
                raise PreconditionError(f"{name} holds whole numbers that differ, which have no mean", field="of")
            mean[name] = tensors[0]
            continue
        total = torch.zeros(shapes[0], dtype=torch.float64)
        for tensor, weight in zip(tensors, weights, strict=True):
            total += weight * tensor.double()
        mean[name] = total.to(tensors[0].dtype).contiguous()
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(first.iterdir()):
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copyfile(file, out / file.name)
    save_file(mean, out / "model.safetensors", metadata={"format": "pt"})


# --- adapters --------------------------------------------------------------------------------------------------
def merge(base: Path, adapter: Path, dtype: str, out: Path) -> None:
    """Write the plain model that an adapter makes of its base. Raises as :func:`load_causal_lm`."""
    from opd_mesh.models.checkpoint import load_causal_lm
    from opd_mesh.models.tokenizer import load_tokenizer
    from opd_mesh.torch_tensors import TORCH_DTYPES

    loaded = load_causal_lm(base, adapter=adapter, dtype=TORCH_DTYPES[dtype])
    _save(loaded.model, load_tokenizer(base), out)


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))


# --- the process -----------------------------------------------------------------------------------------------
def make(job: dict[str, Any], out: Path) -> None:
    """What :mod:`.work` asks for. A file that is there already is of an attempt that was killed."""
    shutil.rmtree(out, ignore_errors=True)
    match job:
        case {"make": "random", "init": init, "seed": seed}:
            make_random(parse_config(InitConfig, init, source="model.init"), seed, out)
        case {"make": "soup", "models": models, "weights": weights}:
            make_soup([Path(model) for model in models], weights, out)
        case {"make": "merged", "base": base, "adapter": adapter, "dtype": dtype}:
            merge(Path(base), Path(adapter), dtype, out)
        case _:
            raise ConfigError(f"cannot make {job.get('make')!r}", field="make")


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="opd_mesh.pipeline.making")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--die-with-parent", type=int)
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if arguments.die_with_parent is not None:
        end_with_parent(arguments.die_with_parent)
    try:
        make(json.loads(arguments.config.read_text(encoding="utf-8")), arguments.out)
    except OpdError as error:
        fail(error)


if __name__ == "__main__":
    main()
