"""The report in docs says what the committed result files and notes say."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from recipes.nano.__main__ import app
from recipes.nano.report import write_report
from recipes.nano.runs import RUNS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "recipes" / "nano" / "results"


def test_report_is_that_of_the_committed_results(tmp_path: Path) -> None:
    write_report(RESULTS, tmp_path / "reproduction.md")
    assert (tmp_path / "reproduction.md").read_text() == (ROOT / "docs" / "reproduction.md").read_text()
    pictures = {path.name for path in (tmp_path / "reproduction").iterdir()}
    assert pictures == {path.name for path in (ROOT / "docs" / "reproduction").iterdir()}


def test_without_results_one_line_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", "--lab", str(tmp_path)], env={"COLUMNS": "500"})
    assert result.exit_code == 2
    assert f"--results {tmp_path / 'results'}: no result files" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_result_files_tell_nothing_of_the_machine() -> None:
    paths = sorted(RESULTS.rglob("*.json"))
    assert len(paths) >= len(RUNS)
    for path in paths:
        text = path.read_text()
        assert '"/' not in text and "\\\\" not in text, path.name
