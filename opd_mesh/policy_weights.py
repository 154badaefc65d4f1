"""A policy's weights on their way to a rollout server: digests, differences, adapters, shared memory.

Works on numpy arrays, so that a client needs no torch.

A policy's digest is SHA-256 over the digests of its tensors (:func:`policy_digest`), so that either side can tell which
tensors differ between two policies, leave the others out, and hash on as many cores as there are.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import stat
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from opd.v1 import rollout_service_pb2

from opd_mesh.errors import CorruptWeightsError, PreconditionError
from opd_mesh.tensors import ALIGNMENT, CODES, byte_view, dtype_name

SHARED_MEMORY = Path("/dev/shm")
_SHARED_NAME = re.compile(r"opd-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """What makes a LoRA adapter's tensors (``m.lora_A`` [r, in], ``m.lora_B`` [out, r] per module m) a policy.

    Attributes:
        base_digest: SHA-256 of the checkpoint that they change.
        scaling: by module; the weight is that of the checkpoint plus scaling · B · A.
        transposed: modules whose weight is stored [in, out].
    """

    base_digest: str
    scaling: Mapping[str, float]
    transposed: frozenset[str] = frozenset()

    def to_proto(self) -> rollout_service_pb2.LoraAdapter:
        """Dataclass → message."""
        return rollout_service_pb2.LoraAdapter(
            base_digest=self.base_digest, scaling=self.scaling, transposed=sorted(self.transposed)
        )

    @classmethod
    def from_proto(cls, message: rollout_service_pb2.LoraAdapter) -> LoraFactors:
        """Message → dataclass."""
        return cls(message.base_digest, dict(message.scaling), frozenset(message.transposed))


@dataclass(frozen=True)
class PolicyWeights:
    """All tensors of a policy.

    Attributes:
        tensors: by name, those of the plain model or, with ``adapter``, its factors.
        digests: SHA-256 (hex) of each, see :func:`tensor_digest`.
    """

    tensors: Mapping[str, np.ndarray]
    digests: Mapping[str, str]
    adapter: LoraFactors | None = None
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", policy_digest(self.digests, self.adapter))

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray], adapter: LoraFactors | None = None) -> PolicyWeights:
        """Hashes every byte once, on all cores this process may use."""
        return cls(tensors, tensor_digests(tensors), adapter)


def tensor_digest(name: str, array: np.ndarray) -> str:
    """SHA-256 (hex) over ``len(header) as 8 bytes little-endian ‖ header ‖ bytes``; header is the JSON ``[name, dtype,
    shape]``."""
    header = json.dumps([name, dtype_name(CODES[array.dtype]), list(array.shape)]).encode()
    digest = hashlib.sha256(len(header).to_bytes(8, "little") + header)
    digest.update(byte_view(array))  # lets other threads run
    return digest.hexdigest()


def tensor_digests(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """By name."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="sha256") as pool:
        return dict(zip(tensors, pool.map(tensor_digest, tensors.keys(), tensors.values()), strict=True))


def policy_digest(digests: Mapping[str, str], adapter: LoraFactors | None = None) -> str:
    """SHA-256 (hex) over the JSON ``[[name, digest], …]``, sorted by name, of all tensors of a policy.

    Of an adapter: over ``[tensors as above, base digest, [[module, scaling], …] sorted, transposed sorted]``.
    """
    value: list[object] = [list(item) for item in sorted(digests.items())]
    if adapter is not None:
        scaling = [[module, repr(scale)] for module, scale in sorted(adapter.scaling.items())]
        value = [value, adapter.base_digest, scaling, sorted(adapter.transposed)]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def verify_tensors(arrays: Mapping[str, np.ndarray], announced: Mapping[str, str], policy: object) -> None:
    """Hash what was received.

    Raises:
        CorruptWeightsError: naming the first tensor whose bytes are not those announced.
    """
    for name, digest in tensor_digests(arrays).items():
        if digest != announced[name]:
            raise CorruptWeightsError(
                f"the bytes received hash to {digest[:16]}…, policy {policy} announced {announced[name][:16]}…; "
                "the old policy stays",
                field=f"tensors[{name}]",
            )


