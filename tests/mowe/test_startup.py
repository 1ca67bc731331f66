"""What importing costs, in processor time, which does not depend on what else runs on the machine."""

from __future__ import annotations

import json
import subprocess
import sys

LIMIT = 1.5  # seconds, beyond torch and transformers

TIMED = """
import json, sys, time
{before}
start = time.process_time()
{timed}
print(json.dumps([time.process_time() - start, sorted(sys.modules)]))
"""


def run(timed: str, before: str = "") -> tuple[float, set[str]]:
    """Seconds of processor time that the timed code takes in a new process, and the modules it has at the end."""
    code = TIMED.format(before=before, timed=timed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout.splitlines()[-1])
    return seconds, set(modules)


def test_import_is_quick_and_brings_neither_torch_nor_transformers() -> None:
    seconds, modules = run("import mowe")
    assert seconds < LIMIT
    assert not {"torch", "transformers", "numpy"} & modules


def test_every_name_is_quick_beyond_torch_and_transformers() -> None:
    before = "import torch, transformers\nfrom transformers import AutoModelForMultimodalLM, AutoProcessor"
    seconds, modules = run("import mowe\nfor name in mowe.__all__: getattr(mowe, name)", before)
    assert seconds < LIMIT
    assert not {"peft", "bitsandbytes", "matplotlib"} & modules


def test_the_first_name_makes_auto_classes_know_all() -> None:
    """`import mowe` alone cannot: it would have to import torch."""
    check = """
from mowe import MoweConfig
from transformers import AutoConfig
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
assert type(AutoConfig.for_model("mowe")) is MoweConfig
for mapping in (FEATURE_EXTRACTOR_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, PROCESSOR_MAPPING):
    assert mapping[MoweConfig].__module__.startswith("mowe.")
"""
    run(check)
