"""What the command lines share: numbers and paths that are refused, text that is printed as it is, interrupts."""

import argparse
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from rich.table import Table

from benchmarks import arguments
from benchmarks.__main__ import _parser as benchmarks_parser
from cute_attn import command, fill, machine
from cute_attn.__main__ import _parser as package_parser
from cute_attn.__main__ import main
from cute_attn.cache import CACHE_DIR_VARIABLE
from cute_attn.layouts.__main__ import _parser as layouts_parser
from cute_attn.problem import GPU_DTYPES
from tests.host.processes import INTERRUPTS, ROOT, SIGINT_AT_START, group_is_gone, run_quick, start, until

BRACKETS = "[bold]x[/nope] :bug: [/]"
NUMBERS = {
    name: getattr(command if hasattr(command, name) else arguments, name)
    for name in ("positive", "seed", "reach", "head_dim", "softcap", "seconds", "milliseconds", "rest_milliseconds", "length")
}

NOT_NUMBERS = {text: text for text in ("nan", "inf", "-inf", "1e400", "", "x", "-2", "0x10", "½", "k", "1e9k")}
NOT_NUMBERS |= {f"{digits} digits": "9" * digits for digits in (400, 5000)}  # more than a float holds, than int() reads


def refusal(kind, text: str) -> str:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    return str(caught.value)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("positive", "1", 1),
        ("positive", str(2**31 - 1), 2**31 - 1),
        ("seed", "0", 0),
        ("reach", "-1", -1),
        ("head_dim", "8", 8),
        ("head_dim", "256", 256),
        ("softcap", "0", 0.0),
        ("softcap", "1e-3", 1e-3),
        ("seconds", "0.5", 0.5),
        ("rest_milliseconds", "0", 0.0),
        ("length", "8k", 8192),
        ("length", "8K", 8192),
        ("length", "512", 512),
    ],
)
def test_numbers_that_are_taken(kind, text, value):
    assert NUMBERS[kind](text) == value


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("text", NOT_NUMBERS.values(), ids=NOT_NUMBERS)
def test_no_number_takes_these(kind, text):
    said = refusal(NUMBERS[kind], text)
    assert said.startswith(f"got {text!r}; ")
    assert "needed" in said


@pytest.mark.parametrize(
    ("kind", "text", "needed"),
    [
        ("positive", "0", "a whole number of at least 1 and at most 2147483647 is needed"),
        ("positive", "1.5", "a whole number"),
        ("seed", str(2**63), "at most 9223372036854775807"),
        ("head_dim", "0", "a multiple of 8 from 8 to 256 is needed"),
        ("head_dim", "100", "a multiple of 8 from 8 to 256 is needed"),
        ("head_dim", "264", "a multiple of 8 from 8 to 256 is needed"),
        ("softcap", "-0.1", "a finite number of at least 0 is needed"),
        ("seconds", "0", "a finite number above 0"),
        ("seconds", "2e6", "at most 1e+06"),
        ("milliseconds", "0", "above 0"),
        ("length", "0k", "a length of at least 1"),
        ("length", "-8k", "a length of at least 1"),
    ],
)
def test_numbers_out_of_range(kind, text, needed):
    said = refusal(NUMBERS[kind], text)
    assert said.startswith(f"got '{text}'; ")
    assert needed in said


def test_dtypes_are_those_of_the_kernels():
    assert [f"torch.{name}" for name in command.DTYPES] == [str(dtype) for dtype in GPU_DTYPES]


