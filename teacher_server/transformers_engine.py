"""A teacher run by transformers: any Hugging Face causal LM, on the CPU or a GPU."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from opd_kernels import LinearHead
from torch import Tensor

from opd_mesh.config.services import TeacherConfig
from opd_mesh.errors import ConfigError, OpdError
from opd_mesh.models.checkpoint import check_digest
from opd_mesh.models.forward import BatchLayout, prove_layouts, sequence_hidden_states
from opd_mesh.models.heads import HEAD_TOLERANCES, HEAD_TOLERANCES_DEFAULT, extract_head, prove_head
from opd_mesh.models.mapped import MappedWeights
from opd_mesh.models.tokenizer import load_tokenizer, tokenizer_fingerprint, tokenizer_roles, valid_vocab_size
from opd_mesh.torch_tensors import TORCH_DTYPES, to_numpy
from teacher_server.base_model import BaseModels
from teacher_server.engine import EngineFacts, HeadFacts, ScoreJob, Signal
from teacher_server.signals import FROM_LOGITS, answer_of

log = logging.getLogger("teacher_server")

_IN_ONE_ROW = (BatchLayout.SHARED, BatchLayout.PACKED)


def _most_row_tokens(hidden_size: int) -> int:
    """Sequences in one row cost attention to what they do not see of each other, too: in a narrow model, where little
    else costs anything, a long row takes longer than several short ones."""
    return max(256, 4 * hidden_size)


class TransformersEngine:
    """A checkpoint, or an adapter above one; proves head and batching on probes, and scores.

    Args:
        bases: where its model is found, or loaded.
        deterministic: one sequence at a time, whatever the architecture would allow.

    Raises:
        ModelNotFoundError, CorruptWeightsError, ConfigError: from the constructor.
    """

    def __init__(self, teacher_id: str, config: TeacherConfig, bases: BaseModels, *, deterministic: bool) -> None:
        self.teacher_id = teacher_id
        folder = bases.folder_of(config.path)
        adapter_folder = bases.folder_of(config.adapter) if config.adapter is not None else None
        self._base, above = bases.get(folder, adapter_folder, TORCH_DTYPES[config.dtype])
        self._adapter = None
        self._sets: list[MappedWeights] = [self._base.weights] if self._base.weights is not None else []
        tokenizer = load_tokenizer(folder)
        vocab_size = valid_vocab_size(tokenizer)
        with self._loaded():
            self._check_embeddings(folder, vocab_size)
            digest = self._base.digest
            if above is not None:
                self._adapter, weights = self._base.add_adapter(above)
                if weights is not None:
                    self._sets.append(weights)
                    weights.load()  # it may be another teacher's, too, and proved already
                digest = hashlib.sha256(f"{digest} {self._adapter.digest}".encode()).hexdigest()
            check_digest(folder, digest, config.expected_digest)
            self._base.activate(self._adapter)
            self._vocab_size = vocab_size
            self._head, facts, error, note = self._prove_head(vocab_size)
            proof = prove_layouts(self._base.model)
            hidden_size = self._base.model.get_output_embeddings().weight.shape[1]
        self._layout = BatchLayout.LONE if deterministic else proof.allowed[0]
        if proof.reason:
            log.info("teacher %s: batching by %s: %s", teacher_id, self._layout, proof.reason)
        fingerprint = tokenizer_fingerprint(vocabulary := tokenizer.get_vocab())
        self.facts = EngineFacts(
            model_type=self._base.model_type,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            dtype=config.dtype,
            teacher_digest=digest,
            head=facts,
            head_error=error,
            signals=FROM_LOGITS if facts is None else (Signal.HIDDEN_STATES, *FROM_LOGITS),
            note=note,
            batch_layout=str(self._layout),
            tokenizer_fingerprint=fingerprint,
            tokenizer_roles=tokenizer_roles(tokenizer),
            vocabulary=bases.vocabulary(fingerprint, vocabulary),
            most_batch_tokens=_most_row_tokens(hidden_size) if self._layout in _IN_ONE_ROW else None,
        )

    @property
    def weight_sets(self) -> tuple[MappedWeights, ...]:
        """See :class:`teacher_server.engine.TeacherEngine`."""
        return tuple(self._sets)

    @contextmanager
    def _loaded(self) -> Iterator[None]:
        """While it is proved; the pool does not run yet."""
        for weights in self._sets:
            weights.load()
        try:
            yield
        finally:
            for weights in self._sets:
                weights.unload()

    def _check_embeddings(self, folder: Path, vocab_size: int) -> None:
        rows = self._base.model.get_input_embeddings().weight.shape[0]
        if vocab_size > rows:
            raise ConfigError(
                f"{folder}: the tokenizer has {vocab_size} ids, the model embeds only {rows}; take the tokenizer "
                "that the model was trained with, or resize its embedding"
            )

    def _prove_head(self, vocab_size: int) -> tuple[LinearHead | None, HeadFacts | None, float, str]:
        model = self._base.model
        try:
            head = extract_head(model, valid_vocab_size=vocab_size)
            proof = prove_head(model, head)
        except OpdError as error:
            return None, None, float("nan"), f"hidden states are not offered: {error}"
        tolerance = HEAD_TOLERANCES.get(model.dtype, HEAD_TOLERANCES_DEFAULT)
        # The card tells the error in standard deviations of the logits, as the tolerance is told.
        in_stds = tolerance * proof.max_abs_error / proof.tolerance if proof.tolerance else float("nan")
        if not proof.ok:
            log.warning("teacher %s offers no hidden states: %s", self.teacher_id, proof.reason)
            return None, None, in_stds, f"hidden states are not offered: {proof.reason}"
        return head, HeadFacts.of(head), in_stds, ""

    @torch.inference_mode()
    def score(self, jobs: Sequence[ScoreJob]) -> list[dict[str, np.ndarray] | OpdError]:
        """See :class:`teacher_server.engine.TeacherEngine`."""
        self._base.activate(self._adapter)
        if self._head is None:
            return [self._answer(job, self._model_logits(job)) for job in jobs]
        hidden = sequence_hidden_states(self._base.model, [job.token_ids for job in jobs], self._layout)
        answers: list[dict[str, np.ndarray] | OpdError] = []
        for job, hidden_Nd in zip(jobs, hidden, strict=True):
            answers.append(self._answer(job, hidden_Nd[list(job.predicting_positions)]))
        return answers

    def _model_logits(self, job: ScoreJob) -> Tensor:
        """[R, V] by the model's own head, where ours could not be proved equal."""
        ids = torch.tensor([job.token_ids], device=self._base.device)
        logits_NV: Tensor = self._base.model(input_ids=ids, use_cache=False).logits[0]
        return logits_NV[list(job.predicting_positions), : self._vocab_size]

    def _answer(self, job: ScoreJob, rows_RX: Tensor) -> dict[str, np.ndarray] | OpdError:
        """Of hidden states [R, d], or of logits [R, V] where there is no head."""

        def logits_of(part: slice) -> Tensor:
            return rows_RX[part] if self._head is None else self._head.logits(rows_RX[part])

        return answer_of(self.teacher_id, job, lambda: rows_RX, logits_of)

    def head_tensors(self) -> list[tuple[str, np.ndarray]]:
        """See :class:`teacher_server.engine.TeacherEngine`."""
        if self._head is None:
            return []
        tensors = [("weight", self._head.weight), ("bias", self._head.bias)]
        return [(name, to_numpy(self._base.cpu_copy(tensor))) for name, tensor in tensors if tensor is not None]

    def close(self) -> None:
        """Free the model, unless other teachers have it too: then the last of them does."""
        self._head = None
