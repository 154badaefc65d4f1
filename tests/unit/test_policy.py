"""The order of policies, against a naive model of what a rollout server may serve."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mesh.errors import RequestConflictError, StalePolicyError
from opd_mesh.policy import PolicyId, is_new_policy


def policy(lineage: int, version: int, digest: str = "a", run_id: str = "r") -> PolicyId:
    return PolicyId(run_id, lineage, version, digest)


SERVED = policy(2, 5)
POLICIES = st.builds(
    PolicyId, st.sampled_from(["r", "s"]), st.integers(0, 3), st.integers(0, 3), st.sampled_from(["a", "b"])
)


def test_the_first_policy_is_new() -> None:
    assert is_new_policy(None, policy(0, 0)) is True


@pytest.mark.parametrize(
    ("offered", "new"),
    [
        (policy(2, 6), True),
        (policy(2, 9), True),  # versions may be skipped
        (policy(3, 0), True),  # resumed from an older checkpoint
        (policy(3, 5), True),
        (policy(1, 1, run_id="s"), True),  # another run
        (policy(2, 5, "a", "s"), True),
        (policy(2, 5), False),  # sent again
    ],
)
def test_what_is_taken(offered: PolicyId, new: bool) -> None:
    assert is_new_policy(SERVED, offered) is new


@pytest.mark.parametrize("offered", [policy(2, 4), policy(2, 0), policy(1, 5), policy(1, 99), policy(2, 4, "b")])
def test_what_is_older_is_refused(offered: PolicyId) -> None:
    with pytest.raises(StalePolicyError, match="a trainer that was resumed opens a new lineage") as caught:
        is_new_policy(SERVED, offered)
    assert caught.value.field == "policy"


def test_the_same_version_with_other_weights_is_a_conflict() -> None:
    with pytest.raises(RequestConflictError, match="with other weights"):
        is_new_policy(SERVED, policy(2, 5, "b"))


@given(st.lists(POLICIES, max_size=12))
def test_a_server_never_goes_back_within_a_run(offers: list[PolicyId]) -> None:
    served: PolicyId | None = None
    history: list[PolicyId] = []  # the naive model: all that was served since the run last changed
    for offered in offers:
        if history and history[0].run_id != offered.run_id:
            history = []
        expected: bool | type[Exception]
        same = [past for past in history if (past.lineage, past.version) == (offered.lineage, offered.version)]
        if any((past.lineage, past.version) > (offered.lineage, offered.version) for past in history):
            expected = StalePolicyError
        elif same:
            expected = False if same[0].digest == offered.digest else RequestConflictError
        else:
            expected = True
        if isinstance(expected, bool):
            assert is_new_policy(served, offered) is expected
        else:
            with pytest.raises(expected):
                is_new_policy(served, offered)
        if expected is True:
            served = offered
            history.append(offered)
