"""The order of the house: who imports whom, and lists that must agree."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine import kernels
from tests import reference

ROOT = Path(__file__).parent.parent
SIMD = ROOT / "engine" / "simd"

# A module may import those above it, and those of its own package.
ORDER = [
    "errors",
    "tokenizer",
    "mt19937",
    "kernels",
    "api",
    "dtypes",
    "file_types",
    "gguf_write",
    "gguf",
    "imatrix",
    "mixture",
    "quantize",
    "safetensors",
    "validate",
    "dtype_report",
    "locate",
    "machine",
    "escapes",
    "tensor",
    "graph",
    "ops",
    "perf",
    "autograd",
    "rope",
    "self_extend",
    "control_vector",
    "kvcache",
    "llama",
    "lora",
    "grammar",
    "sampling",
    "model",
    "lookup",
    "prompt_cache",
    "generate",
    "dialogue",
    "measure",
    "merge",
    "convert",
    "training",
    "tools",
]
# Used by all; they use nobody.
LEAVES = {"tokenizer", "mt19937", "kernels"}
# Members of the table that are no kernels.
ABOUT_THE_VARIANT = ("isa", "lanes", "pairs")
SKIPPED_FOLDERS = {"simd", "__pycache__"}


# ---------------------------------------------------------------- who imports whom


def sources() -> dict[str, list[Path]]:
    """Files of each module by its full name; a .pyx and its .pxd are one module."""
    found: dict[str, list[Path]] = {}
    for package, folder in (("engine", ROOT / "engine"), ("engine.tools", ROOT / "tools")):
        for path in sorted(folder.rglob("*")):
            parts = path.relative_to(folder).with_suffix("").parts
            if path.suffix not in {".py", ".pyx", ".pxd"} or SKIPPED_FOLDERS & set(parts):
                continue
            names = parts[:-1] if parts[-1] == "__init__" else parts
            found.setdefault(".".join((package, *names)), []).append(path)
    return found


def absolute(module: str, is_package: bool, level: int, name: str) -> str:
    """Full name of what ``from ...name import`` of a module refers to."""
    if level == 0:
        return name
    parts = module.split(".")
    base = parts[: len(parts) - level + is_package]
    return ".".join([*base, name] if name else base)


def imports_of_python(module: str, path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            is_package = path.name == "__init__.py"
            base = absolute(module, is_package, node.level, node.module or "")
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def imports_of_cython(module: str, path: Path) -> set[str]:
    found = set()
    text = path.read_text()
    for dots, name, names in re.findall(
        r"^ *from +(\.*)([\w.]*) +c?import +(\([^)]*\)|.*)$", text, re.MULTILINE
    ):
        base = absolute(module, False, len(dots), name)
        found |= {base, *(f"{base}.{word}" for word in re.findall(r"\w+", names))}
    for names in re.findall(r"^ *c?import +(.*)$", text, re.MULTILINE):
        found |= set(re.findall(r"[\w.]+", names))
    return found


def imported_modules() -> dict[str, set[str]]:
    """Modules of the engine that each of them imports, wherever in the file it does."""
    files = sources()
    found = {}
    for module, paths in files.items():
        names: set[str] = set()
        for path in paths:
            read = imports_of_python if path.suffix == ".py" else imports_of_cython
            names |= read(module, path)
        found[module] = {n for n in names if n in files and n not in {module, "engine"}}
    return found


def room(module: str) -> str:
    """Entry of ORDER that a module belongs to."""
    return module.removeprefix("engine.").split(".")[0]


IMPORTS = imported_modules()


def test_every_module_has_a_place_in_the_order() -> None:
    rooms = {room(module) for module in IMPORTS} - {"engine"}
    assert rooms <= set(ORDER), f"add to ORDER in {Path(__file__).name}: {rooms - set(ORDER)}"


@pytest.mark.parametrize("module", sorted(set(IMPORTS) - {"engine"}))
def test_no_import_reaches_back(module: str) -> None:
    own = room(module)
    for other in IMPORTS[module]:
        assert room(other) == own or ORDER.index(room(other)) < ORDER.index(own), (
            f"{module} imports {other}, which stands behind it"
        )
        if own in LEAVES:
            assert room(other) in {own, "errors"}, f"{module} may use errors only, not {other}"


def test_the_package_itself_loads_nothing() -> None:
    """`import engine` must stay possible where no kernel runs, and quick for --help."""
    script = "import sys, engine; print(*(m for m in sys.modules if m.startswith('engine.')))"
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out == "\n"


def test_modules_of_a_package_do_not_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module not in done:
            for other in IMPORTS[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in IMPORTS:
        visit(module, ())


def test_the_order_is_read_from_real_imports() -> None:
    assert {"engine.graph", "engine.kernels", "engine.tensor"} <= IMPORTS["engine.ops.products"]
    assert "engine.errors" in IMPORTS["engine.tools.main"]


# ---------------------------------------------------------------- the list of kernels


def listed() -> dict[str, list[str]]:
    """Names in kernels.def by OP and ROW."""
    text = (SIMD / "kernels.def").read_text()
    found: dict[str, list[str]] = {"OP": [], "ROW": []}
    for kind, name in re.findall(r"^(OP|ROW)\((\w+)\)$", text, re.MULTILINE):
        found[kind].append(name)
    return found


def is_probe(name: str) -> bool:
    """Whether a kernel only measures the machine: it has no result to compare."""
    return name.startswith("probe_")


def without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return re.sub(r"#.*", "", text)


def c_fields(struct: str) -> list[str]:
    """Names of the members of a C struct in kernels.h, in order."""
    text = without_comments((SIMD / "kernels.h").read_text())
    body = re.search(rf"struct {struct} \{{(.*?)\}};", text, re.DOTALL)
    assert body is not None, f"kernels.h has no struct {struct}"
    fields = []
    for declaration in body[1].split(";")[:-1]:
        plain = re.sub(r"\[\w+\]", "", declaration)
        fields += [re.findall(r"\w+", part)[-1] for part in plain.split(",")]
    return fields


def cython_structs() -> dict[str, list[str]]:
    """Members of each struct that kernels.pxd declares, in order."""
    found: dict[str, list[str]] = {}
    struct = ""
    for line in without_comments((ROOT / "engine" / "kernels.pxd").read_text()).splitlines():
        indent = len(line) - len(line.lstrip())
        if opened := re.match(r" +struct (\w+):", line):
            struct = opened[1]
            found[struct] = []
        elif struct and indent == 8:
            pointer = re.search(r"\(\*(\w+)\)", line)
            parts = [pointer[1]] if pointer else line.split(",")
            found[struct] += [re.findall(r"\w+", part)[-1] for part in parts]
        elif indent < 8:
            struct = ""
    return found


def test_the_list_of_kernels_is_the_table_in_c_and_in_cython() -> None:
    names = listed()
    assert len(names["OP"]) > 10
    expected = sorted([*ABOUT_THE_VARIANT, *names["OP"], *names["ROW"]])
    assert sorted(c_fields("kernels")) == expected
    assert sorted(cython_structs()["kernels"]) == expected


def test_every_op_has_arguments_that_c_and_cython_name_alike() -> None:
    in_cython = cython_structs()
    for name in listed()["OP"]:
        struct = "probe_args" if is_probe(name) else f"{name}_args"
        assert in_cython[struct] == c_fields(struct), name


def test_every_kernel_has_a_twin_in_the_reference() -> None:
    names = listed()
    wanted = [n for n in names["OP"] + names["ROW"] if not is_probe(n)]
    missing = [n for n in wanted if not callable(getattr(reference, n, None))]
    assert not missing, f"tests/reference.py lacks {missing}"


def test_every_kernel_is_written_once_and_in_one_family() -> None:
    text = {p.name: p.read_text() for p in SIMD.glob("*.c")}
    for name in listed()["OP"] + listed()["ROW"]:
        homes = [f for f, t in text.items() if re.search(rf"^static \w+ FN\({name}\)\(", t, re.M)]
        assert len(homes) == 1, f"{name} is defined in {homes}"


def test_every_variant_of_the_build_is_a_file_and_a_list_entry() -> None:
    names = {*kernels.isas(), *kernels.missing_features()}
    assert {p.stem.removeprefix("variant_") for p in SIMD.glob("variant_*.c")} == names
    assert {p.stem.removeprefix("vec_") for p in SIMD.glob("vec_*.h")} == names | {"math"}


# ---------------------------------------------------------------- what the binaries show


def test_the_kernels_extension_exports_its_init_function_alone() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm on this machine")
    command = [nm, "-D", "--defined-only", kernels.__file__]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1] for line in out.splitlines()}
    cython_own = {s for s in symbols if s.startswith("__pyx_module_is_main_")}
    assert symbols - cython_own == {"PyInit_kernels"}
