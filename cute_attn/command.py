"""What the command lines share: how they run, print and are interrupted, and the numbers and paths that they take.

A number or a path is refused while the arguments are read, before any work begins, with what was got and what is needed.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from cute_attn import layouts
from cute_attn.problem import DTYPE_NAMES, GPU_DTYPES, HEAD_DIM_MAX, HEAD_DIM_STEP

DTYPES = tuple(DTYPE_NAMES[dtype] for dtype in GPU_DTYPES)
INT_MAX = 2**31 - 1  # of the kernels' sizes
PICTURES = (".png", ".svg", ".pdf")
Command = Callable[[argparse.Namespace, Console], int]


def run(parser: argparse.ArgumentParser, commands: Mapping[str, Command], argv: Sequence[str] | None, log_width: int) -> int:
    """Parse the arguments and run their command; the exit status. What is asked for and can't be is 2, an output that
    can't be written 1, Ctrl-C and SIGTERM as in :func:`interrupted`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what its encoding doesn't have, as × in ASCII, is a question mark
    options = parser.parse_args(argv)
    shown = console(log_width)
    try:
        with interruptible():
            return commands[options.command](options, shown)
    except (ValueError, NotImplementedError, argparse.ArgumentTypeError, NotADirectoryError) as error:
        parser.error(str(error))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)  # it may be the standard output that can't be written
        return 1
    except KeyboardInterrupt as error:
        return interrupted(error)


def console(log_width: int) -> Console:
    """Where a command prints. A log has no width of its own.

    A string is printed as it is: paths, names and messages that come from outside hold square brackets and colons, which
    rich would take for markup and emoji. What has a style is a ``Text``, or is printed with ``style=``.
    """
    shown = Console(markup=False, emoji=False)
    return shown if shown.is_terminal else Console(width=log_width, markup=False, emoji=False)


# ---- interrupts ------------------------------------------------------------------------------------------------------


@contextmanager
def interruptible(*signals: signal.Signals) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM (or the ``signals`` given) raise ``KeyboardInterrupt``.

    A process that a shell starts in the background, or ``nohup``, has SIGINT ignored from the start, and Python leaves it so.
    What is started inside doesn't inherit that: a signal with a handler is the default one in a new program.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in signals or (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's own


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def interrupted(error: KeyboardInterrupt) -> int:
    """The exit status of an interrupted command, as shells count it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (error.args[0] if error.args else signal.SIGINT)


def leave_interrupts_to_parent() -> None:
    """In a child process: a terminal sends Ctrl-C to all processes, and it is the parent who ends this one, by SIGTERM.

    The handler does nothing. ``SIG_IGN`` would be inherited by what this process starts, which then nothing could interrupt.
    """
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def whole(least: int, most: int = INT_MAX, step: int = 1) -> Callable[[str], int]:
    """A type of argument: a whole number from ``least`` to ``most`` that ``step`` divides."""
    if step > 1:
        needed = f"a multiple of {step} from {least} to {most}"
    else:
        needed = f"a whole number of at least {least} and at most {most}"
    return number(int, needed, lambda value: least <= value <= most and not value % step)


def number(kind: Callable[[str], Any], needed: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type of argument: what ``kind`` makes of the text, if it fits."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"got {text!r}; {needed} is needed")

    return parse


positive = whole(1)
head_dim = whole(HEAD_DIM_STEP, HEAD_DIM_MAX, HEAD_DIM_STEP)  # that the kernels take


def mechanisms() -> list[str]:
    """The names of all mechanisms that some GPU has."""
    return sorted({name for module in layouts.modules() for name in module.MECHANISMS})


# ---- paths -----------------------------------------------------------------------------------------------------------


def output_file(text: str) -> Path:
    """A type of argument: a file that is to be written, by :func:`write_whole` or in place. Its folder is there, and neither
    a folder nor anything else but a file is in its place."""
    path = _path(text)
    if path.is_dir():
        raise _unwritable(path, f"it is a folder: name a file in it, such as {path / 'FILE'}")
    if path.exists() and not path.is_file():
        raise _unwritable(path, "it is there and is no regular file: name another")
    if not path.parent.is_dir():
        raise _unwritable(path, f"its folder {path.parent} is not there: make it first, with mkdir -p, or name another")
    beside = _beside(path)
    try:
        if path.exists():
            path.open("ab").close()
        left_over = beside.exists()
        beside.open("ab").close()
        if not left_over:
            beside.unlink()
    except OSError as error:
        raise _unwritable(path, f"{error.strerror}: name another") from None
    return path


def output_folder(text: str) -> Path:
    """A type of argument: a folder that is written to, and made where it isn't there yet."""
    path = _path(text)
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise _unwritable(path, f"{there} is there and is no folder: name another")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _unwritable(path, f"{error.strerror} in {there}: name another") from None
    return path


def drawn(check: Callable[[str], Path]) -> Callable[[str], Path]:
    """The type ``check`` of an argument that names pictures, which need matplotlib."""

    def parse(text: str) -> Path:
        if find_spec("matplotlib") is None:
            raise argparse.ArgumentTypeError("matplotlib is needed and not installed: try pip install 'cute-attn[bench]'")
        return check(text)

    return parse


def picture_file(text: str) -> Path:
    """A type of argument: a picture's file, of a format that every matplotlib writes."""
    path = output_file(text)
    if path.suffix.lower() not in PICTURES:
        raise _unwritable(path, f"its ending is {path.suffix!r}; {' or '.join(PICTURES)} is needed")
    return path


def picture_stem(text: str) -> Path:
    """A type of argument: a picture's path without its ending. Its folder is made where it isn't there yet."""
    path = _path(text)
    if not path.name:
        raise _unwritable(path, "it is a folder: name a file in it")
    output_folder(str(path.parent))
    if path.parent.is_dir():
        output_file(str(path.with_suffix(".svg")))
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    beside.write_text(text, encoding="utf-8", newline="")
    os.replace(beside, path)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _path(text: str) -> Path:
    """``--json=~/x``, which shells don't expand, means the home directory all the same."""
    try:
        path = Path(text).expanduser()
        path.exists()  # a name too long or with an odd character is answered here
        return path
    except (OSError, RuntimeError, ValueError) as error:
        raise _unwritable(Path(text), f"{error}: name another") from None


def _unwritable(path: Path, why: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{path} can't be written: {why}")
