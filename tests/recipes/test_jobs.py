"""The lab's commands as a user calls them: their jobs run in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipes.nano", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_a_part_is_made_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = lab("pretrain", "--only", "silent", "--lab", str(tmp_path), "--workers", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results" / "parts" / "silent.json").read_text())["part"] == "silent"
    assert (tmp_path / "parts" / "silent" / "model.safetensors").exists()


def test_names_and_devices_that_there_are_not(tmp_path: Path) -> None:
    for arguments, told in ((["--only", "bass"], "no bass; there are silent"), (["--device", "tpu"], "got tpu")):
        done = lab("pretrain", "--lab", str(tmp_path), *arguments)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
