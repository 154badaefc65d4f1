"""The measured table for the documentation: generated between two marks, the rest of the page stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_statistics import write_pipeline

from opd_mesh.errors import PreconditionError
from opd_mesh.pipeline.statistics import summarize
from opd_mesh.report.experiment import experiment_markdown, main, marks_of, update_docs

BEGIN, END = marks_of("tiny")
OTHER = "{}\nof another\n{}".format(*marks_of("tiny-1k"))


def test_the_tables_in_markdown(tmp_path: Path) -> None:
    text = experiment_markdown(summarize(write_pipeline(tmp_path), resamples=200), "make experiment")
    assert text.startswith("Made by `make experiment`: 2 seeds (0, 1). opd has 82")
    assert "| model | add | sort | mean |\n| --- | ---: | ---: | ---: |\n| base | 30.0 (" in text
    assert "| adder (expert of add) | <u>90.0</u> (" in text
    assert "| opd | **75.0** (" in text
    assert "| opd − soup | +35.0 (" in text
    assert "| adder (add) | 25.0 | 45.0 | 85.0 |" in text
    assert "| opd | optimizer.lr = 0.002 | 75.0 | yes |" in text
    assert "| adder | 40 | 3,000 | 12.5 s |" in text
    assert "took 6 min 40 s; on the clock it was 1 min 1 s." in text
    for part in text.split("\n\n"):  # every row of a table is as wide as its head
        if part.startswith("|"):
            assert len({line.count("|") for line in part.splitlines()}) == 1


def test_names_do_not_break_the_table(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path)
    results = (folder / "results.json").read_text().replace('"soup": ', '"so|up_<b>": ')
    (folder / "results.json").write_text(results)
    text = experiment_markdown(summarize(folder, resamples=100), "x")
    assert "| so\\|up\\_\\<b> (soup) |" in text


def test_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    folder, docs = write_pipeline(tmp_path), tmp_path / "docs"
    docs.mkdir()
    (docs / "experiment.md").write_text(f"# Before\n\n{BEGIN}\nof last year\n{END}\n\n{OTHER}\n")
    command = "make 'experiment'"
    assert main([str(folder), "--docs", str(docs), "--command", command]) == 0
    text = (docs / "experiment.md").read_text()
    assert text.startswith(f"# Before\n\n{BEGIN}\n\nMade by `{command}`")
    assert text.endswith(f"\n{END}\n\n{OTHER}\n")
    assert "of last year" not in text
    told = json.loads((docs / "tiny.json").read_text())
    assert told["command"] == command
    assert told == summarize(folder).to_json(command)
    update_docs(summarize(folder), docs, command)
    assert (docs / "experiment.md").read_text() == text  # the same again


def test_a_page_is_begun_where_there_is_none(tmp_path: Path) -> None:
    update_docs(summarize(write_pipeline(tmp_path), resamples=100), tmp_path / "new", "x")
    assert (tmp_path / "new" / "experiment.md").read_text().startswith("# The experiment\n")


@pytest.mark.parametrize("text", ["no marks", f"{BEGIN}", f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_marks_is_left_alone(tmp_path: Path, text: str) -> None:
    folder = write_pipeline(tmp_path)
    (tmp_path / "experiment.md").write_text(text)
    with pytest.raises(PreconditionError, match="must hold each of these two lines once"):
        update_docs(summarize(folder, resamples=100), tmp_path, "x")
    assert (tmp_path / "experiment.md").read_text() == text
    assert not (tmp_path / "tiny.json").exists()


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path)
    results = (folder / "results.json").read_text().replace('"pipeline": "tiny"', '"pipeline": "../tiny"')
    (folder / "results.json").write_text(results)
    with pytest.raises(PreconditionError, match="cannot name a file"):
        update_docs(summarize(folder, resamples=100), tmp_path / "docs", "x")


def test_what_is_wrong_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--docs", str(tmp_path), "--command", "x"]) == 2
    assert "is not there yet" in capsys.readouterr().err