def options(parser: argparse.ArgumentParser):
    """Every option and argument of a command line, with those of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from options(inner)
        else:
            yield parser.prog, action


def parsers() -> list[argparse.ArgumentParser]:
    found = [package_parser(), benchmarks_parser(), layouts_parser()]
    if not machine.missing():  # it imports the DSL
        from benchmarks.layouts import _parser

        found.append(_parser())
    return found


def test_every_number_of_every_command_is_of_a_checked_kind():
    """Python's own int and float take 0, -3, nan and inf."""
    seen = [(f"{prog} {action.dest}", action.type) for parser in parsers() for prog, action in options(parser)]
    assert len(seen) > 60
    assert [name for name, kind in seen if kind in (int, float)] == []
    named = re.compile(r"\b(json|csv|plot|svg|png|output|cache)$")
    assert [name for name, kind in seen if named.search(name) and getattr(kind, "__module__", "") != command.__name__] == []


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "path", "why"),
    [
        (command.output_file, "folder", "it is a folder"),
        (command.output_file, "", "it is a folder"),
        (command.output_file, "nowhere/x.json", "is not there: make it first"),
        (command.output_file, "file/x.json", "is not there"),
        (command.output_file, "pipe", "no regular file"),
        (command.output_file, "x" * 300, "too long"),
        (command.output_file, "x" * 252, "too long"),  # with what is written beside it
        (command.output_file, "/proc/x.json", "No such file"),
        (command.output_folder, "file", "is no folder"),
        (command.output_folder, "file/deep", "is no folder"),
        (command.output_folder, "/proc/deep/plots", "in /proc"),
        (command.picture_stem, "file/deep/x", "is no folder"),
        (command.picture_stem, "/", "it is a folder"),
    ],
)
def test_places_that_can_not_be_written(places, kind, path, why):
    before = sorted(places.iterdir())
    said = refusal(kind, str(places / path))
    assert "can't be written: " in said
    assert why in said
    assert sorted(places.iterdir()) == before


PROTECTED = """
import argparse, os, sys
from cute_attn import command
if os.getuid() == 0:  # who may write everywhere
    os.setuid(65534)
for kind, path in (("output_file", "file"), ("output_file", "folder/x.json"), ("output_folder", "folder/a/b")):
    try:
        getattr(command, kind)(os.path.join(sys.argv[1], path))
    except argparse.ArgumentTypeError as error:
        print(error)
"""


def test_write_protected_places():
    with tempfile.TemporaryDirectory() as name:  # in no folder of the tests', which other users can't enter
        Path(name).chmod(0o755)
        (Path(name) / "file").write_text("mine")
        (Path(name) / "file").chmod(0o444)
        (Path(name) / "folder").mkdir(0o555)
        run = run_quick(PROTECTED, name)
    for line, path in zip(run.stdout.splitlines(), ("file", "folder/x.json", "folder/a/b"), strict=True):
        assert line.startswith(f"{name}/{path} can't be written: Permission denied")


def test_looking_at_a_place_leaves_it_as_it_was(places, monkeypatch):
    (places / "kept.json.part").write_text("of a run that was killed")

    def state():
        return {path: path.is_dir() or path.stat().st_mtime_ns for path in places.rglob("*")}

    before = state()
    assert command.output_file(str(places / "file")) == places / "file"
    assert command.output_file(str(places / "new.json")) == places / "new.json"
    assert command.output_file(str(places / "kept.json")) == places / "kept.json"
    assert command.output_folder(str(places / "a" / "b")) == places / "a" / "b"
    assert command.picture_stem(str(places / "folder" / "x")) == places / "folder" / "x"
    monkeypatch.setenv("HOME", str(places))
    assert command.output_file("~/new.json") == places / "new.json"
    assert state() == before
    assert (places / "file").read_text() == "mine"


def test_pictures_need_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "try pip install 'cute-attn[bench]'" in refusal(command.drawn(command.output_folder), str(tmp_path))


# --- what is printed -------------------------------------------------------------------------------------------------


def test_strings_are_printed_as_they_are():
    console = command.console(120)
    console.file = io.StringIO()
    table = Table(title=f"title {BRACKETS}")
    table.add_column(f"column {BRACKETS}")
    table.add_row(f"cell {BRACKETS}")
    console.print(f"line {BRACKETS}")
    console.print(f"styled {BRACKETS}", style="red")
    console.print(table)
    said = console.file.getvalue()
    for where in ("line", "styled", "title", "column", "cell"):
        assert f"{where} {BRACKETS}" in said


