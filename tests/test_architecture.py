"""The rules of the house: who may import whom, how long things may be, and who may know a decomposition by name."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tdc import decompositions

ROOT = Path(__file__).parents[1]
LINKS = ("kernels", "passes")

LEAVES = {"errors", "files", "memory", "options", "progress"}
SHARED = {"frontends.clock", "frontends.count", "frontends.graph", "frontends.lockstep", "frontends.program"}
"""What several frontends use."""
FRONTENDS = {"frontends", "frontends.fx", "frontends.nn", "frontends.onnx"} | SHARED
MAY_IMPORT: dict[str, set[str]] = {
    "ir": {"errors"},
    "decompositions": {"ir"} | LEAVES,
    "statistics": {"ir"} | LEAVES,
    "planning": {"ir"} | LEAVES,
    "kernels": {"ir"} | LEAVES,
    **{room: {"ir"} | LEAVES for room in SHARED},
    "frontends.lockstep": {"frontends.program", "ir"} | LEAVES,
    **{room: {"ir"} | SHARED | LEAVES for room in FRONTENDS - SHARED},
    "targets": {"ir", "kernels"} | LEAVES,
    "passes": {"ir", "decompositions", "statistics", "planning", "kernels", "targets"} | FRONTENDS | LEAVES,
    **dict.fromkeys(LEAVES, LEAVES),
}
"""Rooms not named here (api, __main__, demo, testing, the package itself) may import everything."""

FILE_LINES = 400
FUNCTION_LINES = 60
HEAVY = {"onnx", "onnx_ir", "onnxruntime", "onnxscript", "tensorly", "transformers", "triton"}
MAY_NAME_DECOMPOSITIONS = {"tdc.__main__", "tdc.demo"}


@dataclass(frozen=True)
class Source:
    """One file: its path, its dotted name (``tdc.passes.base`` for ``passes/base.py``) and its syntax tree."""

    path: Path
    module: str
    tree: ast.Module

    def at(self, node: ast.AST) -> str:
        return f"{self.module}:{getattr(node, 'lineno', 1)}"


def read_sources(root: Path) -> list[Source]:
    """The files of tdc/, passes/ and kernels/, each once: the links inside tdc/ are not followed."""
    folders = {root / "tdc": "tdc", **{root / link: f"tdc.{link}" for link in LINKS}}
    sources = []
    for folder, package in folders.items():
        for path in sorted(p for p in _walk(folder) if p.suffix == ".py"):
            inner = path.relative_to(folder).with_suffix("").parts
            module = ".".join([package, *(part for part in inner if part != "__init__")])
            sources.append(Source(path, module, ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return sources


def _walk(folder: Path) -> Iterator[Path]:
    for directory, _, files in os.walk(folder, followlinks=False):
        yield from (Path(directory) / name for name in files)


def room_of(module: str) -> str:
    """``tdc.ir.plan -> ir``, ``tdc.frontends.onnx.load -> frontends.onnx``, ``tdc.api -> api``, ``tdc -> ''``."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[:1] == ["frontends"] else 1])


def imported_modules(source: Source, known: set[str]) -> Iterator[tuple[ast.AST, str]]:
    """Every import of a file, also inside functions and for types, as (node, dotted name of the module)."""
    package = source.module if source.path.name == "__init__.py" else source.module.rpartition(".")[0]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield node, submodule if submodule in known else base


def type_checking_nodes(source: Source) -> set[ast.AST]:
    """What stands under ``if TYPE_CHECKING:``, and so is never imported when the program runs."""
    blocks = (node for node in ast.walk(source.tree) if isinstance(node, ast.If))
    guarded = (block for block in blocks if ast.unparse(block.test).endswith("TYPE_CHECKING"))
    return {node for block in guarded for statement in block.body for node in ast.walk(statement)}


