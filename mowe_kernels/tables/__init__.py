"""What was measured on a device: which kernels were found right there, and the launch settings that were fastest.

`python -m mowe_kernels.tune` makes such a table. Those of this folder come with the package; the user's own, in the
cache directory, go before them. A device without one gets that of the package for its compute capability: the same
instructions run on both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

PACKAGED = Path(__file__).parent


@dataclass(frozen=True)
class AttentionChoice:
    """Who computes attention fastest, forward and backward, for heads of `head_dim` columns and 16-bit elements.

    longest: the choice is for sequences of at most so many rows, None for those of any length. equal_lengths: for
    sequences that are all of one length.
    """

    head_dim: int
    longest: int | None
    equal_lengths: bool
    forward: str
    backward: str


@dataclass(frozen=True)
class DeviceTable:
    """device: its name as torch gives it. made_with: versions. ops: the ops whose kernels are right on it.

    settings: by "<name of the setting>, <key>", a launch setting that is faster than the one chosen without a table.
    capability: of the device, 90 for 9.0.
    """

    device: str
    ops: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    attention: tuple[AttentionChoice, ...] = ()
    made_with: Mapping[str, str] = field(default_factory=dict)
    capability: int | None = None

    def attention_of(self, head_dim: int, longest: int, equal_lengths: bool) -> AttentionChoice | None:
        """The first choice that covers this case; without one of its own, equal lengths are lengths like others."""
        for equal in (True, False) if equal_lengths else (False,):
            for choice in self.attention:
                fits = choice.longest is None or longest <= choice.longest
                if choice.head_dim == head_dim and choice.equal_lengths == equal and fits:
                    return choice
        return None

    def write(self, folder: Path) -> Path:
        """Write the table into a folder, which is made where it is missing; the file's path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file_name(self.device)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
        partial.replace(path)
        return path


def user_folder() -> Path:
    """Where the user's own tables lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mowe_kernels"


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@cache
def of_device(index: int | None) -> DeviceTable | None:
    """The table of a CUDA device or of its kind, None where there is none, and for the CPU, which has no number."""
    if index is None:
        return None
    return of_name(torch.cuda.get_device_name(index)) or of_capability(compute_capability(index))


def compute_capability(index: int) -> int:
    """90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def of_capability(capability: int) -> DeviceTable | None:
    """The package's table of a device of a compute capability, None where it has none."""
    packaged = map(read, sorted(PACKAGED.glob("*.json")))
    return next((table for table in packaged if table.capability == capability), None)


def of_name(device: str) -> DeviceTable | None:
    """The table of the devices of a name. Raises ValueError for a file that is not a table."""
    for folder in (user_folder(), PACKAGED):
        path = folder / file_name(device)
        if path.is_file():
            return read(path)
    return None


def read(path: Path) -> DeviceTable:
    """Raises ValueError, naming the file, where it is not a table."""
    try:
        entries = json.loads(path.read_text())
        choices = tuple(AttentionChoice(**choice) for choice in entries.pop("attention"))
        table = DeviceTable(**entries | {"ops": tuple(entries["ops"])}, attention=choices)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        known = ", ".join(f.name for f in fields(DeviceTable))
        raise ValueError(
            f"{path}: expected a table of {known} as `python -m mowe_kernels.tune` writes it ({error}); "
            "delete the file or make it anew"
        ) from None
    return table
