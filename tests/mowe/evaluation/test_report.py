"""Which metric a task gets, and what a report says of answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mowe.data import Example
from mowe.errors import ConfigError
from mowe.evaluation import Rule, score
from mowe.evaluation.audiobench import write_predictions
from mowe.evaluation.pictures import report_picture
from mowe.evaluation.tasks import inferred, rules_for


def examples(task: str, *answers: str) -> list[Example]:
    return [Example(Path("a.wav"), task, "What?", answer, line) for line, answer in enumerate(answers, start=1)]


def test_the_metric_follows_from_the_name_or_the_answers() -> None:
    assert inferred(["yes", "no", "No!", "yes"]) == Rule("accuracy")
    assert inferred(["it rains today", "two dogs bark loudly", "one"]) == Rule("wer")
    assert inferred(["a cat", "red", "Paris"]) == Rule("exact_match")
    asked = examples("asr", "yes", "yes") + examples("mood", "sad", "sad") + examples("sound", "rain", "rain")
    assert rules_for(asked) == {"asr": Rule("wer"), "mood": Rule("accuracy"), "sound": Rule("exact_match")}
    chosen = {"asr": Rule.parse("cer/none"), "mood": Rule.parse("macro_f1")}
    assert rules_for(asked, chosen) == chosen | {"sound": Rule("exact_match")}
    assert chosen["asr"] == Rule("cer", "none")


def test_rules_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"metric must be one of wer, cer, .*, got 'bleu'"):
        Rule.parse("bleu")
    with pytest.raises(ConfigError, match="normalisation must be one of words, english, none, got 'x'"):
        Rule.parse("wer/x")
    with pytest.raises(ConfigError, match="no example has the task 'asr'; there are mood, sound"):
        rules_for(examples("mood", "sad") + examples("sound", "rain"), {"asr": Rule("wer")})
    with pytest.raises(ConfigError, match="no examples"):
        rules_for([])
    with pytest.raises(ConfigError, match=r"task 'asr': .* hold nothing"):
        rules_for(examples("asr", "?", "..."))
    with pytest.raises(ConfigError, match="got 1 to 2"):
        score(examples("asr", "a", "b"), ["a"])


def test_report() -> None:
    asked = examples("asr", "a b c d", "e f") + examples("mood", "Sad", "glad", "sad", "glad")
    report = score(asked, ["A b, c d!", "e x", "he is sad", "glad", "glad", "who knows"])
    asr, mood = report.tasks["asr"], report.tasks["mood"]
    assert (asr.examples, asr.rule, list(asr.scores)) == (2, Rule("wer"), ["wer", "cer", "exact_match"])
    assert asr.score.value == pytest.approx(1 / 6) and asr.scores["exact_match"].value == 0.5
    assert (asr.labels, asr.confusion) == ((), ())
    assert mood.labels == ("glad", "sad") and mood.confusion == ((1, 0, 1), (1, 1, 0))
    assert mood.score.value == 0.5 and mood.scores["exact_match"].value == 0.25
    assert mood.scores["macro_f1"].value == pytest.approx((2 * 1 / 4 + 2 * 1 / 3) / 2)
    for task in report.tasks.values():
        assert all(0 <= found.low <= found.value <= found.high for found in task.scores.values())
    assert report.overall["score"].value == pytest.approx((5 / 6 + 0.5) / 2)
    assert report.overall["exact_match"].value == pytest.approx((0.5 + 0.25) / 2)
    assert report.overall["wer"].value == asr.score.value

    data = report.as_data()
    assert data == json.loads(json.dumps(data, allow_nan=False))
    assert data["tasks"]["mood"]["confusion"] == [[1, 0, 1], [1, 1, 0]]
    assert data["overall"]["examples"] == 6
    assert score(asked, report.answers) == report


def test_small_test_sets_have_wide_intervals() -> None:
    few, many = (score(examples("mood", *["sad", "glad"] * n), ["sad", "sad"] * n) for n in (3, 100))
    widths = [r.tasks["mood"].score.high - r.tasks["mood"].score.low for r in (few, many)]
    assert widths[0] > 0.5 > 0.15 > widths[1]
    assert widths[1] > 0.1
    sure = score(examples("mood", *["sad"] * 4), ["sad"] * 4).tasks["mood"].score
    assert (sure.value, sure.high) == (1, 1) and sure.low < 0.6


def test_tasks_of_the_same_size_are_drawn_independently() -> None:
    """The mean of two like tasks is known better than each of them."""
    answers = ["a b c d", "e f g h", "i j k l", "m n o p"] * 8
    said = ["a b c d", "x x x x"] * 16
    alone = score(examples("asr", *answers), said).overall["score"]
    rules = {"one": Rule("wer"), "two": Rule("wer")}
    assert score(examples("asr", *answers), said, seed=1).overall["score"] != alone
    both = score(examples("one", *answers) + examples("two", *answers), said * 2, rules).overall["score"]
    assert both.value == alone.value
    assert (both.high - both.low) / (alone.high - alone.low) == pytest.approx(0.5**0.5, abs=0.1)


def test_picture(tmp_path: Path) -> None:
    asked = examples("asr", "a", "b") + [e for task in ("x$1$", "y", "z") for e in examples(task, *["on", "off"] * 2)]
    report = score(asked, ["a"] * len(asked))
    report_picture(tmp_path / "report.svg", report, subtitle="ünïcode")
    assert list(tmp_path.iterdir()) == [tmp_path / "report.svg"]
    drawn = (tmp_path / "report.svg").read_text()
    assert "asr, WER" in drawn and "x$1$, accuracy" in drawn and "ünïcode" in drawn
    assert all(f"{task}: right answer by row" in drawn for task in ("x$1$", "y", "z"))


def test_audiobench_files(tmp_path: Path) -> None:
    asked = examples("emotion", "Traurig.", "froh") + examples("riddle", "an egg")
    file = write_predictions(tmp_path, "iemocap_emotion_test", list(zip(asked, ["ß", "froh", ""], strict=True)))
    assert file == tmp_path / "iemocap_emotion_test.json"
    assert json.loads(file.read_text()) == [
        {"instruction": "What?", "reference": "Traurig.", "task_type": "ER", "model_prediction": "ß"},
        {"instruction": "What?", "reference": "froh", "task_type": "ER", "model_prediction": "froh"},
        {"instruction": "What?", "reference": "an egg", "task_type": "riddle", "model_prediction": ""},
    ]
