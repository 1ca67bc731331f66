"""The command line. Nothing heavy is imported until a command runs, so that `mowe --help` answers at once."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mowe.errors import MoweError, Terminated

if TYPE_CHECKING:
    from mowe.cli._screen import Screen

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UsageError: Any = typer.BadParameter.__base__  # click's, or the copy that newer versions of typer carry


class _OneLineErrors(TyperGroup):
    """Ends bad input of any kind with one line on stderr and exit code 2, and a signal with one and its own code."""

    def invoke(self, context: Any) -> Any:
        try:
            os.getcwd()
        except FileNotFoundError:  # torch and transformers cannot even be imported there
            self._fail("the working directory has been removed, change into another one")
        try:
            return super().invoke(context)
        except KeyboardInterrupt as stopped:
            number, name = (signal.SIGTERM, "SIGTERM") if isinstance(stopped, Terminated) else (signal.SIGINT, "Ctrl-C")
            self._fail("; ".join([f"stopped by {name}", *getattr(stopped, "__notes__", [])]), 128 + number)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal without the characters shows "?"
        try:
            sys.exit(super().main(args, prog_name, complete_var, False, windows_expand_args, **extra))
        except _UsageError as error:
            self._fail(error.format_message())
        except MoweError as error:
            self._fail(str(error))
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
                raise
            self._fail("this needs more memory than the GPU has: give it fewer or shorter clips at a time")
        except OSError as error:
            if error.errno in _NO_ROOM:
                self._fail(f"the output cannot be written ({error.strerror})")
            if error.filename is None:
                raise
            self._fail(f"{error.filename}: {error.strerror}")
        except typer.Abort:
            sys.exit(1)

    def _fail(self, message: str, code: int = 2) -> None:
        from mowe.cli._screen import printable

        with suppress(OSError):  # stderr may be what cannot be written
            typer.secho(f"error: {printable(message)}", fg="red", err=True)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:  # Python would try once more on its way out, and complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(code)


app = typer.Typer(
    cls=_OneLineErrors,
    help="Mixtures of weak audio encoders: route clips to encoders, and let a language model answer about them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Files = Annotated[list[Path], typer.Argument(metavar="AUDIO", help="wav, flac, ogg or mp3 files", show_default=False)]
Model = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="folder of a saved model; without it, the small trained demo model"),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="go on without lines of manifests that cannot be used, and count them")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON, for scripts")]


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="print the version")] = False
) -> None:
    if version:
        from mowe.cli._versions import package_version

        typer.echo(f"mowe {package_version('mowe-kernels')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    # It warns on stderr when it is imported on a CPU, whether it is used or not.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@app.command("demo")
def _demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="where the picture goes")] = Path("mowe-demo"),
    json: Json = False,
) -> None:
    """Run a small model on bundled clips: who listens, what it says, and what packing saves."""
    screen = _new_screen(json)
    with screen.step("starting"):
        from mowe.cli.demo import run
    run(out, screen)


@app.command("generate")
def _generate(
    audio: Files,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="what to ask about each clip", show_default=False)],
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="longest answer, in tokens")] = 64,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="run in 4 bits, and show what that saves and costs")
    ] = False,
    json: Json = False,
) -> None:
    """Ask the model about audio files, one answer a file."""
    screen = _new_screen(json)
    with screen.step("starting"):
        from mowe.cli.generate import run
    run(audio, prompt, model, max_new_tokens, load_in_4bit, screen)


@app.command("routes")
def _routes(
    audio: Files,
    model: Model = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw the routing too (.png, .svg, .pdf)", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Show which encoders listen to audio files, and how much each one counts."""
    screen = _new_screen(json)
    with screen.step("starting"):
        from mowe.cli.routes import run
    run(audio, model, picture, screen)


@app.command("train")
def _train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="FIELD=VALUE", help="fields to set, as data.batch_frames=4000", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint")] = False,
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Train a model on manifests of clips, prompts and answers."""
    screen = _new_screen(json)
    with screen.step("starting"):
        from mowe.cli.train import run
    run(config, [*(overrides or []), *(["data.skip_bad=true"] if skip_bad else [])], resume, screen)


@app.command("evaluate")
def _evaluate(
    manifests: Annotated[
        list[Path],
        typer.Argument(
            metavar="MANIFEST", help="JSONL files or saved datasets of clips with answers", show_default=False
        ),
    ],
    model: Model = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="only these tasks; else all", show_default=False)
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=METRIC",
            help="wer, cer, accuracy, macro_f1 or exact_match, repeatable; after it a text form: asr=wer/english",
            show_default=False,
        ),
    ] = None,
    batch_frames: Annotated[int, typer.Option(min=1, metavar="N", help="frames of 20 ms answered together")] = 12_000,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="longest answer, in tokens")] = 128,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the answers there, as JSONL", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="report, answers and a picture", show_default=False)
    ] = None,
    audiobench: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="write prediction files for AudioBench there", show_default=False),
    ] = None,
    skip_bad: SkipBad = False,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="run in 4 bits")] = False,
    json: Json = False,
) -> None:
    """Ask a model about clips whose answers are known, and say how right it is, task by task."""
    screen = _new_screen(json)
    with screen.step("starting"):
        from mowe.cli.evaluate import Outputs, run
    outputs = Outputs(predictions, out, audiobench)
    run(manifests, model, tasks, metric or [], batch_frames, max_new_tokens, outputs, skip_bad, load_in_4bit, screen)


@app.command("quantize")
def _quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="folder of a saved model", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the model in 4 bits", show_default=False)],
    clip: Annotated[
        list[Path] | None,
        typer.Option(metavar="AUDIO", help="file to judge the quality by, repeatable; else the bundled clips"),
    ] = None,
    manifest: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="clips with answers, repeatable: how right the model is before and after, loaded in full for that",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="longest answer, in tokens")] = 128,
    part: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART",
            help="language_model, audio_tower, pool or lm_head, repeatable; else the first three",
            show_default=False,
        ),
    ] = None,
    double_quant: Annotated[bool, typer.Option(help="quantise the scales too")] = True,
    json: Json = False,
) -> None:
    """Put a model in 4 bits: less memory, and a report of what became of the audio embeddings."""
    screen = _new_screen(json)
    with screen.step("starting"):
        from mowe.cli.quantize import run
    run(model, out, clip or [], manifest or [], max_new_tokens, part or (), double_quant, screen)


@app.command("info")
def _info(model: Model = None, json: Json = False) -> None:
    """Show the parts of a model, their sizes, and what it would run on. No weights are loaded."""
    screen = _new_screen(json)
    with screen.step("starting"):
        from mowe.cli.info import run
    run(model, screen)


def _new_screen(as_json: bool) -> Screen:
    from mowe.cli._screen import Screen

    return Screen(as_json)


def _terminate(*_: Any) -> None:
    raise Terminated


def main() -> None:
    """The console entry point."""
    # Read when torch is loaded: its threads sleep while they wait, instead of fighting other programs for the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _terminate)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by the caller: a file opened later would get its number, and be written to as stderr
            os.open(os.devnull, os.O_RDWR)
    app(prog_name="mowe")
