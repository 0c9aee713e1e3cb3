"""The commands as processes: signals, streams, disks, what libraries do besides, and faults of ours."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import pytest
from PIL import Image
from support.commands import ENTRIES, MODULES, run_command, run_here
from support.grids import grid
from support.watch import can_trace, run_watched

from dit_runtime.commands.common import Parser, print_json, run
from dit_runtime.core.entry import INTERRUPTED
from dit_runtime.core.errors import BundleError, DiTError, explain
from dit_runtime.core.progress import Progress, show_progress
from dit_runtime.core.text import LONGEST, LONGEST_LINE, join_lines, one_line

COMMANDS = tuple(MODULES)
# A name as nobody would give one: escape sequences, line ends of every kind, writing direction, half a character.
HOSTILE = "a\x1b[31mred\nline\r\x0b\x85\u2028\u2029\u202e\u2066\udcff\x07\x7f\u200bz"
ESCAPED = r"a\x1b[31mred\nline\r\x0b\x85\u2028\u2029\u202e\u2066\udcff\x07\x7f\u200bz"


def is_shown_safely(text: str) -> bool:
    """Whether a message is one printable line of bounded length."""
    return text.endswith("\n") and text[:-1].isprintable() and len(text) <= LONGEST + 40


@pytest.fixture
def scripts(tmp_path: Path) -> dict[str, list[str]]:
    """The commands as an installation's scripts start them."""
    made = {}
    for name, entry in ENTRIES.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"import sys\n{entry}\nsys.exit(main())\n")
        made[name] = [sys.executable, str(path)]
    return made


# What is printed.


def test_a_message_is_one_printable_line() -> None:
    """Nothing that a terminal obeys, and nothing that could pass for a line of ours, comes through."""
    assert one_line(HOSTILE) == ESCAPED
    assert one_line("  plain: ≤ 1 × 2, é, 漢, 😀\n") == "plain: ≤ 1 × 2, é, 漢, 😀"
    assert join_lines(["one", HOSTILE]) == f"one\n{ESCAPED}"
    for code in (*range(0x20), *range(0x7F, 0xA1), 0xAD, 0x61C, 0xFEFF, 0xE0001, 0xDC00, 0x3000):
        assert one_line(f"a{chr(code)}b").isprintable()


@pytest.mark.parametrize("length", [10**3, 10**7])
def test_a_message_is_bounded(length: int) -> None:
    """A long name is cut in its middle, and what is wrong and what to do stay."""
    for name in ("x" * length, "x y" * length, "\x1b" * length, f"/{'d' * length}/file.onnx"):
        line = one_line(f"{name}: is damaged, expected SHA-256 0123; export it again")
        assert len(line) <= LONGEST
        assert line.endswith(": is damaged, expected SHA-256 0123; export it again")
        assert "…" in line
        assert len(join_lines([name])) <= LONGEST_LINE
    assert one_line("x" * LONGEST) == "x" * LONGEST


