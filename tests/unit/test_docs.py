"""The documentation says what the code does: its blocks run, its commands parse, its files and links exist."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import hpc_kfac as hk
from hpc_kfac import cli
from hpc_kfac.training.config import KINDS, parse
from support import launch_environment

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / folder / "README.md" for folder in ("benchmarks", "env", "jobs", "logs")]
RESULTS = runpy.run_path(str(ROOT / "benchmarks/results.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FIRST_WORDS = {"hpc-kfac", "mpirun", "torchrun", "python", "bash", "sbatch", "qsub", "bsub", "pytest", "pip", "mkdocs"}
FIRST_WORDS |= {"ruff", "mypy", "for", ".", "module", "$", "HPC_KFAC_RUN", "HPC_KFAC_NAME"}

# Runs scripts one after another in one process, since importing torch takes longest; prints what each said.
DRIVER = """
import contextlib, io, json, runpy, sys, traceback
told = {}
for path in sys.argv[1:]:
    out, error = io.StringIO(), ""
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(path, {"path": "tests/data/checkpoint-schema-1"}, run_name="__main__")
        except BaseException:
            error = traceback.format_exc()
    told[path] = [out.getvalue(), error]
print(json.dumps(told))
"""


class Block(NamedTuple):
    """Code on a page; `text` has no indentation."""

    page: Path
    language: str
    text: str


@cache
def blocks(page: Path) -> list[Block]:
    """Fenced blocks, and indented ones, whose language is "indented"."""
    text = page.read_text()
    found = [Block(page, kind, code) for kind, code in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"(?:\A|(?<=\n\n))((?: {4}.*\n|\n(?= {4}))+)", rest)
    return found + [Block(page, "indented", textwrap.dedent(code)) for code in indented]


def of(*languages: str) -> list[Any]:
    """Blocks of all pages in these languages, as parameters of a test."""
    found = [(n, block) for page in PAGES for n, block in enumerate(blocks(page)) if block.language in languages]
    return [pytest.param(block, id=f"{block.page.relative_to(ROOT)}-{n}") for n, block in found]


def is_shell(block: Block) -> bool:
    """Whether a block is of commands, by its first word."""
    return block.language in ("bash", "console") or (block.language == "indented" and is_command(block.text))


def is_command(text: str) -> bool:
    return bool(text.split()) and text.split()[0].partition("=")[0] in FIRST_WORDS


def script(block: Block) -> str:
    """A shell block without what commands print."""
    if not block.text.startswith("$ "):
        return block.text
    return "".join(line[2:] + "\n" for line in block.text.splitlines() if line.startswith("$ "))


def commands(page: Path) -> Iterator[list[str]]:
    """Every command of the page in words: lines of shell blocks, and code inside of sentences."""
    lines = [
        line for block in blocks(page) if is_shell(block) for line in script(block).replace("\\\n", " ").splitlines()
    ]
    prose = re.sub(r"^```.*?^```|^ {4}.*$", "", page.read_text(), flags=re.M | re.S)
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    for line in lines:
        if is_command(line):
            yield shlex.split(line, comments=True)


def ours(words: list[str]) -> list[str] | None:
    """What follows "hpc-kfac" or "-m hpc_kfac"; None for another command."""
    for n, word in enumerate(words):
        if word == "hpc-kfac" or (word == "hpc_kfac" and words[n - 1] == "-m"):
            return [word for word in words[n + 1 :] if word not in (";", "&&", "done")]
    return None


PASSAGES = [path.read_text() for path in EXAMPLES]


def is_passage(block: Block) -> bool:
    """Whether the block stands in one script of the gallery, in parts between lines of "..."."""
    parts = [part.strip("\n") for part in re.split(r"^\.\.\.$", block.text, flags=re.M)]
    return any(all(part in text for part in parts) for text in PASSAGES)


@pytest.mark.parametrize("script, page", [("settings", "settings"), ("method_table", "method-table")])
def test_written_pages_are_current(script: str, page: str) -> None:
    written = runpy.run_path(str(ROOT / f"docs/{script}.py"))["document"]()
    assert (ROOT / f"docs/{page}.md").read_text().strip() == written.strip(), (
        f"docs/{page}.md is out of date: python docs/{script}.py > docs/{page}.md"
    )


def test_every_method_run_file_and_public_name_has_its_place():
    choosing, trainer, api = ((ROOT / f"docs/{name}.md").read_text() for name in ("choosing", "trainer", "api"))
    assert [name for name in KINDS["method"].choices if name != "none" and f"`{name}`" not in choosing] == []
    assert [path.stem for path in (ROOT / "jobs/runs").glob("*.yaml") if f"`{path.stem}`" not in trainer] == []
    listed = re.findall(r"^::: hpc_kfac\.(\w+)$", api, re.M)
    assert sorted({*listed, "METHODS", "checkpoint", "methods"}) == sorted(hk.__all__)


def test_the_readme_is_short_and_has_the_figures_of_the_results():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 190
    assert RESULTS["table"]() in readme, "python benchmarks/results.py prints README's table"
    assert "bash tests/run.sh" in readme
    unnamed = [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in readme]
    assert unnamed == []


def test_the_gallery_has_every_example():
    gallery = (ROOT / "docs/gallery.md").read_text()
    rows = re.findall(r"^\| \[(\w+\.py)\]\(\.\./examples/\1\) \| .* \| `([^`]+)` \|$", gallery, re.M)
    assert sorted(name for name, _ in rows) == [path.name for path in EXAMPLES]
    for name, command in rows:
        assert command in (ROOT / "examples" / name).read_text().partition('"""\n\n')[0]