def test_commands_print_to_this_console_only():
    """One made elsewhere would take markup again."""
    sources = [path for folder in ("cute_attn", "benchmarks", "layouts") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 60
    makes = re.compile(r"\bConsole\(|from_markup|rich import print")
    assert [path.name for path in sources if makes.search(path.read_text())] == ["command.py"]
    bars = re.compile(r"TextColumn\((?!.*markup=False)")
    assert [path.name for path in sources if any(map(bars.search, path.read_text().splitlines()))] == []


@pytest.mark.parametrize("arguments", [["show", "sm_80", "block"], ["show", "--help"]])
def test_output_that_has_no_such_characters_or_no_room(arguments):
    run = [sys.executable, "-m", "cute_attn.layouts", *arguments]
    done = subprocess.run(run, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "?" in done.stdout
    with open("/dev/full", "w") as full:
        done = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == ("--help" not in arguments)


def test_a_cache_path_with_brackets(capsys, monkeypatch, tmp_path):
    folder = tmp_path / "[bold]x[" / "nope]"
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(folder))
    monkeypatch.setattr(fill, "compiled", lambda problem, config: None)
    assert main(["info"]) == 0
    assert str(folder) in re.sub(r"\s", "", capsys.readouterr().out)
    main(["compile", "--arch", "sm_80", "--head-dim", "64", "--causal", "-j", "1"])
    assert f"kernels for {folder}\n" in capsys.readouterr().out


# --- the end of a command --------------------------------------------------------------------------------------------


def ended(error: BaseException | None, *arguments: str) -> int:
    """The exit status of a command that raises ``error``."""

    def does(options, console):
        if error is not None:
            raise error
        return 7

    parser = argparse.ArgumentParser(prog="prog")
    parser.add_argument("command")
    return command.run(parser, {"it": does}, ["it", *arguments], 80)


def test_exit_statuses(capsys):
    assert ended(None) == 7
    assert ended(KeyboardInterrupt()) == 130
    assert ended(KeyboardInterrupt(signal.SIGTERM)) == 143
    assert ended(OSError(28, "No space left on device", "/[x]/r.json")) == 1
    assert "error: [Errno 28] No space left on device: '/[x]/r.json'" in capsys.readouterr().err
    for error in (ValueError("no such"), NotImplementedError("no such"), argparse.ArgumentTypeError("no such")):
        with pytest.raises(SystemExit, match="2"):
            ended(error)
        assert "prog: error: no such" in capsys.readouterr().err


def test_a_folder_that_can_not_be_written_is_said_before_anything_is_compiled(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "file"))
    monkeypatch.setattr(fill, "fill", lambda *_: pytest.fail("compiled"))
    with pytest.raises(SystemExit, match="2"):
        main(["compile", "--arch", "sm_80"])
    assert f"{tmp_path}/file is a file; a folder is needed" in capsys.readouterr().err


# --- interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_raises_inside_and_what_was_before_comes_back(number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as caught, command.interruptible():
        signal.raise_signal(number)
    assert command.interrupted(caught.value) == 128 + number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


PASSED_ON = """
import signal, subprocess, sys
from cute_attn.command import interruptible, leave_interrupts_to_parent
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[1] == "ignored" else signal.default_int_handler)
look = [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, end=' ')"]
with interruptible():
    subprocess.run(look)
leave_interrupts_to_parent()
subprocess.run(look)
"""


@pytest.mark.parametrize("sigint", SIGINT_AT_START)
def test_what_is_started_inherits_no_ignored_signal(sigint):
    assert run_quick(PASSED_ON, sigint).stdout.split() == ["True", "True"]


POOL = """
import os, sys, time
from cute_attn.command import interrupted, interruptible
from cute_attn.fill import processes
try:
    with interruptible(), processes(2) as pool:
        up = set()
        while len(up) < 2:  # one that starts up still takes Ctrl-C for its own, and says so
            up |= {future.result() for future in [pool.submit(os.getpid) for _ in range(8)]}
        busy = [pool.submit(time.sleep, 3600) for _ in range(4)]
        print("busy", flush=True)
        busy[0].result()
except KeyboardInterrupt as error:
    sys.exit(interrupted(error))
"""


@pytest.mark.parametrize(("sigint", "number", "to"), INTERRUPTS)
def test_an_interrupted_pool_leaves_no_process(sigint, number, to):
    process = start(sigint, "-c", POOL)
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    to(process.pid, number)
    assert process.communicate() == ("", None)  # no traceback of any process
    assert process.returncode == 128 + number
    until(lambda: group_is_gone(process))


def test_a_process_does_not_outlive_who_waits_for_it():
    pytest.importorskip("cutlass")
    from benchmarks.layouts import started

    sleeps = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(3600)"]
    with suppress(KeyboardInterrupt), started(sleeps, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGTERM
