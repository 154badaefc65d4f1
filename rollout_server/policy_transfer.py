"""A policy on its way in: what the manifest may say, the bytes, their digests, and the tensors they make.

Three forms: every tensor; those that differ from the policy served; or the factors of a LoRA adapter, which change the
checkpoint that the server has loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from opd.v1 import rollout_service_pb2
from torch import Tensor

from opd_mesh.errors import CorruptWeightsError, InvalidInputError, PolicyBaseMismatchError
from opd_mesh.models.checkpoint import state_digest
from opd_mesh.policy import PolicyId
from opd_mesh.policy_weights import LoraFactors, policy_digest, verify_tensors
from opd_mesh.torch_tensors import from_numpy

Manifest = rollout_service_pb2.PolicyManifest
FACTOR_A, FACTOR_B = ".lora_A", ".lora_B"


@dataclass
class ServedWeights:
    """What is known of the weights that the engine holds.

    Attributes:
        shapes: of every tensor of a policy, by name.
        base: the checkpoint's own tensors, for as long as adapters may come; None: they are not kept.
        base_digest: of the checkpoint; empty where adapters are not taken.
        policy: None until one has been given.
        digests: of the tensors of ``policy``; empty where they were not announced one by one.
        adapted: weights that an adapter has changed from the checkpoint's.
    """

    shapes: Mapping[str, tuple[int, ...]]
    base: Mapping[str, Tensor] | None = None
    base_digest: str = ""
    policy: PolicyId | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    adapted: frozenset[str] = frozenset()

    def check(self, manifest: Manifest, offered: PolicyId) -> None:
        """Everything that can be said before a byte is taken or memory is set aside.

        Raises:
            InvalidInputError: naming the tensor, or what of the manifest does not fit.
            PolicyBaseMismatchError: it is the change of another policy, or of another checkpoint, than is here.
        """
        announced = dict(manifest.tensor_digests)
        adapter = LoraFactors.from_proto(manifest.adapter) if manifest.HasField("adapter") else None
        if announced and policy_digest(announced, adapter) != offered.digest:
            raise InvalidInputError("is not the digest over tensor_digests", field="manifest.policy.digest")
        given = {header.name: tuple(header.shape) for header in manifest.tensors}
        if unannounced := given.keys() - announced.keys() if announced else set():
            raise InvalidInputError("has no digest", field=f"tensor_digests[{min(unannounced)}]")
        if adapter is not None:
            self._check_adapter(adapter, given, announced)
            return
        expected = announced.keys() if announced else given.keys()
        _require_all(self.shapes.keys(), expected)
        for name in given.keys() | announced.keys():
            if name not in self.shapes:
                raise InvalidInputError("the model has no weight of that name", field=f"tensors[{name}]")
        for name, shape in given.items():
            if shape != self.shapes[name]:
                raise InvalidInputError(
                    f"shape {list(shape)}, the model has {list(self.shapes[name])}", field=f"tensors[{name}]"
                )
        left_out = announced.keys() - given.keys()
        if not left_out:
            return
        if not manifest.HasField("base"):
            _require_all(announced.keys(), given.keys())
        base = manifest.base
        if self.policy is None or (base.run_id, base.digest) != (self.policy.run_id, self.policy.digest):
            raise PolicyBaseMismatchError(
                f"a change of policy {base.digest[:12]}… cannot be applied: {self.policy or 'no policy'} is served; "
                "send all tensors",
                field="manifest.base",
            )
        for name in left_out:
            if announced[name] != self.digests.get(name):
                raise PolicyBaseMismatchError(
                    "was left out, but is not as in the policy that is served; send all tensors",
                    field=f"tensors[{name}]",
                )

    def _check_adapter(
        self, adapter: LoraFactors, given: Mapping[str, tuple[int, ...]], announced: Mapping[str, str]
    ) -> None:
        if not announced:
            raise InvalidInputError("an adapter's factors are announced one by one", field="manifest.tensor_digests")
        if not self.base_digest or adapter.base_digest != self.base_digest or self.base is None:
            raise PolicyBaseMismatchError(
                f"the adapter changes checkpoint {adapter.base_digest[:12]}…, but "
                + (f"{self.base_digest[:12]}… is here" if self.base is not None else "no checkpoint's weights are kept")
                + "; send merged weights",
                field="manifest.adapter.base_digest",
            )
        _require_all({name for module in adapter.scaling for name in (module + FACTOR_A, module + FACTOR_B)}, given)
        for module in adapter.scaling:
            weight = self.shapes.get(f"{module}.weight")
            if weight is None or len(weight) != 2:
                raise InvalidInputError("the model has no linear layer of that name", field=f"adapter[{module}]")
            out, inner = weight[::-1] if module in adapter.transposed else weight
            first, second = given[module + FACTOR_A], given[module + FACTOR_B]
            if not (len(first) == len(second) == 2 and first[1] == inner and second == (out, first[0])):
                raise InvalidInputError(
                    f"factors [r, {inner}] and [{out}, r] are needed, got {list(first)} and {list(second)}",
                    field=f"adapter[{module}]",
                )
        if extra := given.keys() - {m + suffix for m in adapter.scaling for suffix in (FACTOR_A, FACTOR_B)}:
            raise InvalidInputError("is no factor of a module of the adapter", field=f"tensors[{min(extra)}]")

    @torch.no_grad()
    def tensors_of(self, manifest: Manifest, offered: PolicyId, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Verify the bytes, and make the weights that the engine has to exchange; slow, so in a thread.

        Raises:
            CorruptWeightsError: the bytes are not those announced.
            PolicyBaseMismatchError: as :meth:`check`.
        """
        tensors = {name: from_numpy(array) for name, array in arrays.items()}
        if not manifest.tensor_digests:
            if (digest := state_digest(tensors.items())) != offered.digest:
                raise CorruptWeightsError(
                    f"the weights received hash to {digest[:16]}…, policy {offered} was announced; the old policy stays"
                )
            return tensors
        verify_tensors(arrays, manifest.tensor_digests, offered)
        if not manifest.HasField("adapter"):
            return tensors
        adapter = LoraFactors.from_proto(manifest.adapter)
        if self.base is None:  # let go of while the bytes came
            raise PolicyBaseMismatchError("the checkpoint's weights are not kept any more; send merged weights")
        changed = {}
        for module, scaling in adapter.scaling.items():
            base = self.base[f"{module}.weight"]
            delta = tensors[module + FACTOR_B].float() @ tensors[module + FACTOR_A].float() * scaling
            changed[f"{module}.weight"] = base.float() + (delta.T if module in adapter.transposed else delta).to(
                base.device
            )
        return changed | {name: self.base[name] for name in self.adapted if name not in changed}

    def accept(self, manifest: Manifest, offered: PolicyId) -> None:
        """The engine holds them now."""
        self.policy, self.digests = offered, dict(manifest.tensor_digests)
        if manifest.HasField("adapter"):
            self.adapted = frozenset(f"{module}.weight" for module in manifest.adapter.scaling)
        else:
            # The whole model is trained: the checkpoint's own weights would be a second copy that nobody asks for.
            self.base, self.base_digest = None, ""


def _require_all(wanted: Iterable[str], given: Iterable[str]) -> None:
    missing = sorted(set(wanted) - set(given))
    if missing:
        raise InvalidInputError(
            f"{missing[0]} is missing ({len(missing)} in all); a policy holds every parameter",
            field="manifest.tensors",
        )