ALONE = [path for path in EXAMPLES if "MPI" not in (text := path.read_text()) and "torchrun" not in text]
WHOLE = [case for case in of("python") if not is_passage(case.values[0])]


def test_examples_for_one_process_and_blocks_of_python_run(tmp_path: Path) -> None:
    written = {tmp_path / f"{n}.py": case for n, case in enumerate(WHOLE)}
    for path, case in written.items():
        path.write_text(case.values[0].text)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER, *map(str, [*ALONE, *written])],
        capture_output=True, text=True, env=launch_environment(), timeout=110, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    assert [f"{name}: {error}" for name, (_, error) in told.items() if error] == []
    assert [path.name for path in ALONE if not told[str(path)][0]] == ["own_task.py"]
    (first,) = (path for path, case in written.items() if case.id == "README.md-0")
    assert float(told[str(first)][0]) < 0.2  # the loss; it begins at about 0.7


def test_the_example_under_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, "examples/with_ddp.py"],
        capture_output=True,
        text=True,
        env=launch_environment(),
        timeout=110,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("2 processes, loss ")


@pytest.mark.parametrize("source", ["README.md", "examples/own_task.py"])
def test_tasks_of_one_s_own_train(source: str, tmp_path: Path, monkeypatch, capsys) -> None:
    if source == "README.md":
        (text,) = (block.text for block in blocks(ROOT / source) if "CrossEntropyLoss" in block.text)
        (tmp_path / "mytasks.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
    else:
        monkeypatch.chdir(ROOT)
    given = next(
        words
        for words in map(ours, commands(PAGES[0] if source == "README.md" else GALLERY))
        if words and "user" in words
    )
    assert cli.main([*given, "--run_dir", str(tmp_path), "--epochs", "1"]) == 0
    assert "test_accuracy" in capsys.readouterr().out


GALLERY = ROOT / "docs/gallery.md"


@pytest.mark.parametrize("block", of("yaml"))
def test_run_files_on_pages_parse(block: Block, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(block.text)
    parse([str(tmp_path / "run.yaml")])


SHELL = [case for case in of("bash", "console", "indented") if is_shell(case.values[0])]


def test_shell_blocks_are_shell():
    """In one call of bash: each block is a function."""
    assert len(SHELL) > 20
    for case in SHELL:
        run = subprocess.run(["bash", "-n"], input=script(case.values[0]), text=True, capture_output=True)
        assert run.returncode == 0, f"{case.id}: {run.stderr}"


@cache
def options(command: str) -> str:
    """What `hpc-kfac COMMAND --help` prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert end.value.code == 0
    return said.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_these_options(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        given = ours(words)
        if given and given[0] not in cli.COMMANDS:
            assert given[0].startswith("-") or not given[0].islower(), (
                f"{page.name}: {' '.join(words)}: no such command"
            )
        elif given:
            check_options(given)


def check_options(given: list[str]) -> None:
    """Options of a command of ours exist, and settings of the trainer can be read."""
    command, *rest = given
    if command == "submit" and "--" in rest:
        check_options(["train", *rest[rest.index("--") + 1 :]])
        rest = rest[: rest.index("--")]
    if command == "train":
        known = {"--help", "--print_config", "..."}
        words = [word for word in rest if word not in known]
        words = ["--dry_run=true" if word == "--dry-run" else word for word in words]
        words = [re.sub(r"^--[\w.-]+", lambda key: "--" + key[0][2:].replace("-", "_"), word) for word in words]
        parse(["jobs/runs/digits.yaml" if word in ("RUN.yaml", "settings.yaml") else word for word in words])
        return
    action = f" {rest[0]}" if command == "checkpoint" and rest and rest[0].islower() and "/" not in rest[0] else ""
    for word in rest:
        if word.startswith("--") and word != "--help":
            assert word.partition("=")[0] in options(command + action), f"hpc-kfac {command} has no {word}"


def test_options_and_files_of_scripts_exist():
    """Of benchmarks/x.py --option, and every path of the checkout that a page names."""
    for page in PAGES:
        for words in commands(page):
            paths = [word for word in words if word.startswith("benchmarks/") and word.endswith(".py")]
            for path in paths:
                text = (ROOT / path).read_text()
                later = words[words.index(path) :]
                missing = [word for word in later if word.startswith("--") and f'"{word}"' not in text]
                assert not missing, f"{page.name}: {path} has no {missing}"
    named = r"[`( ]((?:hpc_kfac|benchmarks|docs|env|examples|jobs|tests)/[\w./-]+)"
    for page in PAGES:
        for path in re.findall(named, page.read_text()):
            path = path.rstrip(".")
            made = "/.venv" in path or "/.cache" in path or re.search(r"NAME|FILE|RUN\b", path)
            assert made or (ROOT / path).exists(), f"{page.relative_to(ROOT)} names {path}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    prose = re.sub(r"^```.*?^```|`[^`]+`", "", page.read_text(), flags=re.M | re.S)
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)(?:#\S*)?\)", prose) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    site = ["--strict", "--quiet", "-f", "docs/site/mkdocs.yml", "-d", str(tmp_path)]
    run = subprocess.run([sys.executable, "-m", "mkdocs", "build", *site], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    links = re.findall(r'(?:href|src)="([^"#]+)', (tmp_path / "index.html").read_text())
    assert {"results.html", "results.png"} <= set(links)
    assert [link for link in links if ":" not in link and not (tmp_path / link).exists()] == []
    assert "grad_worker_fraction" in (tmp_path / "api.html").read_text()
