"""What :mod:`rollout_server.vllm_engine` needs around vLLM: the package, its arguments, and policies as files.

From the sources of vLLM 0.33.0; file names are inside its ``vllm`` package.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd_mesh.config.services import RolloutEngineConfig
from opd_mesh.errors import ConfigError, InternalError, InvalidInputError
from opd_mesh.models.checkpoint import LoadedModel, check_safetensors, served_tensors, weight_files
from opd_mesh.trajectory import SamplingParams
from rollout_server.engine import PreparedPolicy
from rollout_server.policy import check_finite, check_names_and_shapes

VLLM_VERSION = "0.33"
REMEDY = (
    "in an environment or image of its own, `pip install 'opd-mesh[vllm]'` (vLLM pins another torch than the other "
    "extras): see docs/engines.md; or set engine: transformers"
)
# v1/worker/gpu/sample/logit_bias.py: more raise in the engine's core process, which they would end.
MAX_PADDING_IDS = 1024


# --- what must be there ------------------------------------------------------------------------------------------
def visible_gpus() -> int:
    """CUDA devices that torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def require_vllm(settings: RolloutEngineConfig, *, deterministic: bool) -> Any:
    """The package. Raises :class:`ConfigError` for what vLLM cannot do here, with how to get it: before any loading."""
    if settings.device == "cpu":
        raise ConfigError("engine vllm runs on GPUs; set device: auto, or engine: transformers", field="engine.device")
    if settings.keep_kv_on_update:
        raise ConfigError(
            "engine vllm reads every context again after an update, for its answers do not say which weights wrote "
            "which keys; set keep_kv_on_update: false, or engine: transformers",
            field="engine.keep_kv_on_update",
        )
    wanted, gpus = settings.vllm.tensor_parallel_size, visible_gpus()
    if gpus < wanted:
        raise ConfigError(
            f"engine vllm needs {wanted} NVIDIA GPU(s), torch {torch.__version__} sees {gpus}; set engine: "
            "transformers, which runs on the CPU, too",
            field="engine.engine",
        )
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report to its makers
    # A fork would copy gRPC's threads' locks, held or not: the server is bound before its engine is made.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    try:
        import vllm
        from vllm import envs
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: F401
    except Exception as error:  # it loads CUDA, and a missing library raises whatever it likes
        raise ConfigError(
            f"engine vllm needs the package vllm, which cannot be imported in {sys.prefix} "
            f"({type(error).__name__}: {error}): {REMEDY}",
            field="engine.engine",
        ) from error
    if not vllm.__version__.startswith(f"{VLLM_VERSION}."):
        raise ConfigError(
            f"engine vllm is written for vLLM {VLLM_VERSION}, here is {vllm.__version__}: {REMEDY}",
            field="engine.engine",
        )
    if deterministic and not envs.VLLM_BATCH_INVARIANT:
        raise ConfigError(
            "engine vllm is deterministic only in vLLM's batch-invariant mode: export VLLM_BATCH_INVARIANT=1 (slower), "
            "set deterministic: false, or engine: transformers",
            field="deterministic",
        )
    return vllm


