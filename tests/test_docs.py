"""README.md and docs/: commands parse, links resolve, figures name their source, and lists are of what there is.

Nothing is run but the examples in Python: a command line is given to the command's own parser, and goes no further.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import pytest

from dit_runtime.bundle import manifest as bundle_manifest
from dit_runtime.bundle.manifest import DiffusionSpec
from dit_runtime.bundle.reader import GOLDEN, open_bundle
from dit_runtime.samplers.by_name import SAMPLERS
from dit_runtime.samplers.diffusion import ddim

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README_LINES = 120  # two screens

# Each command's entry point. Its parser is what it calls ``parse_args`` of.
COMMANDS = {
    "dit-export": "dit_export.command",
    "dit-build": "dit_engines.command",
    "dit-sample": "dit_runtime.commands.sample",
    "dit-verify": "dit_runtime.commands.verify",
    "dit-bench": "dit_runtime.commands.bench",
    "dit-tune": "dit_runtime.commands.tune",
    "dit-serve": "dit_serve.command",
    "dit-triton": "dit_serve.triton_command",
}
# Options of other programs that the pages name by themselves.
FOREIGN_OPTIONS = {"--system-site-packages", "--load-inputs", "--load-outputs"}

# A figure that somebody measured: a number with a unit, a power of ten, or a share.
FIGURE = re.compile(
    r"(?<![\w.])(?:\d[\d.,]*\d|\d)(?: ?(?:dB|MB|GB|kB|%|GMAC|GFLOP/s)(?!\w)| m?s(?!\w)|e-\d+)"
    r"|(?<![\w.])0\.\d{2,}(?![\w.])"
)
# Numbers of that form that nobody measured, and what they are.
NOT_MEASURED = {
    "99 %": "the audit's limit",
    "8 GB": "an Orin Nano's memory, by its data sheet",
    "1e-5": "diffusers' default of norm_eps",
    "1e-6": "the official code's ε",
    "95 %": "the intervals' level",
    "0.18215": "Stable Diffusion's scaling factor, by its configuration",
    "0.13025": "SDXL's",
}
SOURCE = re.compile(r"(?:[Pp]rinted|[Hh]eld) by\s+((?:`[^`]+`(?:, | and )?)+)")


@dataclass(frozen=True)
class Block:
    """A piece of a page. ``kind``: heading, code, table or text; ``line`` is the first one's number."""

    page: Path
    line: int
    kind: str
    text: str
    language: str = ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """A page in pieces: headings, fenced and indented code, tables, list items and paragraphs."""
    lines = page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        line, first = lines[at], at + 1
        if not line.strip():
            at += 1
        elif line.startswith("```"):
            end = next(index for index in range(at + 1, len(lines)) if lines[index].startswith("```"))
            yield Block(page, first, "code", "\n".join(lines[at + 1 : end]), line.strip("`"))
            at = end + 1
        elif line.startswith("    "):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            yield Block(page, first, "code", "\n".join(line[4:] for line in lines[at:end]).rstrip())
            at = end
        elif line.startswith("#"):
            yield Block(page, first, "heading", line)
            at += 1
        else:
            table = line.startswith("|")
            end = at + 1
            while end < len(lines) and lines[end].strip() and lines[end].startswith("|") == table:
                if not table and re.match(r"(- |\d{1,2}\. |\*\*|#|```)", lines[end]):
                    break
                end += 1
            yield Block(page, first, "table" if table else "text", "\n".join(lines[at:end]))
            at = end


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
CODE = [block for block in BLOCKS if block.kind == "code"]
# Code within text and tables; a span may go over the end of a line.
SPANS = [
    (block, " ".join(span.split()))
    for block in BLOCKS
    if block.kind != "code"
    for span in re.findall(r"`([^`]+)`", block.text)
]


class Parsed(BaseException):
    """Ends a command where its arguments are parsed: no error that a command would catch."""


