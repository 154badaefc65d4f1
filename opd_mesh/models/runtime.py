"""Torch's own settings: device, threads, determinism. Called once per process, before a model is loaded."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os

import torch

from opd_mesh.errors import ConfigError


def configure_torch(device: str, *, threads: int, deterministic: bool) -> str:
    """Choose the device and fix what determinism asks for.

    Args:
        device: "auto", "cpu" or "cuda".
        threads: of the CPU; 0 leaves torch's choice, and means 1 in
            deterministic mode, where the count must be the same on every run.

    Returns:
        "cpu" or "cuda".

    Raises:
        ConfigError: "cuda" where torch sees no device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but torch sees no GPU: install a CUDA build of torch, or set device: auto", field="device"
        )
    if threads:
        torch.set_num_threads(threads)
    if deterministic:
        # cuBLAS reads this when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        if not threads:
            torch.set_num_threads(1)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def release_free_memory() -> None:
    """Give back to the system what was freed: loading and converting models leaves a lot of it with the allocator."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