# --- the same machine ------------------------------------------------------------------------------------------
@cache
def host_id() -> str:
    """Names this running machine, its shared memory and our user there: SHA-256 over boot id, device and user id."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        device = SHARED_MEMORY.stat().st_dev
    except OSError:  # not Linux: nobody is on the same machine
        return ""
    return hashlib.sha256(f"{boot.strip()} {device} {os.getuid()}".encode()).hexdigest()


class SharedTensors:
    """A file in shared memory for arrays' bytes, there from construction until the context ends.

    What a killed process left behind is removed by the next one: a file that is in use is locked.

    Raises:
        OSError: it cannot be made; from :meth:`write`: there is no room, or the context has ended.
    """

    def __init__(self) -> None:
        remove_orphans()
        self.message = rollout_service_pb2.SharedMemory(name=f"opd-{uuid.uuid4().hex}")
        self._path = SHARED_MEMORY / self.message.name
        self._lock = os.open(self._path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def write(self, arrays: Sequence[np.ndarray]) -> None:
        """Once. Slow, so in a thread."""
        places, total = _places([array.nbytes for array in arrays])
        # Of its own: the context may end, because its caller was cancelled, while this still writes.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if total:
                os.posix_fallocate(descriptor, 0, total)  # full now, and not by SIGBUS or ENOSPC half-way
            for array, place in zip(arrays, places, strict=True):
                view, done = byte_view(array), 0
                while done < len(view):
                    done += os.pwrite(descriptor, view[done:], place + done)
        finally:
            os.close(descriptor)
        self.message.byte_size = total

    def __enter__(self) -> SharedTensors:
        return self

    def __exit__(self, *args: object) -> None:
        self._path.unlink(missing_ok=True)  # what is still being written, or read, is freed with its last user
        os.close(self._lock)


def remove_orphans() -> None:
    """Files of this user whose process ended without removing them; a model's size each."""
    for path in SHARED_MEMORY.glob("opd-*"):
        with suppress(OSError):  # in use, another user's, or gone
            if not _SHARED_NAME.fullmatch(path.name) or path.lstat().st_uid != os.getuid():
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def read_shared(shared: rollout_service_pb2.SharedMemory, arrays: Sequence[np.ndarray]) -> None:
    """Fill the arrays with what a client of this machine has put there. Copied, so that nothing it does later matters.

    Raises:
        PreconditionError: there is no such file of this user here.
        CorruptWeightsError: it is shorter than announced.
    """
    if not _SHARED_NAME.fullmatch(shared.name):
        raise PreconditionError("not a name of ours", field="shared_memory.name")
    places, total = _places([array.nbytes for array in arrays])
    try:
        descriptor = os.open(SHARED_MEMORY / shared.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PreconditionError(f"cannot be read here: {error.strerror}", field="shared_memory.name") from error
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid() or not stat.S_ISREG(status.st_mode):
            raise PreconditionError("is no file of this server's user", field="shared_memory.name")
        if not status.st_size == shared.byte_size == total:
            raise CorruptWeightsError(
                f"holds {status.st_size} bytes, {shared.byte_size} were announced, the tensors need {total}; "
                "the old policy stays",
                field="shared_memory",
            )
        for array, place in zip(arrays, places, strict=True):
            view, done = byte_view(array), 0  # read, not mapped: a file that shrinks must not end this process
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], place + done)
                if not count:
                    raise CorruptWeightsError("ends early; the old policy stays", field="shared_memory")
                done += count
    except OSError as error:
        raise PreconditionError(f"cannot be read here: {error.strerror}", field="shared_memory") from error
    finally:
        os.close(descriptor)


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Offset of each array, and the whole size."""
    places, end = [], 0
    for size in sizes:
        places.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return places, end