def engine_arguments(folder: Path, settings: RolloutEngineConfig) -> Any:
    """``AsyncEngineArgs`` (``engine/arg_utils.py``)."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    own = settings.vllm
    memory: dict[str, Any] = {"kv_cache_memory_bytes": int(settings.cache_bytes) // own.tensor_parallel_size}
    if own.gpu_memory_utilization is not None:
        memory = {"gpu_memory_utilization": own.gpu_memory_utilization}
    return AsyncEngineArgs(
        model=str(folder),
        # Ids cross the wire; without a tokenizer nothing is detokenized, and no text can stop an answer.
        skip_tokenizer_init=True,
        trust_remote_code=False,
        load_format="safetensors",  # "auto" would fall back to pickles
        generation_config="vllm",  # the checkpoint's would bring sampling parameters and stop tokens
        dtype=settings.dtype,
        max_model_len=settings.max_context_tokens,
        tensor_parallel_size=own.tensor_parallel_size,
        enforce_eager=own.enforce_eager,
        max_num_seqs=settings.max_slots,
        max_num_batched_tokens=settings.prefill_token_budget + settings.max_slots,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        # After the padding is masked, unlike "raw_logprobs".
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        **memory,
    )


# --- requests ----------------------------------------------------------------------------------------------------
def check_sampling(sampling: SamplingParams) -> None:
    """Raises :class:`InvalidInputError` where the log-probability that vLLM gives is only one of the two wanted.

    With a grammar that is so at every temperature: its ``structured_outputs`` mask before "processed_logprobs".
    """
    if sampling.grammar:
        raise InvalidInputError(
            "engine vllm takes no grammars; leave it empty, or let a server with engine: transformers generate",
            field="sampling.grammar",
        )
    if sampling.keep_mask:
        raise InvalidInputError(
            "engine vllm does not tell which ids a token was drawn from; leave it out, or let a server with engine: "
            "transformers generate",
            field="sampling.keep_mask",
        )
    if sampling.temperature == 0:  # greedy: the sampling distribution is one token
        return
    for name, value in {"temperature": 1.0, "top_p": 1.0, "top_k": 0}.items():
        if getattr(sampling, name) != value:
            raise InvalidInputError(
                f"is {getattr(sampling, name)}: vLLM gives one log-probability of a token, before or after "
                f"temperature and truncation, and both are needed; give {value}, or a temperature of 0, or let a "
                "server with engine: transformers generate",
                field=f"sampling.{name}",
            )


def padding_bias(valid_vocab_size: int, width: int) -> dict[int, float] | None:
    """``logit_bias`` under which ids of no token are never written, and count for nothing in a log-probability.

    ``allowed_token_ids`` would be the whole vocabulary, of which the model runner takes 1,024. The constructor of
    ``SamplingParams``, unlike its ``from_optional``, does not clip a bias.

    Raises:
        ConfigError: more than vLLM takes.
    """
    if width - valid_vocab_size > MAX_PADDING_IDS:
        raise ConfigError(
            f"engine vllm can keep at most {MAX_PADDING_IDS} ids from being written, and {width - valid_vocab_size} "
            "of this model's are not in its tokenizer; set engine: transformers",
            field="engine.engine",
        )
    return dict.fromkeys(range(valid_vocab_size, width), -math.inf) or None


def sampling_params(
    sampling: SamplingParams, *, written: int, seed: int, bias: Mapping[int, float] | None, valid_vocab_size: int
) -> Any:
    """``SamplingParams`` (``sampling_params.py``) for what is left of a response. A stop token is the last id of its
    ``token_ids``: ``check_stop`` (``v1/core/sched/utils.py``) looks at what has been appended."""
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind

    return VllmSamplingParams(
        temperature=sampling.temperature,
        seed=seed,
        max_tokens=sampling.max_new_tokens - written,
        # One that cannot be written cannot stop anything either, and vLLM refuses ids that the model lacks.
        stop_token_ids=[token for token in sampling.stop_token_ids if 0 <= token < valid_vocab_size],
        ignore_eos=True,  # only what was asked for stops an answer
        logprobs=0,  # of the token drawn, and of no other
        logit_bias=bias,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def derived_seed(seed: int, written: int) -> int:
    """63 bits of our 64-bit seed (vLLM's are signed, and it takes −1 for none) and of the tokens written already, so
    that a generator that begins again does not draw the same noise again."""
    digest = hashlib.blake2b(f"{seed}:{written}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# --- policies ----------------------------------------------------------------------------------------------------
class Files:
    """Safetensors files that hold every tensor of a policy; a folder of our own goes with its last reference."""

    def __init__(self, paths: Sequence[Path], *, remove: bool) -> None:
        self.paths, self.folder = paths, paths[0].parent
        self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True) if remove else None

    def remove(self) -> None:
        """The folder, where it is ours, now."""
        if self._remove is not None:
            self._remove()

    def read(self, names: set[str]) -> dict[str, Tensor]:
        """Into memory."""
        found: dict[str, Tensor] = {}
        for path in self.paths if names else ():
            with safe_open(str(path), framework="pt") as handle:
                found |= {name: handle.get_tensor(name) for name in names & set(handle.keys())}
        return found


@dataclass(frozen=True)
class VllmPolicy(PreparedPolicy):
    """Files that vLLM's workers read.

    Attributes:
        given: as they came.
        base: where the names left out were read.
    """

    files: Files
    given: Mapping[str, Tensor] = field(repr=False)
    base: Files


class PolicyWriter:
    """Checks policies and writes them to files.

    Attributes:
        shapes: of every tensor of a policy, by name.
        served: the files of the weights that are served.

    Raises:
        ConfigError: vLLM would not know the names of this model's weights.
    """

    def __init__(self, loaded: LoadedModel, weights_dir: Path | None) -> None:
        tensors = dict(served_tensors(loaded.model))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self.served = Files(weight_files(loaded.path), remove=False)
        in_files = set().union(*(check_safetensors(path) for path in self.served.paths))
        if unknown := sorted(self.shapes.keys() - in_files):
            raise ConfigError(
                f"engine vllm reads weights by the names in a checkpoint's files, and {loaded.path} has none of the "
                f"name {unknown[0]} ({len(unknown)} such); set engine: transformers",
                field="engine.engine",
            )
        self._root = _weights_root(weights_dir, sum(t.numel() * t.element_size() for t in tensors.values()))

    def write(self, tensors: Mapping[str, Tensor]) -> VllmPolicy:
        """All of them, for vLLM loads fused weights only from all of their parts.

        Raises:
            InvalidInputError, CorruptWeightsError: see :meth:`rollout_server.engine.RolloutEngine.prepare_policy`.
            InternalError: there is no room for the file.
        """
        check_names_and_shapes(self.shapes, tensors)
        base = self.served
        whole = {**base.read(self.shapes.keys() - tensors.keys()), **tensors}
        ours = {name: tensor.detach().cpu().to(self._dtypes[name]) for name, tensor in whole.items()}
        for name in tensors:
            check_finite(name, ours[name])
        folder = Path(tempfile.mkdtemp(prefix="opd-policy-", dir=self._root))
        files = Files([folder / "model.safetensors"], remove=True)
        try:
            save_file(_apart(ours), files.paths[0], {"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise InternalError(
                f"the policy cannot be written to {folder}: {error}; give engine.vllm.weights_dir room for two"
            ) from error
        return VllmPolicy(files, tensors, base)

    def rebased(self, policy: VllmPolicy) -> VllmPolicy:
        """The same, or written again where another policy came in between and names were left out."""
        if policy.base is self.served or policy.given.keys() == self.shapes.keys():
            return policy
        return self.write(policy.given)


def _weights_root(configured: Path | None, num_bytes: int) -> Path:
    """A folder with room for two policies."""
    if configured is not None:
        configured.mkdir(parents=True, exist_ok=True)
        return configured
    memory = Path("/dev/shm")  # 64 MiB in a container, unless it was made larger
    if memory.is_dir() and shutil.disk_usage(memory).free > 2.5 * num_bytes:
        return memory
    return Path(tempfile.gettempdir())


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and copied where one shares memory with another, which safetensors does not write."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone(memory_format=torch.contiguous_format) if place in seen else tensor.contiguous()
        seen.add(place)
    return apart
