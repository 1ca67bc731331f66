"""What a fresh clone relies on: pins that cover the dependencies, set-up that runs once, clips that are sound."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for name, _, version in (line.partition("==") for line in (ROOT / "constraints.txt").read_text().split("\n"))
    if version
}
CLIPS = ROOT / "mowe" / "assets" / "clips"


def declared(*extras: str) -> list[Requirement]:
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for lines in lists for line in lines]


@pytest.mark.parametrize("requirement", declared("train", "docs", "test"), ids=str)
def test_every_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    if requirement.name != PROJECT["name"]:
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def make(folder: Path, *arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "LC_ALL": "C"}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_installs_once(clone: Path, target: str) -> None:
    python = f"PYTHON={sys.executable}"
    first = make(clone, "-n", target, python).stdout
    assert first.count("pip ") == 2 and first.index(" torch\n") < first.index(" -e ")
    (clone / ".venv").mkdir()
    for stamp in (".torch", ".installed", ".installed-test"):
        (clone / ".venv" / stamp).touch()
    assert "pip " not in make(clone, "-n", target, python).stdout


def test_make_takes_cpu_builds_only_without_a_gpu(clone: Path) -> None:
    driver = clone / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    for status, cpu_builds in ((0, False), (1, True)):
        driver.write_text(f"#!/bin/sh\nexit {status}\n")
        driver.chmod(0o755)
        path = f"{driver.parent}:{os.environ['PATH']}"
        said = make(clone, "-n", "demo", f"PYTHON={sys.executable}", path=path).stdout
        assert ("/whl/cpu" in said) is cpu_builds


@pytest.mark.parametrize("version", [None, "3.10.4"])
def test_make_names_the_python_it_needs(clone: Path, version: str | None) -> None:
    python = clone / "old-python"
    if version is not None:
        python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo Python {version}\n')
        python.chmod(0o755)
    done = make(clone, "test", f"PYTHON={python}")
    found = "missing" if version is None else f"Python {version}"
    assert done.returncode == 2 and done.stdout == ""
    assert f"Python 3.11 or newer is needed; {python} is {found}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (clone / ".venv").exists()


def test_source_distribution_holds_what_is_compiled(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=tar"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    with tarfile.open(next((tmp_path / "dist").iterdir())) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"constraints.txt", *(f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir())} <= names


def test_clips_are_listed() -> None:
    clips = json.loads((CLIPS / "clips.json").read_text(encoding="utf-8"))
    assert sorted(clip["file"] for clip in clips) == sorted(path.name for path in CLIPS.glob("*.flac"))
    assert all((clip["text"] is None) == (clip["language"] is None) for clip in clips)
    assert sum(path.stat().st_size for path in CLIPS.iterdir()) < 600_000
    for clip in clips:
        samples, rate = soundfile.read(CLIPS / clip["file"], dtype="float32")
        assert rate == 16_000 and samples.ndim == 1
        assert len(samples) / rate == pytest.approx(clip["seconds"], abs=1e-3)
        assert 1.5 <= clip["seconds"] <= 9
        assert np.sqrt(np.mean(samples**2)) > 0.02 and np.abs(samples).max() < 0.99