def parser_of(name: str, argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser that a command gives its arguments to, when it has parsed them.

    Raises:
        AssertionError: the command refused the arguments, or did not parse any.
    """
    parse, seen = argparse.ArgumentParser.parse_args, list[argparse.ArgumentParser]()

    def stop(self: argparse.ArgumentParser, *args: Any, **options: Any) -> NoReturn:
        seen.append(self)
        parse(self, *args, **options)
        raise Parsed

    said, before, hook = io.StringIO(), signal.getsignal(signal.SIGTERM), sys.unraisablehook
    try:
        with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), contextlib.redirect_stderr(said):
            importlib.import_module(COMMANDS[name]).main(list(argv))
    except Parsed:
        return seen[0]
    except SystemExit as error:
        raise AssertionError(said.getvalue().strip() or f"{name} ended with {error.code}") from None
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook
    raise AssertionError(f"{name} parsed no arguments")


PARSERS = {name: parser_of(name, ["NAME"]) for name in COMMANDS}
OPTIONS = {name: {*parser._option_string_actions} for name, parser in PARSERS.items()}
CHOICES = {
    option: {*map(str, action.choices)}
    for parser in PARSERS.values()
    for option, action in parser._option_string_actions.items()
    if action.choices is not None
}


def command_lines() -> Iterator[tuple[str, str]]:
    """Every command line in the pages' code, and every one in their text that has an argument: place, line."""
    for block in CODE:
        for line in block.text.splitlines():
            if re.match(r"(\$ )?dit-\w+ ", line):
                yield str(block), line.removeprefix("$ ").partition(" > ")[0]
    for block, span in SPANS:
        if re.match(r"dit-\w+ [^-]", span):
            yield str(block), span


LINES = sorted(set(command_lines()))


@pytest.mark.parametrize(("place", "line"), LINES, ids=[f"{place}: {line[:60]}" for place, line in LINES])
def test_commands_parse(place: str, line: str) -> None:
    """Fails for a command, an option or a value that the command does not take, and for an option cut short."""
    name, *argv = shlex.split(line, comments=True)
    assert name in COMMANDS, f"{place}: {name} is no command"
    parser_of(name, argv)
    unknown = {item.partition("=")[0] for item in argv if item.startswith("--")} - OPTIONS[name]
    assert not unknown, f"{place}: {name} has no {', '.join(unknown)}"


def test_options_named_in_the_text_exist() -> None:
    """Fails for ``--option`` in running text that no command has, or that the command named with it has not."""
    every = set().union(*OPTIONS.values()) | FOREIGN_OPTIONS
    for block, span in SPANS:
        name, *rest = span.split()
        options = {item.partition("=")[0] for item in rest if item.startswith("--")}
        if name in COMMANDS:
            assert options <= OPTIONS[name], f"{block}: {name} has no {', '.join(options - OPTIONS[name])}"
        elif name.startswith("--"):
            assert {name} | options <= every, f"{block}: no command has {span}"
            assert not rest or CHOICES.get(name, {rest[0]}) >= {rest[0]}, f"{block}: {span} is not one of its choices"
        elif (script := ROOT / name).suffix == ".py" and script.is_file():
            text = script.read_text(encoding="utf-8")
            assert all(f'"{option}"' in text for option in options), f"{block}: {name} has no {options}"


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_make_targets_and_extras_exist() -> None:
    """Fails for ``make NAME`` that the Makefile has not, and for an extra that pyproject.toml has not."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    optional = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", optional, re.MULTILINE))
    targets = make_targets()
    for place, text in [*((block, block.text) for block in CODE), *SPANS]:
        if (words := re.findall(r"(?:^|\s)make ([a-z][\w-]*)", text)) and not set(words) <= targets:
            pytest.fail(f"{place}: no make {set(words) - targets}")
        named = re.findall(r"dit-export\[([\w,-]+)\]", text) + re.findall(r"^(?:-e )?'?\.?\[([a-z][\w,]*)\]'?$", text)
        for extra in (extra for names in named for extra in names.split(",")):
            assert extra in extras, f"{place}: no extra {extra}"


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.lstrip("#").strip()).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    found: list[str] = []
    for block in blocks_of(page):
        if block.kind == "heading":
            anchor = anchor_of(block.text)
            repeated = sum(other.partition("|")[0] == anchor for other in found)
            found.append(anchor if not repeated else f"{anchor}|-{repeated}")
    return {anchor.replace("|", "") for anchor in found}


def test_links_and_anchors_resolve() -> None:
    """Fails for a link to a file or a heading that is not there; links to other sites are not followed."""
    seen = 0
    for block in (block for block in BLOCKS if block.kind in ("text", "table")):
        targets = re.findall(r"\]\(([^)\s]+)\)", block.text) + re.findall(r'src="([^"]+)"', block.text)
        for target in (target for target in targets if not target.startswith("http")):
            seen += 1
            file, _, anchor = target.partition("#")
            path = (block.page.parent / file).resolve() if file else block.page
            assert path.is_relative_to(ROOT), f"{block}: {target} leads out of the repository"
            assert path.exists(), f"{block}: {target}"
            if anchor:
                assert anchor in anchors(path), f"{block}: {target}, of {sorted(anchors(path))}"
    assert seen > 50


def test_every_page_can_be_reached() -> None:
    """Fails for a page that the README or the index does not link to, and for one that the sdist leaves out."""
    index = ROOT / "docs" / "README.md"
    pages = [page for page in PAGES[1:] if page != index]
    for start, prefix in ((ROOT / "README.md", "docs/"), (index, "")):
        text = start.read_text(encoding="utf-8")
        assert [page.name for page in pages if f"({prefix}{page.name}" not in text] == [], start
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    sdist = project.partition("[tool.hatch.build.targets.sdist]")[2].partition("\n[")[0]
    assert '"/docs"' in sdist
    assert '"/README.md"' in sdist


def test_paths_in_the_text_exist() -> None:
    """Fails for a file or folder of the repository that a page names and that is not there."""
    folders = ("benchmarks", "tests", "runtime", "engines/dit_engines", "dit_export", "docs", ".ci")
    for place, text in [*((block, block.text) for block in CODE), *SPANS]:
        for path in re.findall(rf"(?<![\w/.-])(?:{'|'.join(map(re.escape, folders))})/[\w./-]*", text):
            assert (ROOT / path).exists(), f"{place}: {path}"


def figures_in(text: str) -> list[str]:
    """The figures of a text that somebody measured."""
    found = [" ".join(match.group().split()) for match in FIGURE.finditer(text)]
    return [figure for figure in found if figure not in NOT_MEASURED]


def check_sources(place: str, sources: Sequence[str]) -> None:
    """Raises AssertionError for a source that prints nothing: a command or a file that is not there."""
    assert sources, place
    for source in sources:
        words = source.split()
        if words[0] == "make":
            assert words[1] in make_targets(), f"{place}: {source}"
        elif words[0] in COMMANDS:
            assert source in COMMANDS or parser_of(words[0], words[1:]), f"{place}: {source}"
        else:
            path = words[-1] if words[0] == "pytest" else words[0]
            assert path.endswith(".py"), f"{place}: {source} is neither a command nor a script"
            assert (ROOT / path).is_file(), f"{place}: {source}"


def sources_in(text: str) -> list[str]:
    return [" ".join(source.split()) for group in SOURCE.findall(text) for source in re.findall(r"`([^`]+)`", group)]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip())[1:-1]]


def test_figures_name_what_prints_them() -> None:
    """Fails for a measured figure whose paragraph, table or output does not say which command prints it.

    A paragraph says ``printed by`` (``held by`` for a limit that a test holds); a table has a column of that name, or
    the paragraph before it says so; output begins with the command.
    """
    seen = 0
    for index, block in enumerate(BLOCKS):
        if block.kind == "heading":
            continue
        if sources := sources_in(block.text):
            check_sources(str(block), sources)
        if block.kind == "table":
            header, _, *rows = block.text.splitlines()
            if "printed by" in cells(header):
                column = cells(header).index("printed by")
                for row in rows:
                    assert len(cells(row)) == len(cells(header)), f"{block}: {row}"
                    check_sources(str(block), re.findall(r"`([^`]+)`", cells(row)[column]))
                seen += len(figures_in("\n".join(rows)))
                continue
        if block.kind == "code" and block.language:
            continue  # a program
        figures = figures_in(block.text)
        seen += len(figures)
        if not figures or sources:
            continue
        before = BLOCKS[index - 1] if index and BLOCKS[index - 1].page == block.page else block
        if block.kind == "code":
            assert re.search(r"^\$ (make|dit-)", block.text, re.MULTILINE), f"{block}: output of what? {figures}"
        elif block.kind == "table":
            assert sources_in(before.text), f"{block}: no column and no caption 'printed by', with {figures}"
        else:
            pytest.fail(f"{block}: {figures}, printed by what?")
    assert seen > 150


def test_the_readme_is_two_screens() -> None:
    """Fails when the README grows: what is true and long has its place in docs/."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES


def test_examples_in_python_import_what_there_is() -> None:
    """Fails for an example that is no Python, or that imports a name from our packages that is not there."""
    found = 0
    for block in (block for block in CODE if block.language == "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dit_"):
                module = importlib.import_module(node.module or "")
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{block}: {node.module} has no {missing}"
                found += 1
    assert found >= 3


def test_the_sampler_of_the_example_is_ddim() -> None:
    """Fails if the sampler that docs/extending.md writes down does not run, or is not what it says."""
    (example,) = [block for block in CODE if "def my_sampler" in block.text]
    names: dict[str, Any] = {}
    exec(compile(example.text, str(example), "exec"), names)
    diffusion = DiffusionSpec(tuple(np.linspace(1e-4, 0.02, 1000).tolist()), "epsilon", 4, "leading", 0, True)
    mine, ours = names["my_sampler"](diffusion, 10), ddim(diffusion, 10)
    assert np.array_equal(mine.timesteps, ours.timesteps)
    assert np.array_equal(mine.coefficients, ours.coefficients)
    assert np.array_equal(mine.initial, ours.initial)


def section(page: str, heading: str) -> list[Block]:
    """The blocks below a heading of a page, up to the next one of any level."""
    found: list[Block] = []
    inside = False
    for block in (block for block in BLOCKS if block.page.name == page):
        if block.kind == "heading":
            inside = block.text.lstrip("# ") == heading
        elif inside:
            found.append(block)
    assert found, f"{page} has no section {heading!r}"
    return found


def first_column(blocks: Sequence[Block]) -> list[str]:
    """The code spans of the first column of a section's first table."""
    table = next(block for block in blocks if block.kind == "table")
    return [name for row in table.text.splitlines()[2:] for name in re.findall(r"`([^`]+)`", cells(row)[0])]


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("`manifest.json`", "Manifest"),
        ("`source`", "SourceSpec"),
        ("`model`", "ModelSpec"),
        ("`diffusion`", "DiffusionSpec"),
        ("`autoencoder`", "AutoencoderSpec"),
        ("`precision`", "PrecisionSpec"),
        ("`defaults`", "DefaultsSpec"),
        ("`graphs`", "GraphSpec"),
        ("`files`", "FileSpec"),
    ],
)
def test_the_format_has_every_field(heading: str, kind: str) -> None:
    """Fails if the specification lacks a field of the manifest, or has one that the manifest has not."""
    expected = {item.name for item in fields(getattr(bundle_manifest, kind))}
    assert set(first_column(section("bundle-format.md", heading))) == expected


