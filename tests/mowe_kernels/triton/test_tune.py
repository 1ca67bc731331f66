"""Trying the kernels on a device, with Triton's interpreter for the device and invented times."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from mowe_kernels.tables import AttentionChoice
from mowe_kernels.triton import _launch, grouped_linear, varlen_attention
from mowe_kernels.triton._launch import Tuning, setting
from mowe_kernels.tune import __main__ as tune
from mowe_kernels.tune import driver, search
from mowe_kernels.tune.accuracy import errors
from mowe_kernels.tune.cases import Size, cases

CPU = torch.device("cpu")
TINY = Size(rows=(9, 0, 7, 2), width=24, hidden=40, heads=4, channels=10)


@pytest.mark.parametrize("op", cases(TINY, CPU))
def test_kernels_are_found_right(op):
    assert list(tune.wrong_results(cases(TINY, CPU)[op], (torch.float32, torch.float16))) == []


def test_every_op_with_kernels_is_tried():
    from mowe_kernels.compile_report import ops

    assert set(ops()) == set(cases(TINY, CPU))


def leave_unwritten(monkeypatch):
    monkeypatch.setattr(grouped_linear, "gemm", lambda *args, **kwargs: None)


def round_too_much(monkeypatch):
    forward = grouped_linear.forward
    monkeypatch.setattr(
        grouped_linear, "forward", lambda *a: tuple((1.001 * x if x.numel() else x) for x in forward(*a))
    )


def fail(monkeypatch):
    def forward(*args):
        raise RuntimeError("no such\nlayout")

    monkeypatch.setattr(grouped_linear, "forward", forward)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (leave_unwritten, "result in torch.float32: error nan"),
        (round_too_much, "result in torch.float32: error"),
        (fail, "RuntimeError: no such layout"),
    ],
)
def test_a_wrong_kernel_is_found(monkeypatch, fault, said):
    fault(monkeypatch)
    assert said in "; ".join(tune.wrong_results(cases(TINY, CPU)["grouped_linear"], (torch.float32,)))


def test_wrong_integers_are_found(monkeypatch):
    from mowe_kernels.triton import pack_plan

    forward = pack_plan.forward
    monkeypatch.setattr(pack_plan, "forward", lambda *args: tuple(x.flip(0) for x in forward(*args)))
    assert list(tune.wrong_results(cases(TINY, CPU)["pack_plan"], ())) == ["integers that differ from plain torch's"]


def test_errors_compare_shapes(monkeypatch):
    case = cases(TINY, CPU)["sequence_mean"][0]
    with pytest.raises(ValueError, match="result: shape"):
        outs = iter([torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, 1)])
        errors(lambda x: next(outs).to(x.dtype) + 0 * x.sum(), case.inputs, 4, torch.float32, ("x",))


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({1: 10, 2: 9, 3: 8, 4: 1, 5: 1}, 3),  # 4 is wrong, 5 fails
        ({1: 10, 2: 9.8, 3: 10, 4: 1, 5: 1}, search.UNCHANGED),  # too little to gain
        ({1: 10, 2: 11, 3: 12, 4: 1, 5: 1}, search.UNCHANGED),
    ],
)
def test_the_fastest_right_setting_is_chosen(times, chosen):
    def call():
        value = setting("thing", 1)
        if value == 5:
            raise RuntimeError("out of resources")
        return torch.full((3,), 2.0 if value == 4 else 1.0)

    found, fastest, plain = search.best(
        Tuning("thing", "key", (2, 3, 4, 5), call), lambda call: call() is not None and times[setting("thing", 1)]
    )
    assert (found, plain) == (chosen, 10)
    assert fastest == times[1 if chosen is search.UNCHANGED else chosen]


def test_tunings_are_of_settings_that_are_looked_up(monkeypatch):
    """What a call asks the device's table for is what the search writes into it."""
    monkeypatch.setattr(_launch, "_describe", lambda *args: None)
    few_rows = search.few_rows_in_4_bits(CPU, 16, (1, 3))  # quantising needs values
    monkeypatch.setattr(search, "few_rows_in_4_bits", lambda device: few_rows)
    found = set()
    with _launch.record(90):
        for tuning in search.tunings(cases(TINY, CPU), torch.device("meta"), 48_000):
            assert tuning.candidates
            assert _lookups(tuning) == {f"{tuning.name}, {tuning.key}"}
            found.add(tuning.name)
    assert {"gemm_tile", "nf4_tile", "nf4_few_rows"} < found


@pytest.mark.parametrize(("figure", "in_loop"), [(0, 0), (2, 1), (3, 2)])
def test_few_rows_are_multiplied_in_4_bits(monkeypatch, figure, in_loop):
    monkeypatch.setattr(_launch, "_describe", lambda launched, args: launched.kernel.__name__)
    tuning = search.few_rows_in_4_bits(CPU, 16, (1, 3))
    assert figure in tuning.candidates
    with _launch.record(90) as launched, _launch.override(nf4_few_rows=figure):
        tuning.call()
    assert launched == ["grouped_gemm_nf4_kernel"] * in_loop + ["grouped_gemm_kernel"] * (2 - in_loop)


def _lookups(tuning: Tuning) -> set[str]:
    """The entries of a table that a call asks for and that have the tuning's name."""
    asked = set()

    class Table(dict):
        def __len__(self):
            return 1

        def get(self, name, default):
            asked.add(name)
            return default

    with _launch.assume(_launch.ARCHITECTURES[90]._replace(tuned=Table())):
        tuning.call()
    return {name for name in asked if name.startswith(f"{tuning.name}, ")}