def import_violations(sources: list[Source]) -> list[str]:
    known = {source.module for source in sources}
    found = []
    for source in sources:
        room = room_of(source.module)
        if room not in MAY_IMPORT:
            continue
        only_types = type_checking_nodes(source)
        for node, module in imported_modules(source, known):
            if module.split(".")[0] == "tdc":
                other = room_of(module)
                if other != room and other not in MAY_IMPORT[room]:
                    found.append(f"{source.at(node)} imports {module}; {room} may import {sorted(MAY_IMPORT[room])}")
            elif room == "ir" and node not in only_types and module.split(".")[0] not in sys.stdlib_module_names:
                found.append(f"{source.at(node)} imports {module}; ir may import the standard library only")
    return found


def length_violations(paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        if lines > FILE_LINES:
            found.append(f"{path} has {lines} lines, more than {FILE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > FUNCTION_LINES:
                    found.append(f"{path}:{node.lineno} {node.name} has {size} lines, more than {FUNCTION_LINES}")
    return found


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """String constants that stand alone as a statement: docstrings of modules, classes, functions and variables."""
    alone = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    return {value for value in alone if isinstance(value, ast.Constant)}


def naming_violations(sources: list[Source], homes: dict[str, str]) -> list[str]:
    """Places that know a decomposition; ``homes`` has the module of each name: ``{"cp": "tdc.decompositions.cp"}``."""
    known = {source.module for source in sources}
    found = []
    for source in sources:
        foreign = {name: home for name, home in homes.items() if home != source.module}
        if source.module in MAY_NAME_DECOMPOSITIONS:
            continue
        ignored = docstrings(source.tree)
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in ignored:
                words = node.value.replace(",", " ").split()
                if words and all(word in homes for word in words) and any(word in foreign for word in words):
                    found.append(f"{source.at(node)} has the string {node.value!r}")
            elif isinstance(node, ast.Compare | ast.MatchValue):
                operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.value]
                names = {getattr(operand, "attr", getattr(operand, "id", None)) for operand in operands}
                found += [f"{source.at(node)} compares with {name}" for name in foreign if name in names]
        for node, module in imported_modules(source, known):
            found += [f"{source.at(node)} imports {module}" for home in foreign.values() if module == home]
    return found


def decomposition_homes() -> dict[str, str]:
    return {name: type(decompositions.get(name)).__module__ for name in decompositions.names()}


def test_rooms_import_only_what_the_table_allows() -> None:
    assert import_violations(read_sources(ROOT)) == []


def test_every_room_is_in_the_table_or_at_the_top() -> None:
    folders = {room_of(source.module) for source in read_sources(ROOT) if source.path.name == "__init__.py"} - {""}
    assert folders - set(MAY_IMPORT) <= {"demo"}, "a new room needs a line in MAY_IMPORT"


def test_files_and_functions_are_short() -> None:
    folders = [ROOT / name for name in ("tdc", "tests", "benchmarks", *LINKS)]
    assert length_violations([path for folder in folders for path in _walk(folder) if path.suffix == ".py"]) == []


def test_no_decomposition_is_named_outside_its_own_file() -> None:
    assert naming_violations(read_sources(ROOT), decomposition_homes()) == []


def test_the_rooms_at_the_root_are_linked_relatively() -> None:
    assert {name: os.readlink(ROOT / "tdc" / name) for name in LINKS} == {name: f"../{name}" for name in LINKS}


def test_import_tdc_loads_nothing_heavy() -> None:
    code = "import sys, torch; before = set(sys.modules); import tdc; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {module.split(".")[0] for module in run.stdout.split()}
    assert "tdc" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("name", LINKS)
def test_the_root_name_of_a_room_cannot_be_imported(name: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1
    assert f"ImportError: this folder is the package 'tdc.{name}'" in run.stderr


def test_every_golden_file_belongs_to_a_test() -> None:
    tests: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tests[path.stem] = tests.get(path.stem, "") + path.read_text(encoding="utf-8")
    orphans = [
        str(path)
        for path in (ROOT / "tests" / "golden").rglob("*.txt")
        if f"def {path.stem.split('-')[0]}(" not in tests.get(path.parent.name, "")
    ]
    assert orphans == []


PLANTED = {
    "tdc/ir/plan.py": ("import torch", "tdc.ir.plan:1 imports torch; ir may import the standard library only"),
    "tdc/ir/text.py": ("from .. import options", "tdc.ir.text:1 imports tdc.options; ir may import ['errors']"),
    "tdc/planning/cost.py": ("def f():\n    from ..targets import cpu", "tdc.planning.cost:2 imports tdc.targets"),
    "tdc/frontends/nn/match.py": ("from ..onnx import load", "tdc.frontends.nn.match:1 imports tdc.frontends.onnx"),
    "tdc/frontends/onnx/emit.py": ("import tdc.passes.base", "tdc.frontends.onnx.emit:1 imports tdc.passes.base"),
    "kernels/base.py": ("from tdc.decompositions import get", "tdc.kernels.base:1 imports tdc.decompositions"),
    "passes/base.py": ("from ..api import compress", "tdc.passes.base:1 imports tdc.api"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_import_is_found(tmp_path: Path, name: str) -> None:
    code, message = PLANTED[name]
    _plant(tmp_path, {name: code, "tdc/options.py": "", "tdc/api.py": ""})
    (found,) = import_violations(read_sources(tmp_path))
    assert found.startswith(message)


def test_allowed_imports_are_not_found(tmp_path: Path) -> None:
    types_only = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor"
    files = {
        "tdc/ir/metric.py": f"{types_only}\nfrom ..errors import PlanError\nfrom . import site",
        "tdc/ir/site.py": "",
        "tdc/frontends/nn/cut.py": "import torch\nfrom ...ir import Site\nfrom ...progress import track",
        "tdc/frontends/nn/program.py": "from .. import program",
        "tdc/frontends/program.py": "",
        "passes/cut.py": "from tdc.frontends.nn import cut\nfrom ..kernels import base\nfrom .base import Pass",
        "tdc/api.py": "from . import passes\nfrom .frontends.onnx import load",
    }
    _plant(tmp_path, files)
    assert import_violations(read_sources(tmp_path)) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("if name == 'cp': pass", "tdc.planning.cost:1 has the string 'cp'"),
        ("DEFAULT = 'cp,tucker'", "tdc.planning.cost:1 has the string 'cp,tucker'"),
        ("if kind is Kind.cp: pass", "tdc.planning.cost:1 compares with cp"),
        ("from ..decompositions.cp import CP", "tdc.planning.cost:1 imports tdc.decompositions.cp"),
    ],
)
def test_a_planted_name_is_found(tmp_path: Path, code: str, message: str) -> None:
    _plant(tmp_path, {"tdc/planning/cost.py": code, "tdc/decompositions/cp.py": "name = 'cp'"})
    homes = {"cp": "tdc.decompositions.cp", "tucker": "tdc.decompositions.tucker"}
    assert naming_violations(read_sources(tmp_path), homes) == [message]


def test_names_in_docstrings_comments_and_sentences_are_not_found(tmp_path: Path) -> None:
    code = '"""cp"""\n\n# cp\nfailure = "the cp iteration did not converge"\ncp = torch.linalg.cp(x)\n'
    _plant(tmp_path, {"tdc/planning/cost.py": code, "tdc/demo.py": "ask = 'cp'"})
    assert naming_violations(read_sources(tmp_path), {"cp": "tdc.decompositions.cp"}) == []


def test_a_planted_long_file_and_function_are_found(tmp_path: Path) -> None:
    function = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
    _plant(tmp_path, {"tdc/api.py": function + "y = 1\n" * (FILE_LINES - FUNCTION_LINES)})
    path = tmp_path / "tdc/api.py"
    assert length_violations([path]) == [
        f"{path} has 401 lines, more than 400",
        f"{path}:1 f has 61 lines, more than 60",
    ]


def _plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
