"""Settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Before transformers is imported anywhere: no test reaches a hub, and bars of progress are noise in a failure.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.pop("OPD_REDIS_URL", None)
# Before triton is imported anywhere: without a GPU its kernels run in its interpreter, on tensors of the CPU.
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"
# Tiny models gain nothing from a second thread, and lose much where two processes share two cores.
os.environ["OMP_NUM_THREADS"] = "1"
# No example is wrong for being slow: machines are shared.
# The same examples on every machine, so that a red run is about the change; HYPOTHESIS_PROFILE=explore looks further.
hypothesis.settings.register_profile("opd", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "opd"))


@pytest.fixture(autouse=True)
def _torch_settings() -> Iterator[None]:
    """A server in the test's own process may change torch's global settings; the next test must not see that."""
    import sys

    yield
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