def test_the_format_has_every_record_and_tensor(bundles: dict[str, Path]) -> None:
    """Fails for a file, array, tensor or dtype of an exported bundle that the specification does not name."""
    parts = ("conditioner", "step and probe", "decoder and encoder")
    tables = "".join(block.text for part in parts for block in section("bundle-format.md", part))
    rows = [
        row
        for block in section("bundle-format.md", "Golden records")
        if block.kind == "table"
        for row in block.text.splitlines()[2:]
    ]
    listed = {name: cells(row)[1] for row in rows for name in re.findall(r"`([^`]+)`", cells(row)[0])}
    for path in bundles.values():
        bundle = open_bundle(path)
        for file in (path / GOLDEN).iterdir():
            says = listed[re.sub(r"^tile_\d+$", "tile_N", file.stem)]
            with np.load(file) as arrays:
                assert not [name for name in arrays if f"`{name}`" not in says], file
        for name, graph in bundle.manifest.graphs.items():
            for tensor in (*graph.inputs, *graph.outputs):
                shown = "blocks.N" if tensor.name.startswith("blocks.") else tensor.name
                assert f"`{shown}`" in tables, (name, tensor.name)
                assert tensor.dtype in tables, (name, tensor.dtype)


def test_the_format_is_of_this_schema() -> None:
    text = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    assert f"specifies schema {bundle_manifest.SCHEMA}." in text


def test_every_sampler_is_listed() -> None:
    """Fails for a sampler that docs/samplers.md does not list, or lists and there is not."""
    assert set(first_column(section("samplers.md", "The samplers"))) - {"TABLE.json"} == set(SAMPLERS)


def test_the_layout_lists_every_module() -> None:
    """Fails for a module without a line in docs/layout.md, and for a line without a module."""
    listed = set()
    for block in (block for block in BLOCKS if block.page.name == "layout.md"):
        if block.kind == "heading":
            folder = re.search(r"`([\w/]+)/`", block.text)
        elif block.kind == "table" and block.text.startswith("| module |") and folder:
            listed |= {f"{folder[1]}/{cells(row)[0].strip('`')}" for row in block.text.splitlines()[2:]}
    packages = ("dit_export", "engines/dit_engines", "runtime/dit_runtime", "runtime/dit_serve")
    paths = [path for package in packages for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"]
    there = {path.relative_to(ROOT).as_posix() for path in paths}
    lacking = [f"{path}: {ast.get_docstring(ast.parse((ROOT / path).read_text()))}" for path in sorted(there - listed)]
    assert not lacking, "give it a line in docs/layout.md: " + "\n".join(line.partition("\n")[0] for line in lacking)
    assert not listed - there, f"in docs/layout.md, and not there: {sorted(listed - there)}"


def test_errors_of_devices_are_the_codes_own() -> None:
    """Each message in the table of failures is one that the packages have; … stands for what differs."""
    page = ROOT / "docs" / "backends.md"
    (table,) = (block for block in BLOCKS if block.page == page and block.text.startswith("| what is printed |"))
    sources = [*(ROOT / "runtime").rglob("*.py"), *(ROOT / "engines").rglob("*.py")]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    known = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    rows = table.text.splitlines()[2:]
    assert len(rows) >= 6
    for row in rows:
        spans = [span for span in re.findall(r"`([^`]+)`", row.split(" | ")[0]) if not span.startswith("sudo ")]
        assert spans, row
        for span in spans:
            for part in re.split(r"…|^tensorrt\b", span):
                assert any(part.strip() in text for text in known), f"{page.name}: no error says {part!r}"


def test_failures_of_servers_name_their_tests() -> None:
    """Each row of the table of failures names tests that there are."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = text.partition("\n| what happens |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(rows) >= 12
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "serve").glob("test_*.py"))
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert all(f"def {name}(" in tests for name in named), row
