"""The order of policies: a pure function, the same in every rollout server."""

from __future__ import annotations

from dataclasses import dataclass

from opd_mesh.errors import RequestConflictError, StalePolicyError


@dataclass(frozen=True, slots=True)
class PolicyId:
    """Which weights. ``lineage`` counts starts and resumes of the run, ``version`` the optimizer steps behind them."""

    run_id: str
    lineage: int
    version: int
    digest: str

    def __str__(self) -> str:
        return f"{self.run_id}/{self.lineage}/{self.version} ({self.digest[:12]}…)"


def is_new_policy(served: PolicyId | None, offered: PolicyId) -> bool:
    """True: swap it in. False: it is served already.

    Within a lineage a version never falls; a higher lineage (the run was resumed from a checkpoint) supersedes a
    lower one at any version; another run supersedes whatever is served.

    Raises:
        StalePolicyError: older than what is served.
        RequestConflictError: the same version with other weights.
    """
    if served is None or served.run_id != offered.run_id:
        return True
    if (offered.lineage, offered.version) < (served.lineage, served.version):
        raise StalePolicyError(
            f"policy {offered} is older than {served}, which is served; a trainer that was resumed opens a new lineage",
            field="policy",
        )
    if (offered.lineage, offered.version) > (served.lineage, served.version):
        return True
    if offered.digest != served.digest:
        raise RequestConflictError(f"policy {offered} is served already, with other weights: {served}", field="policy")
    return False
