"""Help and imports are quick: nothing heavy is loaded before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def python(code: str, *arguments: str, stdout: Any = subprocess.PIPE, **variables: str) -> Any:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"} | variables
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["routes", "--help"], ["routes", "--bogus"]])
def test_help_loads_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = """
import sys
from mowe.cli import main
try:
    main()
finally:
    print("LOADED", [name for name in ("torch", "transformers", "numpy", "matplotlib") if name in sys.modules])
"""
    done = python(code, *arguments)
    assert done.stdout.endswith("LOADED []\n")
    assert done.returncode == (2 if "--bogus" in arguments else 0)


def test_help_names_every_command() -> None:
    said = python("from mowe.cli import main; main()", "--help").stdout
    assert all(f" {command} " in said for command in ("demo", "evaluate", "generate", "routes", "train", "info"))


def test_import_costs_little_beyond_torch_and_transformers() -> None:
    code = (
        "import torch, transformers, time; start = time.process_time(); import mowe; print(time.process_time() - start)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5


def test_the_process_ends_bad_input_without_a_traceback(tmp_path: Path) -> None:
    fake = tmp_path / "fake.mp3"
    fake.write_bytes(b"\xff\xfb\x90\x00" + bytes(range(256)) * 80)
    done = python("from mowe.cli import main; main()", "routes", str(fake))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {fake}: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["train", "--help"], ["info", "--json"]])
def test_a_full_disk_is_told_in_one_line(arguments: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = python("from mowe.cli import main; main()", *arguments, stdout=full, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stderr.endswith("cannot be written (No space left on device)\n")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["info"], ["info", "--json"]])
def test_a_reader_that_has_gone_is_told_nothing(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = python("from mowe.cli import main; main()", *arguments, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_error_that_cannot_be_told_has_its_exit_code() -> None:
    code = "import sys; sys.stderr = open('/dev/full', 'w'); from mowe.cli import main; main()"
    assert python(code, "bogus").returncode == 2


def test_a_working_directory_that_was_removed_is_told(tmp_path: Path) -> None:
    code = f"import os; os.chdir({str(tmp_path / 'gone')!r}); os.rmdir(os.getcwd()); from mowe.cli import main; main()"
    for command in (["info"], ["train", "run.yaml"]):
        (tmp_path / "gone").mkdir()
        done = python(code, *command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: the working directory has been removed, change into another one\n"


def test_streams_that_are_closed_are_not_taken_for_files() -> None:
    code = "import os; os.close(0); os.close(2); from mowe.cli import main; main()"
    done = python(code, "routes", str(ROOT / "mowe/assets/clips/english_gb.flac"), "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["clips"]
