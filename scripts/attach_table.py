"""Run the tests of every model type and write what they say as a table into docs/attach.md."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "attach.md"
TESTS = ROOT / "tests" / "mowe" / "attach" / "test_types.py"
BEGIN, END = "<!-- table: scripts/attach_table.py -->\n", "<!-- end of table -->\n"

COLUMNS = {
    "concat": ("test_fusion", "concat"),
    "residual": ("test_fusion", "residual"),
    "batch": ("test_batch", ""),
    "windows": ("test_windows", ""),
    "4-bit": ("test_four_bit", ""),
    "LoRA": ("test_lora", ""),
    "adapter folder": ("test_adapter_folder", ""),
}


def outcomes(report: Path) -> dict[tuple[str, str], dict[str, str]]:
    """(test, its other parameter) -> model type -> "yes", "no" or "skipped"."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test, _, parameters = case.get("name", "").partition("[")
        model_type, _, other = parameters.rstrip("]").partition("-")
        if model_type:
            failed = case.find("failure") is not None or case.find("error") is not None
            outcome = "no" if failed else "skipped" if case.find("skipped") is not None else "yes"
            found.setdefault((test, other), {})[model_type] = outcome
    return found


def table(found: dict[tuple[str, str], dict[str, str]]) -> str:
    """One row a model type; a dash where there is nothing to test."""
    types = sorted({model_type for of_test in found.values() for model_type in of_test})
    rows = [["model type", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for model_type in types:
        cells = [found.get(key, {}).get(model_type, "-") for key in COLUMNS.values()]
        rows.append([f"`{model_type}`", *("alone" if cell == "skipped" else cell for cell in cells)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        status = pytest.main(["-q", str(TESTS), f"--junitxml={report}"])
        text = PAGE.read_text()
        before, rest = text.split(BEGIN)
        PAGE.write_text(before + BEGIN + table(outcomes(report)) + END + rest.split(END)[1])
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
