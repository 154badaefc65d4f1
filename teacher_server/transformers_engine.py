"""A teacher run by transformers: any Hugging Face causal LM, on the CPU or a GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from opd_kernels import LinearHead

from opd_mesh.config.services import TeacherConfig
from opd_mesh.errors import ConfigError, DivergedError, OpdError
from opd_mesh.models.checkpoint import load_causal_lm
from opd_mesh.models.forward import BatchLayout, prove_layouts, sequence_hidden_states
from opd_mesh.models.heads import HEAD_TOLERANCES, HEAD_TOLERANCES_DEFAULT, extract_head, head_digest, prove_head
from opd_mesh.models.tokenizer import load_tokenizer, tokenizer_fingerprint, tokenizer_roles, valid_vocab_size
from opd_mesh.torch_tensors import TORCH_DTYPES, to_numpy
from teacher_server.engine import EngineFacts, ScoreJob, Signal

log = logging.getLogger("teacher_server")


class TransformersEngine:
    """Loads a checkpoint (and merges an adapter), proves head and batching on probes, and scores.

    Args:
        deterministic: one sequence at a time, whatever the architecture would allow.

    Raises:
        ModelNotFoundError, CorruptWeightsError, ConfigError: from the constructor.
    """

    def __init__(self, teacher_id: str, config: TeacherConfig, *, device: str, deterministic: bool) -> None:
        self.teacher_id = teacher_id
        loaded = load_causal_lm(
            config.path,
            adapter=config.adapter,
            dtype=TORCH_DTYPES[config.dtype],
            device=device,
            expected_digest=config.expected_digest,
        )
        self._model = loaded.model
        self._device = torch.device(device)
        tokenizer = load_tokenizer(config.path)
        vocab_size = valid_vocab_size(tokenizer)
        rows = self._model.get_input_embeddings().weight.shape[0]
        if vocab_size > rows:
            raise ConfigError(
                f"{config.path}: the tokenizer has {vocab_size} ids, the model embeds only {rows}; take the tokenizer "
                "that the model was trained with, or resize its embedding"
            )
        self._vocab_size = vocab_size
        head, digest, error, note = self._prove_head(vocab_size)
        self._head = head
        proof = prove_layouts(self._model)
        self._layout = BatchLayout.LONE if deterministic else proof.allowed[0]
        if proof.reason:
            log.info("teacher %s: batching by %s: %s", teacher_id, self._layout, proof.reason)
        vocabulary = tokenizer.get_vocab()
        self.facts = EngineFacts(
            model_type=loaded.model_type,
            vocab_size=vocab_size,
            hidden_size=self._model.get_output_embeddings().weight.shape[1],
            dtype=config.dtype,
            teacher_digest=loaded.weights_digest,
            head=head,
            head_digest=digest,
            head_error=error,
            signals=(Signal.HIDDEN_STATES, Signal.LOGITS) if head is not None else (Signal.LOGITS,),
            note=note,
            batch_layout=str(self._layout),
            tokenizer_fingerprint=tokenizer_fingerprint(vocabulary),
            tokenizer_roles=tokenizer_roles(tokenizer),
            vocabulary=vocabulary,
        )

    def _prove_head(self, vocab_size: int) -> tuple[LinearHead | None, str, float, str]:
        try:
            head = extract_head(self._model, valid_vocab_size=vocab_size)
            proof = prove_head(self._model, head)
        except OpdError as error:
            return None, "", float("nan"), f"hidden states are not offered: {error}"
        tolerance = HEAD_TOLERANCES.get(self._model.dtype, HEAD_TOLERANCES_DEFAULT)
        # The card tells the error in standard deviations of the logits, as the tolerance is told.
        in_stds = tolerance * proof.max_abs_error / proof.tolerance if proof.tolerance else float("nan")
        if not proof.ok:
            log.warning("teacher %s offers logits only: %s", self.teacher_id, proof.reason)
            return None, "", in_stds, f"hidden states are not offered: {proof.reason}"
        return head, head_digest(head), in_stds, ""

    @torch.inference_mode()
    def score(self, jobs: Sequence[ScoreJob]) -> list[dict[str, np.ndarray] | OpdError]:
        """See :class:`teacher_server.engine.TeacherEngine`."""
        if self._head is None:
            return [self._answer(job, self._model_logits(job)) for job in jobs]
        hidden = sequence_hidden_states(self._model, [job.token_ids for job in jobs], self._layout)
        answers: list[dict[str, np.ndarray] | OpdError] = []
        for job, hidden_Nd in zip(jobs, hidden, strict=True):
            rows = hidden_Nd[torch.tensor(job.predicting_positions, device=hidden_Nd.device)]
            answers.append(self._answer(job, rows if job.signal is Signal.HIDDEN_STATES else self._head.logits(rows)))
        return answers

    def _model_logits(self, job: ScoreJob) -> torch.Tensor:
        """[R, V] by the model's own head, where ours could not be proved equal."""
        ids = torch.tensor([job.token_ids], device=self._device)
        logits_NV = self._model(input_ids=ids, use_cache=False).logits[0]
        return logits_NV[torch.tensor(job.predicting_positions, device=ids.device), : self._vocab_size]

    def _answer(self, job: ScoreJob, tensor_RX: torch.Tensor) -> dict[str, np.ndarray] | OpdError:
        tensor_RX = tensor_RX.to(TORCH_DTYPES[job.dtype])
        if not torch.isfinite(tensor_RX).all():
            return DivergedError(
                f"teacher {self.teacher_id!r} gave NaN or infinity for this sequence as {job.dtype}; "
                "ask for a wider dtype, or check the teacher's weights"
            )
        return {str(job.signal): to_numpy(tensor_RX)}

    def close(self) -> None:
        """Frees the model."""
        del self._model
