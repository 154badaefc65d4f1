"""A teacher run by TensorRT-LLM: NVIDIA GPUs, tensor parallelism, quantized checkpoints.

Its signal is the logits of the prompt's own positions; every other signal is computed from them. Hidden states are
offered where its model can be wrapped and the head is proved. See ``docs/engines.md``.

Letters: N tokens of a sequence, R scored tokens, V vocabulary (V' with padding), d hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from opd_kernels import LinearHead
from torch import Tensor

from opd_mesh.config.services import TeacherConfig
from opd_mesh.errors import ConfigError, CorruptWeightsError, InternalError, OpdError
from opd_mesh.models.forward import LAYOUT_TOLERANCES, LAYOUT_TOLERANCES_DEFAULT, BatchLayout
from opd_mesh.models.heads import HEAD_TOLERANCES, HEAD_TOLERANCES_DEFAULT, in_float32
from opd_mesh.models.tokenizer import load_tokenizer, tokenizer_fingerprint, tokenizer_roles, valid_vocab_size
from opd_mesh.torch_tensors import TORCH_DTYPES, to_numpy
from teacher_server.engine import EngineFacts, HeadFacts, ScoreJob, Signal
from teacher_server.signals import FROM_LOGITS, answer_of
from teacher_server.tensorrt_checkpoint import CheckpointFacts
from teacher_server.tensorrt_runtime import MAX_BATCH_ITEMS, Prompt, Rows, TensorRtWeights, require_tensorrt

log = logging.getLogger("teacher_server")
PROBE_TOKENS = (33, 1, 17)


class TensorRtEngine:
    """A checkpoint in an ``LLM`` of its own; proves rows, vocabulary, batching and head on probes, and scores.

    Args:
        folder: local, of the checkpoint.
        deterministic: one sequence at a time. The bits are as reproducible as TensorRT-LLM's own, no more is promised.
        stays_loaded: nothing else will need the memory, so that it is not loaded a second time after the proofs.

    Raises:
        ConfigError: the package or a GPU is missing, the teacher has an adapter, or checkpoint and tokenizer disagree.
        ModelNotFoundError, CorruptWeightsError: the checkpoint's files.
        PreconditionError: TensorRT-LLM cannot load it.
        InternalError: TensorRT-LLM does not return a row for every token, or a logit for every id.
    """

    def __init__(
        self, teacher_id: str, config: TeacherConfig, folder: Path, *, deterministic: bool, stays_loaded: bool
    ) -> None:
        if config.adapter is not None:
            raise ConfigError(
                f"engine tensorrt_llm takes no adapter, got {config.adapter}: merge it (peft's merge_and_unload, then "
                "save_pretrained, and the tokenizer beside it) and give the merged folder as path; or set engine: "
                "transformers, where adapters share their base",
                field="adapter",
            )
        self.teacher_id = teacher_id
        self._limit = config.max_tokens_per_item
        require_tensorrt(config.tensorrt_llm.tensor_parallel_size)  # before gigabytes are read for a digest
        checkpoint = CheckpointFacts.read(folder)
        if config.expected_digest not in (None, checkpoint.digest):
            raise CorruptWeightsError(
                f"{folder}: the files have digest {checkpoint.digest}, expected {config.expected_digest}; this is "
                "another checkpoint than the one that was recorded"
            )
        tokenizer = load_tokenizer(folder)
        vocabulary = tokenizer.get_vocab()
        self._vocab_size = valid_vocab_size(tokenizer)
        if self._vocab_size > checkpoint.vocab_size:  # on a GPU, an id without a row ends the process
            raise ConfigError(
                f"{folder}: the tokenizer has {self._vocab_size} ids, the model embeds only {checkpoint.vocab_size}; "
                "take the tokenizer that the model was trained with"
            )
        self._weights = TensorRtWeights(
            f"{teacher_id}:{checkpoint.digest[:12]}",
            checkpoint,
            config.tensorrt_llm,
            dtype=config.dtype,
            max_tokens=config.max_tokens_per_item,
        )
        self._head: LinearHead | None = None
        try:
            error, note = self._load_proved(checkpoint, config, alone=deterministic)
        except BaseException:
            self._weights.discard()
            raise
        if not stays_loaded:
            self._weights.unload()
        if checkpoint.quantization:
            note = "; ".join(part for part in (f"the weights are quantized: {checkpoint.quantization}", note) if part)
        head = None if self._head is None else HeadFacts.of(self._head)
        self.facts = EngineFacts(
            model_type=checkpoint.model_type,
            vocab_size=self._vocab_size,
            hidden_size=checkpoint.hidden_size,
            dtype=config.dtype,
            teacher_digest=checkpoint.digest,
            head=head,
            head_error=error,
            signals=FROM_LOGITS if head is None else (Signal.HIDDEN_STATES, *FROM_LOGITS),
            note=note,
            batch_layout=str(self._layout),
            tokenizer_fingerprint=tokenizer_fingerprint(vocabulary),
            tokenizer_roles=tokenizer_roles(tokenizer),
            vocabulary=vocabulary,
        )

    @property
    def weight_sets(self) -> tuple[TensorRtWeights, ...]:
        """The whole LLM."""
        return (self._weights,)

    # --- proofs --------------------------------------------------------------------------------------------------
    def _load_proved(self, checkpoint: CheckpointFacts, config: TeacherConfig, *, alone: bool) -> tuple[float, str]:
        """Loaded afterwards: wrapped where all that it answers proves good, else as TensorRT-LLM makes it.

        Returns:
            The head's error in standard deviations of the logits (NaN: none measured), and why there is no head.

        Raises:
            ConfigError, CorruptWeightsError, InternalError, TooLongError: what TensorRT-LLM makes is not good either.
        """
        error, dtype = float("nan"), TORCH_DTYPES[config.dtype]
        if config.tensorrt_llm.hidden_states:
            try:
                head = checkpoint.head(vocab_size=self._vocab_size, dtype=dtype)
                self._weights.load()
                error = self._head_error(head)
                tolerance = HEAD_TOLERANCES.get(dtype, HEAD_TOLERANCES_DEFAULT)
                if error <= tolerance:  # refuses NaN, too
                    self._layout = self._prove_rows(checkpoint.folder, dtype, alone=alone, hidden=True)
                    self._head = head
                    return error, ""
                reason = f"hidden × head differs from the logits by {error:.1e} of their standard deviation"
            except Exception as failure:  # noqa: BLE001  internals that change by version: the model serves without
                reason = f"{type(failure).__name__}: {failure}"
            log.warning("teacher %s offers no hidden states: %s", self.teacher_id, reason)
            self._weights.discard()
            self._weights.hidden = False
        else:
            reason = "tensorrt_llm.hidden_states is off"
        self._weights.load()
        self._layout = self._prove_rows(checkpoint.folder, dtype, alone=alone, hidden=False)
        return error, f"hidden states are not offered: {reason}"

    def _head_error(self, head: LinearHead) -> float:
        """Largest difference of hidden × head from TensorRT-LLM's logits, in their standard deviations."""
        (rows,) = self._ask([Prompt(self._probe(PROBE_TOKENS[0]), logits=True, hidden=True)])
        assert rows.logits is not None
        assert rows.hidden is not None
        logits_NV = rows.logits[:, : self._vocab_size].float().cpu()
        ours_NV = in_float32(head).logits(rows.hidden.float().cpu())
        # Constant logits would prove nothing: NaN, or infinite.
        return float((ours_NV - logits_NV).abs().max() / logits_NV.std())

    def _prove_rows(self, folder: Path, dtype: torch.dtype, *, alone: bool, hidden: bool) -> BatchLayout:
        """Count, width and values of the rows: alone, in a batch, and of the longest item. Returns the layout.

        Args:
            alone: sequences will never share a batch.
            hidden: also of the hidden states.

        Raises:
            ConfigError, CorruptWeightsError, InternalError, TooLongError.
        """
        # The longest shows whether cache and buffers were made large enough, and that no chunk is left out.
        for rows in self._ask([Prompt(self._probe(self._limit), logits=True)]):
            self._checked(folder, rows)
        worst = 0.0
        for of_hidden in (False, True) if hidden else (False,):
            prompts = [
                Prompt(self._probe(tokens, seed), logits=not of_hidden, hidden=of_hidden)
                for seed, tokens in enumerate(PROBE_TOKENS)
            ]
            lone = [self._checked(folder, rows) for prompt in prompts for rows in self._ask([prompt])]
            if not alone:
                batched = [self._checked(folder, rows) for rows in self._ask(prompts)]
                error = max(float((a - b).abs().max()) for a, b in zip(lone, batched, strict=True))
                worst = max(worst, error / max(float(torch.cat(lone).std()), 1e-30))
        tolerance = LAYOUT_TOLERANCES.get(dtype, LAYOUT_TOLERANCES_DEFAULT)
        if not alone and worst > tolerance:
            log.warning(
                "teacher %s scores sequences one by one: in a batch they differ by %.1e of their standard deviation",
                self.teacher_id, worst,
            )  # fmt: skip
        return BatchLayout.LONE if alone or worst > tolerance else BatchLayout.PACKED

    def _checked(self, folder: Path, rows: Rows) -> Tensor:
        """[N, V] logits or [N, d] hidden states, float32."""
        tensor = rows.hidden
        if rows.logits is not None:
            width = rows.logits.shape[1]
            if width < self._vocab_size:
                raise InternalError(
                    f"{folder}: TensorRT-LLM's logits are {width} wide, less than {self._vocab_size} tokens"
                )
            tensor = rows.logits[:, : self._vocab_size]
        assert tensor is not None
        if not torch.isfinite(tensor).all():
            raise CorruptWeightsError(
                f"{folder}: TensorRT-LLM computes NaN or infinity; check the weights, their quantization and dtype"
            )
        return tensor.float()

    def _probe(self, tokens: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self._vocab_size, (min(tokens, self._limit),), generator=generator).tolist()

    def _ask(self, prompts: Sequence[Prompt]) -> list[Rows]:
        """Raises what is the error of one of them."""
        answers = self._weights.ask(prompts)
        for answer in answers:
            if isinstance(answer, OpdError):
                raise answer
        return [answer for answer in answers if isinstance(answer, Rows)]

    # --- scoring -------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def score(self, jobs: Sequence[ScoreJob]) -> list[dict[str, np.ndarray] | OpdError]:
        """See :class:`teacher_server.engine.TeacherEngine`.

        Raises:
            Exception: what TensorRT-LLM raises that does not concern one job, although it was made again.
        """
        answers: list[dict[str, np.ndarray] | OpdError] = []
        for batch in self._batches(jobs):
            prompts = [
                # Of hidden states alone, TensorRT-LLM computes the logits of one position instead of all.
                Prompt(job.token_ids, logits=not _hidden(job), hidden=_hidden(job))
                for job in batch
            ]
            for job, rows in zip(batch, self._ask_mended(prompts), strict=True):
                answers.append(rows if isinstance(rows, OpdError) else self._answer(job, rows))
        return answers

    def _ask_mended(self, prompts: Sequence[Prompt]) -> list[Rows | OpdError]:
        """An LLM that answers nothing any more is made again, once for a batch, and in the computing thread."""
        if not self._weights.broken:
            try:
                return self._weights.ask(prompts)
            except Exception:
                if not self._weights.broken:
                    raise
                log.warning(
                    "teacher %s: TensorRT-LLM failed on %d sequences; it is made again, and they are tried once more",
                    self.teacher_id, len(prompts), exc_info=True,
                )  # fmt: skip
        # Not inside the except: the error's frames hold the old model, which must be gone before the new one comes.
        self._weights.load()
        return self._weights.ask(prompts)

    def _batches(self, jobs: Sequence[ScoreJob]) -> Iterator[list[ScoreJob]]:
        """In order, so that the logits in flight stay within what one forward pass may hold; a long one goes alone."""
        batch: list[ScoreJob] = []
        for job in jobs:
            tokens = sum(other.num_tokens for other in batch) + job.num_tokens
            if batch and (
                self._layout is BatchLayout.LONE
                or len(batch) >= MAX_BATCH_ITEMS
                or tokens > self._weights.max_num_tokens
                or _hidden(job) != _hidden(batch[0])  # proved for batches of one kind
            ):
                yield batch
                batch = []
            batch.append(job)
        if batch:
            yield batch

    def _answer(self, job: ScoreJob, rows: Rows) -> dict[str, np.ndarray] | OpdError:
        positions = list(job.predicting_positions)

        def logits_of(part: slice) -> Tensor:
            assert rows.logits is not None
            return rows.logits[positions[part], : self._vocab_size]

        def hidden_Rd() -> Tensor:
            assert rows.hidden is not None
            return rows.hidden[positions]

        return answer_of(self.teacher_id, job, hidden_Rd, logits_of)

    def head_tensors(self) -> list[tuple[str, np.ndarray]]:
        """See :class:`teacher_server.engine.TeacherEngine`."""
        if self._head is None:
            return []
        tensors = [("weight", self._head.weight), ("bias", self._head.bias)]
        return [(name, to_numpy(tensor)) for name, tensor in tensors if tensor is not None]

    def close(self) -> None:
        """Shut TensorRT-LLM down."""
        self._weights.unload()


def _hidden(job: ScoreJob) -> bool:
    return job.signal is Signal.HIDDEN_STATES
