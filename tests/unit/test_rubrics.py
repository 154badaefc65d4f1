"""Rubrics: validation, digests, overall scores, the library, and the ones that come with the recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mesh.config.base import parse_config
from opd_mesh.config.rubrics import Rubric, RubricLibrary, Scale, as_text, load_rubric
from opd_mesh.errors import ConfigError

SHIPPED = Path(__file__).resolve().parents[2] / "recipes" / "rubrics"
CLEAR: dict[str, Any] = {"name": "clear", "scale": {"min": 1, "max": 5}, "anchors": {1: "a riddle", 5: "plain"}}
TRUE: dict[str, Any] = {"name": "true", "scale": {"min": 0, "max": 1}, "weight": 3, "hard_requirement": True}


def rubric(**changes: Any) -> Rubric:
    return parse_config(Rubric, {"name": "r", "criteria": [CLEAR, TRUE]} | changes, source="r")


def test_the_overall_score_is_the_weighted_mean_of_shares() -> None:
    assert rubric().overall({"clear": 4, "true": 1}) == pytest.approx((0.75 + 3) / 4)
    assert rubric().overall({"clear": 5, "true": 0}) == 0.0  # a hard requirement
    soft = rubric(criteria=[CLEAR, TRUE | {"hard_requirement": False}])
    assert soft.overall({"clear": 5, "true": 0}) == pytest.approx(0.25)


@given(st.floats(1, 5), st.floats(0.01, 1))
def test_the_overall_score_is_within_0_and_1_and_grows_with_each(clear: float, true: float) -> None:
    score = rubric().overall({"clear": clear, "true": true})
    assert 0 <= score <= 1
    assert rubric().overall({"clear": min(5, clear + 0.5), "true": true}) >= score


def test_two_rubrics_have_one_digest_only_if_they_are_the_same() -> None:
    assert rubric().digest == rubric().digest
    for change in ({"version": "2"}, {"criteria": [TRUE, CLEAR]}, {"criteria": [CLEAR]}, {"reasons": "none"}):
        assert rubric(**change).digest != rubric().digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"criteria": []}, "criteria"),
        ({"criteria": [CLEAR, CLEAR]}, "clear stands there more than once"),
        ({"criteria": [CLEAR | {"weight": 0}]}, "all weights are 0"),
        ({"criteria": [CLEAR | {"anchors": {2.5: "x"}}]}, "anchors: 2.5 is no point of the scale"),
        ({"criteria": [CLEAR | {"scale": {"min": 1, "max": 1}}]}, "not above min"),
        ({"criteria": [CLEAR | {"scale": {"min": 0, "max": 1, "step": 0.3}}]}, "does not lead from 0 to 1"),
        ({"criteria": [CLEAR | {"scale": {"min": 0, "max": 1000}}]}, "too many to be told apart"),
        ({"criteria": [CLEAR | {"scale": {"min": 0, "max": 0.0005, "step": 0.00005}}]}, "the point 5e-05 cannot be"),
        ({"criteria": [CLEAR | {"scale": {"min": 0, "max": 1e10, "step": 1e10}}]}, "the point 10000000000.0 cannot be"),
        ({"criteria": [CLEAR | {"scale": {"min": 1e9, "max": 1e9 + 0.5, "step": 0.25}}]}, "cannot be written"),
        ({"criteria": [CLEAR | {"scale": {"min": 0, "max": 1e-13, "step": 1e-14}}]}, "cannot be written"),
        ({"criteria": [CLEAR | {"name": "No spaces"}]}, "name"),
        ({"criteria": [CLEAR | {"description": "two\nlines"}]}, "must be one line"),
        ({"form": "score"}, "of one criterion without a reason"),
        ({"wieght": 1}, "wieght"),
    ],
)
def test_a_rubric_that_cannot_be_meant_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rubric(**change)


def test_points_of_a_scale_are_found_by_number() -> None:
    scale = Scale(min=0, max=1, step=0.1)
    assert [as_text(point) for point in scale.points][:4] == ["0", "0.1", "0.2", "0.3"]
    assert scale.nearest(0.3) == scale.points[3]
    assert [as_text(point) for point in Scale(min=-0.3, max=0.3, step=0.1).points][2:5] == ["-0.1", "0", "0.1"]
    fine = Scale(min=0, max=0.005, step=0.0005)
    assert fine.nearest(0.0005) == fine.points[1]
    assert fine.nearest(0.0005000001) is None  # off by less than the step of a coarse scale would allow
    assert scale.nearest(0.35) is scale.nearest(float("nan")) is scale.nearest(float("inf")) is None


def test_the_library_gives_the_newest_version_by_name_alone() -> None:
    library = RubricLibrary([rubric(version="1.9"), rubric(version="1.10"), rubric(name="other")])
    assert library.names == ["other@1", "r@1.9", "r@1.10"]
    newest, old = library.get("r"), library.get("r@1.9")
    assert newest is not None
    assert old is not None
    assert (newest.version, old.version) == ("1.10", "1.9")
    assert library.get("r@2") is None
    with pytest.raises(ConfigError, match="two rubrics are called r@1 and differ"):
        RubricLibrary([rubric(), rubric(reasons="none")])


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_rubric_that_comes_along_is_valid_and_bears_the_name_of_its_file(path: Path) -> None:
    found = load_rubric(path)
    assert found.name == path.stem
    assert all(criterion.description and criterion.anchors for criterion in found.criteria)


def test_the_rubrics_that_come_along() -> None:
    library = RubricLibrary.of_folder(SHIPPED)
    assert {"writing", "instruction-following", "explanation", "arithmetic"} <= {
        name.partition("@")[0] for name in library.names
    }
    with pytest.raises(ConfigError, match="no folder of rubrics"):
        RubricLibrary.of_folder(SHIPPED / "nowhere")
