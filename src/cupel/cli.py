"""The command line: one verb a command. Torch is imported by the command that needs it, not before."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cupel import __version__
from cupel.errors import CupelError, Interrupted, UsageError
from cupel.progress import Lines, Terminal, reporting, request_stop
from cupel.zoo.command import zoo_app

__all__ = ["app", "main"]

app = typer.Typer(
    name="cupel",
    help="Measure, find and remove backdoors in pre-trained encoders.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(zoo_app, name="zoo")

# the exception class of the command library, wherever it keeps it
_LibraryUsageError: type[Exception] = typer.BadParameter.__mro__[1]
_LibraryError: type[Exception] = typer.BadParameter.__mro__[2]


class DemoData(StrEnum):
    """Embedded data."""

    digits = "digits"
    shapes = "shapes"


class Format(StrEnum):
    """Output on standard output."""

    text = "text"
    json = "json"


class ScanFormat(StrEnum):
    """Output of a scan on standard output: for people, for scripts, for build servers."""

    text = "text"
    json = "json"
    sarif = "sarif"
    junit = "junit"


class TableFormat(StrEnum):
    """Forms of a report."""

    html = "html"
    text = "text"
    md = "md"
    csv = "csv"
    latex = "latex"


class Budget(StrEnum):
    """How long a scan or purification may take."""

    smoke = "smoke"
    standard = "standard"
    paper = "paper"


Seed = Annotated[int, typer.Option("--seed", min=0, help="Source of all randomness.")]
EncoderFile = Annotated[str, typer.Argument(metavar="ENCODER", help="Checkpoint file of any suffix, or a folder.")]
ImageSource = Annotated[
    str,
    typer.Option("--images", metavar="SRC", help="Folder, Parquet, .npz or name of a data set; labels are not read."),
]
Arch = Annotated[str | None, typer.Option(help="Architecture, e.g. resnet18 or fast,width=32; default: from the file.")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")]


def _version(value: bool) -> None:
    if value:
        print(f"cupel {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report and result.json.")] = Path("cupel-demo"),
    seed: Seed = 0,
    data: Annotated[DemoData, typer.Option(help="Embedded images.")] = DemoData.digits,
) -> int:
    """The whole path on embedded data: pre-train, implant, probe, scan, purify, scan again, report."""
    from cupel import commands

    return commands.demo(out, seed, data.value)


@app.command()
def inspect(
    files: Annotated[list[str], typer.Argument(metavar="FILE…", help="Checkpoint files.")],
    format_: Annotated[Format, typer.Option("--format")] = Format.text,
) -> int:
    """Say what is in a checkpoint, executing nothing."""
    from cupel.checkpoint import inspect_command

    return inspect_command(files, format_.value)


@app.command()
def scan(
    encoder: EncoderFile,
    images: ImageSource,
    arch: Arch = None,
    scanner: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[,NAME]", help="Scanners; default: the chain of label-free ones."),
    ] = None,
    budget: Annotated[Budget, typer.Option()] = Budget.standard,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for result.json, report.html and evidence.")] = Path("cupel-scan"),
    format_: Annotated[ScanFormat, typer.Option("--format")] = ScanFormat.text,
) -> int:
    """Look for a backdoor without labels."""
    from cupel import commands

    return commands.scan(encoder, images, arch, scanner or [], budget.value, seed, out, format_.value)


@app.command()
def purify(
    encoder: EncoderFile,
    images: ImageSource,
    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="The purified encoder.")],
    arch: Arch = None,
    purifier: Annotated[str, typer.Option(metavar="NAME", help="Purifier.")] = "cupellation",
    evidence: Annotated[Path | None, typer.Option(metavar="DIR", help="A scan's --out; default: scan first.")] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="SRC", help="Labelled images, for a purifier that needs them.")
    ] = None,
    budget: Annotated[Budget, typer.Option()] = Budget.standard,
    changes: Changes = None,
    seed: Seed = 0,
    format_: Annotated[Format, typer.Option("--format")] = Format.text,
) -> int:
    """Remove a backdoor, without labels unless the purifier needs them, then scan again."""
    from cupel import commands

    return commands.purify(
        encoder, images, out, arch, purifier, evidence, labels, budget.value, changes or [], seed, format_.value
    )


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(metavar="EXPERIMENT", help="YAML file, or name of a packaged one.")],
    out: Annotated[Path | None, typer.Option(help="Folder for store and records; default runs/NAME.")] = None,
    changes: Changes = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, run nothing.")] = False,
) -> int:
    """Plan and run an experiment or a grid; run again to resume."""
    from cupel import commands

    return commands.run(experiment, out, changes or [], dry_run)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Folders that run, demo or scan wrote.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: report.html in the first folder.")] = None,
    format_: Annotated[TableFormat, typer.Option("--format")] = TableFormat.html,
) -> int:
    """One static, offline page from records, or a table."""
    from cupel.report.command import report_command

    return report_command(folders, out, format_.value)


@app.command()
def doctor(format_: Annotated[Format, typer.Option("--format")] = Format.text) -> int:
    """Say what this machine offers: versions, devices, threads, extras, data found."""
    from cupel.doctor import doctor_command

    return doctor_command(format_.value)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """The first Ctrl-C or SIGTERM stops between two steps and keeps a checkpoint; the second stops at once."""

    def handle(number: int, frame: Any) -> None:
        request_stop(number)
        signal.signal(number, lambda n, f: os._exit(128 + n))
        print("\nstopping at the next step; once more stops at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        request_stop(None)


def _call(arguments: Sequence[str]) -> int:
    reporter = Terminal() if sys.stderr.isatty() else Lines()
    with _signals(), reporting(reporter):
        try:
            return int(app(list(arguments), standalone_mode=False) or 0)
        except _LibraryError as error:
            hint = "see `cupel --help`"
            spoken = error.format_message() if hasattr(error, "format_message") else str(error)
            message = " ".join(spoken.split()).rstrip(".")
            usage = isinstance(error, _LibraryUsageError)
            raise (UsageError if usage else CupelError)("cupel", message[:1].lower() + message[1:], hint) from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code of its contract."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = _call(arguments)
        sys.stdout.flush()
    except Interrupted as error:
        print(f"cupel: {error}", file=sys.stderr)
        if arguments and arguments[0] in ("run", "demo", "zoo"):
            print(f"resume with: cupel {' '.join(arguments)}", file=sys.stderr)
        code = error.exit_code
    except CupelError as error:
        print(f"cupel: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except MemoryError:
        print("cupel: out of memory; use fewer images or a smaller batch_size", file=sys.stderr)
        code = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 2
    sys.exit(code)