def test_errors_say_their_message_safely() -> None:
    """Whoever prints an error of ours, a server's log for one, gets one safe line."""
    assert str(BundleError(f"{HOSTILE}: missing")) == f"{ESCAPED}: missing"
    assert len(str(DiTError("x" * 10**6))) <= LONGEST
    assert explain(FileNotFoundError(errno.ENOENT, "No such file", HOSTILE)).startswith(f"{ESCAPED}: No such file; ")


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_are_echoed_safely(command: str) -> None:
    """argparse repeats what it does not understand."""
    for arguments in ([f"--{HOSTILE.replace('=', '')}"], ["x", "--size", HOSTILE], ["x", f"--json={HOSTILE * 1000}"]):
        done = run_command(command, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert is_shown_safely(done.stderr), done.stderr
        assert done.stderr.endswith(f"; see {command} --help\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_paths_are_echoed_safely(command: str, tmp_path: Path) -> None:
    """A file's name is anybody's; one that is too long for the system is one line too."""
    more = {"dit-sample": ["--labels", "1"], "dit-export": ["--dry-run"]}.get(command, [])
    for name in (HOSTILE, "x" * 5000):
        done = run_command(command, f"{tmp_path}/{name}", *more)
        assert (done.returncode, done.stdout) == (1, "")
        assert is_shown_safely(done.stderr), done.stderr


def test_a_bundles_names_are_listed_safely(bundles: dict[str, Path], tmp_path: Path) -> None:
    """A table holds the names of a bundle of somebody else's: no line of theirs looks like one of ours."""
    path = Path(shutil.copytree(bundles["fp32"], tmp_path / "evil\x1b[2J\nbundle"))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["source"]["name"] = HOSTILE + "x" * 10_000
    (path / "manifest.json").write_text(json.dumps(manifest))
    for arguments in (["--info"], ["--engine", "onnxruntime", "--quick", "--store", tmp_path / "store"]):
        done = run_command("dit-verify", path, *arguments)
        for line in (done.stdout + done.stderr).splitlines():
            assert line.isprintable()
            assert len(line) <= LONGEST_LINE
        assert not [line for line in done.stdout.split("\n") if line.startswith(("line", "bundle"))]


def test_records_of_the_log_are_shown_safely(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library logs is a line each."""
    monkeypatch.setattr(logging.getLogger("dit_runtime"), "propagate", False)  # pytest would pass on what it captures

    def work() -> int:
        logging.getLogger("dit_runtime").info("%s is not used", HOSTILE)
        return 0

    done = run_here(lambda: run("it", work), ["it"])
    assert (done.returncode, done.stderr) == (0, f"{ESCAPED} is not used\n")


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_a_progress_bar_is_safe(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its label holds names; a terminal that lacks its blocks gets other ones."""

    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    terminal = Terminal(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stderr", terminal)
    show_progress()
    try:
        with Progress(HOSTILE * 10, 2) as bar:
            bar.advance()
            bar.describe("x" * 10**6)
    finally:
        show_progress(False)
    drawn = terminal.buffer.getvalue().decode(encoding)
    assert all(part.isprintable() and len(part) < 160 for part in drawn.split("\r\x1b[K"))
    assert ("░" in drawn) == (encoding == "utf-8")


def test_json_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    """It is printed whatever the encoding, and a reader gets the very names."""
    print_json({"name": HOSTILE})
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"name": HOSTILE}


def test_libraries_print_nothing_beside_us() -> None:
    """From C on descriptors 1 and 2, Python's warnings, and loggers that have no handler."""
    code = """
import logging, os, sys, warnings
from dit_runtime.commands.common import run

def work():
    os.write(1, b"from C\\n")
    os.write(2, b"\\x1b[0;93mfrom C\\x1b[m\\n")
    os.system("echo from a child; echo from a child >&2")
    warnings.warn("a warning")
    logging.getLogger("another").error("logged")
    print("the result")
    print("ours", file=sys.stderr)
    return 0

run("it", work)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("the result\n", "ours\n")
    environment = {**os.environ, "DIT_DEBUG": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "the result\n"
    assert done.stderr.count("from C") == done.stderr.count("from a child") == 2
    assert "a warning" in done.stderr
    assert "logged" in done.stderr


# Errors that nobody foresaw.


def _recurse(count: int) -> int:
    return _recurse(count + 1) + 1


def _raise(error: BaseException) -> int:
    raise error


UNFORESEEN = {
    "MemoryError": (lambda: _raise(MemoryError()), "there is not enough memory; end other programs"),
    "numpy": (lambda: __import__("numpy").empty(2**57), "there is not enough memory (Unable to allocate"),
    "torch": (lambda: _raise(RuntimeError("DefaultCPUAllocator: can't allocate memory")), "there is not enough memory"),
    "ENOSPC": (
        lambda: _raise(OSError(errno.ENOSPC, "No space left on device", "f")),
        "f: No space left on device; ",
    ),
    "EFBIG": (lambda: _raise(OSError(errno.EFBIG, "File too large", "f")), "f: File too large; raise the limit on the"),
    "EACCES": (lambda: _raise(PermissionError(errno.EACCES, "Permission denied", "f")), "f: Permission denied; change"),
    "two names": (lambda: _raise(OSError(errno.EXDEV, "Cross-device link", "f", None, "g")), "f and g: Cross-device"),
    "no name": (lambda: _raise(OSError("12 requested and 0 written")), "a file cannot be used: 12 requested and 0"),
    "a fault": (lambda: _raise(KeyError(HOSTILE)), "this is a fault of ours: KeyError in "),
    "recursion": (lambda: _recurse(0), "this is a fault of ours: RecursionError in "),
    "an import": (lambda: _raise(ImportError("x")), "a library cannot be imported (x); install dit-export and its"),
    "a broken pipe": (
        lambda: _raise(BrokenPipeError(errno.EPIPE, "Broken pipe")),
        "a file cannot be used: Brok",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", UNFORESEEN)
def test_any_error_is_one_line(command: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in a command: exit 1 and one line, which says whose fault it is."""
    action, message = UNFORESEEN[kind]
    monkeypatch.setattr(Parser, "parse_args", lambda *_: action())
    done = run_command(command, "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert is_shown_safely(done.stderr), done.stderr
    assert done.stderr.startswith(f"{command}: {message}")


def test_a_faults_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_DEBUG", "1")
    done = run_here(lambda: run("it", lambda: _raise(KeyError("x"))), ["it"])
    first, *_, last = done.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last.startswith("it: this is a fault of ours: KeyError")


def test_an_interrupt_that_became_another_error() -> None:
    """In the midst of an import of C, KeyboardInterrupt turns into an ImportError."""

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt as interrupt:
            raise ImportError("numpy.core.multiarray failed to import") from interrupt
        return 0

    done = run_here(lambda: run("it", work), ["it"])
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "")


# Signals.

# Sends a signal to this process when it is about to import a module, and runs the command.
STOPPED_IN_AN_IMPORT = """
import os, sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {stop})

sys.meta_path.insert(0, Stop())
{entry}
main()
"""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize(
    ("command", "module", "stop"),
    grid(
        product(COMMANDS, ("argparse", "numpy", "dit_runtime.core.progress"), STOPS),
        fast=lambda command, module, stop: (
            (module == "numpy" and stop == signal.SIGINT) or (command == "dit-build" and module == "argparse")
        ),
    ),
)
def test_a_stop_in_an_import(command: str, module: str, stop: signal.Signals) -> None:
    """The first half second of a command is imports: Ctrl-C there ends it too, at once and in silence."""
    code = STOPPED_IN_AN_IMPORT.format(module=module, stop=int(stop), entry=ENTRIES[command])
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "")


def test_nothing_is_imported_before_stops_are_answered() -> None:
    """Whatever were imported first would be a moment in which Ctrl-C is a traceback."""
    code = (
        "import sys; before = set(sys.modules); "
        "import dit_runtime.commands.entry, dit_engines.entry, dit_export.entry; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [name for name in done.stdout.split() if not name.startswith("dit_")] == ["__future__"]


def test_a_stop_after_the_work() -> None:
    """A command that is done ends as it would: the interpreter is not interrupted while it is taken apart."""
    code = (
        "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT); "
        f"{ENTRIES['dit-build']}; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "--list-targets"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rtx" in done.stdout


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_that_is_ignored(stop: signal.Signals, scripts: dict[str, list[str]]) -> None:
    """As nohup and a shell's background jobs start a process: it is not stopped."""
    words = [*scripts["dit-build"], "--list-targets"]
    code = f"import os, signal; signal.signal({int(stop)}, signal.SIG_IGN); os.execv({words[0]!r}, {words!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        process.send_signal(stop)
        time.sleep(0.01)
    assert process.communicate()[1] == ""
    # The process may be stopped before it ignores the signal.
    assert process.returncode in (0, -stop)


# Streams.

STREAMS = {
    "no stdout": (">&-", 0, ""),
    "no stderr": ("2>&-", 0, None),
    "no stdout and stderr": (">&- 2>&-", 0, None),
    "none": ("<&- >&- 2>&-", 0, None),
    "stdout full": (">/dev/full", 1, "{name}: stdout: the results could not be printed (No space left on device); "),
    "stderr full": ("2>/dev/full", 0, None),
    "both full": (">/dev/full 2>/dev/full", 1, None),
    "read-only": ("1</dev/null", 1, "{name}: stdout: the results could not be printed (Bad file descriptor); "),
}


@pytest.mark.parametrize(
    ("name", "streams"),
    grid(product(("dit-verify", "dit-build", "dit-sample"), STREAMS), fast=lambda name, _: name == "dit-verify"),
)
def test_streams(name: str, streams: str, scripts: dict[str, list[str]], bundles: dict[str, Path]) -> None:
    """Results that are lost against the caller's will are an error, and nothing else is; never a traceback."""
    redirected, code, message = STREAMS[streams]
    options = {
        "dit-verify": [str(bundles["fp32"]), "--info"],
        "dit-build": ["--list-targets"],
        "dit-sample": ["--help"],
    }
    words = ["bash", "-c", f'exec "$@" {redirected}', "bash", *scripts[name], *options[name]]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    if message:
        assert done.stderr.startswith(message.format(name=name))
        assert is_shown_safely(done.stderr)
    else:
        assert done.stderr == ""


@pytest.mark.parametrize("streams", ["2>&-", ">&- 2>&-", "2>/dev/full", ">/dev/full 2>/dev/full"])
def test_an_error_without_stderr(streams: str, scripts: dict[str, list[str]]) -> None:
    """It cannot be said, and is an error all the same."""
    words = ["bash", "-c", f'exec "$@" {streams}', "bash", *scripts["dit-build"], "--nonsense"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_reader_that_goes_away(scripts: dict[str, list[str]]) -> None:
    """As of ``| head -1``: nobody wants the rest, and the work was done."""
    reader, writer = os.pipe()
    process = subprocess.Popen([*scripts["dit-build"], "--list-targets"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    os.close(reader)
    assert process.communicate()[1] == b""
    assert process.returncode == 0


def test_a_file_does_not_get_what_is_printed(
    scripts: dict[str, list[str]], bundles: dict[str, Path], tmp_path: Path
) -> None:
    """A file that is opened where stdout or stderr was closed would have its number."""
    output = tmp_path / "x.png"
    arguments = [str(bundles["fp32"]), "--labels", "1", "--steps", "2", "--engine", "onnxruntime", "-o", str(output)]
    words = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *scripts["dit-sample"], *arguments]
    assert subprocess.run(words, check=False).returncode == 0
    with Image.open(output) as image:
        assert image.size == (32, 32)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii:strict"])
def test_an_encoding_that_lacks_characters(
    encoding: str, scripts: dict[str, list[str]], bundles: dict[str, Path], tmp_path: Path
) -> None:
    """What it lacks is printed as an escape; a command never fails after its work is done."""
    path = tmp_path / "é漢 ≤"
    path.symlink_to(bundles["fp32"])
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    name = encoding.partition(":")[0]
    done = subprocess.run([*scripts["dit-verify"], path, "--info"], capture_output=True, env=environment, check=True)
    assert f"{path}: tiny".encode(name, "backslashreplace").decode(name) in done.stdout.decode(name)
    assert done.stderr == b""
    done = subprocess.run([*scripts["dit-verify"], f"--{path}"], capture_output=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.decode(name).startswith("dit-verify: ")


# Disks and folders.


def test_a_limit_on_the_size_of_files(scripts: dict[str, list[str]], bundles: dict[str, Path], tmp_path: Path) -> None:
    """One line, and nothing half-written."""
    folder = tmp_path / "out"
    folder.mkdir()
    arguments = [str(bundles["fp32"]), "--labels", "1", "--steps", "2", "--engine", "onnxruntime"]
    words = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", *scripts["dit-sample"], *arguments]
    done = subprocess.run([*words, "-o", folder / "x.png"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert is_shown_safely(done.stderr)
    assert "File too large" in done.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("9 requested and 0 written")]
)
def test_a_full_disk_in_an_export(
    error: OSError, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that writes the records says what stopped it; numpy's own writes have no error number."""
    from dit_export.reference import golden

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(golden.np, "savez", fail)
    done = run_command("dit-export", checkpoint, "--no-verify", "-o", tmp_path / "x.bundle")
    assert (done.returncode, done.stdout) == (1, "")
    assert is_shown_safely(done.stderr)
    assert (error.strerror or str(error)) in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_current_folder_that_is_gone(scripts: dict[str, list[str]], bundles: dict[str, Path], tmp_path: Path) -> None:
    """Absolute paths work; a relative one is said to have nothing that it is relative to."""
    code = 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"'
    words = ["bash", "-c", code, str(tmp_path / "gone")]
    done = subprocess.run([*words, *scripts["dit-verify"], bundles["fp32"], "--info"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    for command, *arguments in (
        ["dit-verify", "x"],
        ["dit-export", "DiT-S/8-256", "--random-weights", "0", "--dry-run"],
    ):
        done = subprocess.run([*words, *scripts[command], *arguments], capture_output=True, check=False)
        assert done.returncode == 1
        assert is_shown_safely(done.stderr.decode())


def test_a_home_and_caches_that_cannot_be_used(
    scripts: dict[str, list[str]], bundles: dict[str, Path], tmp_path: Path
) -> None:
    """A command that reads a bundle needs neither."""
    environment = {**os.environ, "HOME": "/etc/passwd", "TMPDIR": "/nonexistent", "XDG_CACHE_HOME": "/proc/none"}
    arguments = ["--labels", "1", "--steps", "2", "--engine", "openvino", "--store", str(tmp_path / "store")]
    words = [*scripts["dit-sample"], bundles["fp32"], *arguments, "-o", tmp_path / "x.png"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


# What libraries do besides.


@pytest.mark.parametrize(
    "argv",
    [
        ["dit-sample", "--labels", "1", "--steps", "2", "-o", "x.png"],
        ["dit-verify", "--quick", "--engine", "openvino"],
        pytest.param(
            ["dit-bench", "--engine", "onnxruntime", "--repeat", "1", "--pictures", "1"],
            marks=pytest.mark.slow,  # 3 s, for what the two others have shown of the libraries
        ),
    ],
    ids=lambda argv: argv[0],
)
def test_no_socket_is_opened_and_no_program_started(
    argv: list[str], scripts: dict[str, list[str]], bundles: dict[str, Path], tmp_path: Path
) -> None:
    """Libraries report to their makers, and look names up for it; tests/test_children.py watches builds and exports."""
    name, *arguments = argv
    words = [*scripts[name], str(bundles["fp32"]), *arguments, "--store", str(tmp_path / "store")]
    done, events = run_watched(words, tmp_path / "watch", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert events == []


def test_the_watch_sees() -> None:
    """Fails if the two tests of what libraries do would pass whatever they do."""
    code = (
        "import socket, subprocess; socket.socket().close(); subprocess.run(['true']); "
        "import sys; subprocess.run([sys.executable, '-c', '1'])"
    )
    with tempfile.TemporaryDirectory() as folder:
        done, events = run_watched([sys.executable, "-c", code], Path(folder))
    assert done.returncode == 0, done.stderr
    assert "socket.__new__ 2" in events
    assert "subprocess.Popen true" in events
    assert not [event for event in events if sys.executable in event]
    if can_trace():
        assert [event for event in events if "socket(AF_INET" in event]
        assert [event for event in events if event.startswith("execve") and event.endswith("/true")]