def test_a_whole_table(monkeypatch, capsys):
    """Of three ops, timed by the candidate's own number."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    some = {name: cases(TINY, CPU)[name] for name in ("sequence_mean", "varlen_attention", "pack_plan")}
    monkeypatch.setattr(tune, "cases", lambda size, device: some)
    small = varlen_attention.Settings(16, 16, 4, 1)
    tried = Tuning("attention_forward", "16 bits, heads of 64", (small,), lambda: torch.ones(2))
    monkeypatch.setattr(varlen_attention, "tunings", lambda device, rows: [tried])
    monkeypatch.setattr(search, "LONGEST", (4,))
    monkeypatch.setattr(search, "HEAD_DIMS", (64,))

    def timer(call):
        call()
        return 1.0 if setting("attention_forward", None) == small else 2.0

    kept = []
    table, wrong = tune.measure(CPU, timer, 10.0, TINY, 8, (torch.float32,), keep=kept.append)
    assert kept[0].ops == table.ops and not kept[0].settings and kept[-1] == table
    assert not wrong and "sequence_mean: right" in capsys.readouterr().out
    assert table.ops == ("sequence_mean", "varlen_attention", "pack_plan")
    assert dict(table.settings) == {"attention_forward, 16 bits, heads of 64": small}
    assert {choice.forward for choice in table.attention} == {"kernel"}  # nobody is faster
    assert [(choice.longest, choice.equal_lengths) for choice in table.attention] == [(4, False), (4, True)]


@pytest.fixture
def two_ops(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    some = {name: cases(TINY, CPU)[name] for name in ("sequence_mean", "pack_plan")}
    monkeypatch.setattr(tune, "cases", lambda size, device: some)


def test_a_table_that_is_there_has_no_say_in_a_new_one(monkeypatch, two_ops):
    """What the old one chose is tried like everything else, and is in the new one if it is still the fastest."""
    call = partial(torch.ones, 3)
    monkeypatch.setattr(search, "tunings", lambda *args: [Tuning("thing", "key", (1, 2), call)])

    def timer(call):
        return 1.0 if setting("thing", 1, _launch.hardware(CPU), "key") == 2 else 2.0

    with _launch.assume(_launch.hardware(CPU)._replace(tuned={"thing, key": 2})):
        table, _ = tune.measure(CPU, timer, 10.0, TINY, 8, (torch.float32,))
    assert table.settings == {"thing, key": 2}


def test_what_was_found_stays_where_the_search_breaks_off(monkeypatch, two_ops, capsys):
    def tunings(*args):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(search, "tunings", tunings)
    kept = []
    table, wrong = tune.measure(CPU, None, 10.0, TINY, 8, (torch.float32,), keep=kept.append)
    assert wrong and "broke off: RuntimeError: illegal memory access" in capsys.readouterr().out
    assert kept == [table] and table.ops == ("sequence_mean", "pack_plan")


def test_a_setting_that_cannot_be_tried_takes_no_other_with_it(monkeypatch, two_ops, capsys):
    def fail():
        raise RuntimeError("out of resource")

    tried = [Tuning("broken", "key", (2,), fail), Tuning("thing", "key", (2,), partial(torch.ones, 3))]
    monkeypatch.setattr(search, "tunings", lambda *args: tried)
    table, wrong = tune.measure(CPU, lambda call: 2.0 / setting("thing", 1), 10.0, TINY, 8, (torch.float32,))
    assert wrong and "broken, key failed: RuntimeError: out of resource" in capsys.readouterr().out
    assert table.settings == {"thing, key": 2}


def test_who_was_fastest_stays_where_others_were_not_tried(monkeypatch, two_ops):
    first = AttentionChoice(64, 256, False, "kernel", "kernel")

    def choices(*args):
        yield first
        raise RuntimeError("illegal memory access")

    some = {"varlen_attention": cases(TINY, CPU)["varlen_attention"]}
    monkeypatch.setattr(tune, "cases", lambda size, device: some)
    monkeypatch.setattr(search, "tunings", lambda *args: [])
    monkeypatch.setattr(search, "attention_choices", choices)
    kept = []
    table, wrong = tune.measure(CPU, None, 10.0, TINY, 8, (torch.float32,), keep=kept.append)
    assert wrong and kept[-1] == table and table.attention == (first,)


ANSWERS = {
    "right": "import time; print('[]', flush=True); time.sleep(60)",  # it goes on compiling
    "wrong": "print('a warning'); print('[\"error nan\"]')",
    "broken": "import os; os._exit(7)",
    "endless": "import time; time.sleep(60)",
}


def test_a_kernel_that_breaks_its_process_takes_no_other_with_it(monkeypatch):
    start = tune.subprocess.Popen
    monkeypatch.setattr(
        tune.subprocess, "Popen", lambda command, **how: start([command[0], "-c", ANSWERS[command[-1]]], **how)
    )
    found = tune.apart(list(ANSWERS), 2.0)
    assert found["right"] == [] and found["wrong"] == ["error nan"]
    assert found["broken"] == ["no answer, exit code 7"] and found["endless"][0].startswith("no answer")


def test_the_driver_is_asked_once(monkeypatch):
    asked = []

    def run(*args, **how):
        asked.append(args)
        return SimpleNamespace(stdout="580.1\n580.1\n")

    monkeypatch.setattr(tune.subprocess, "run", run)
    driver.cache_clear()
    try:
        assert [driver(), driver()] == ["580.1"] * 2 and len(asked) == 1
    finally:
        driver.cache_clear()


def test_the_search_stops_in_time():
    tuning = Tuning("thing", "key", (2, 3), lambda: torch.full((3,), 1.0))
    assert search.best(tuning, lambda call: 10 / setting("thing", 1), deadline=0.0) == (search.UNCHANGED, 10, 10)


def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main([])
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
