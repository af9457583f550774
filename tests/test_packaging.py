"""The distribution: what the wheel holds, what it needs, and how it behaves beside another package named ``tdc``."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import tdc
from tdc import _clash

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NAME = "tensor-decomposition-compiler"
IMPORT_NAMES = {"protobuf": "google", "pillow": "PIL"}
TEST_COMMAND = 'pip install -e ".[test]" && pytest -n 2 --dist loadfile'


def folder_files(root: Path) -> set[str]:
    """All files of tdc/, through the links, as ``tdc/passes/base.py``."""
    walk = os.walk(root / "tdc", followlinks=True)
    paths = (Path(folder, name) for folder, _, names in walk for name in names)
    return {path.relative_to(root).as_posix() for path in paths if "__pycache__" not in path.parts}


def build(hook: str, project: Path, output: Path) -> Path:
    """Call a hook of the build backend as pip does, in a process of its own."""
    output.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(output)!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return output / run.stdout.split()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive of a copy of this tree, and the wheel built from what the archive holds."""
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "copy"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "venv", "results")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=unwanted)
    source = build("build_sdist", copy, folder / "output")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    wheel = build("build_wheel", folder / source.name.removesuffix(".tar.gz"), folder / "output")
    return source, wheel


def test_the_source_archive_holds_real_files_and_no_tests(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members if not member.isdir()}
    assert [member.name for member in members if member.issym() or member.islnk()] == []
    assert names >= folder_files(ROOT) | {"LICENSE", "README.md", "pyproject.toml"}
    assert {name for name in names if name.startswith(("tests", "benchmarks", "passes", "kernels"))} == set()


def test_the_wheel_holds_exactly_the_files_of_the_package(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == folder_files(ROOT)
    assert {"tdc/py.typed", "tdc/passes/__init__.py", "tdc/kernels/__init__.py"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert archives[1].name.endswith("-py3-none-any.whl")


def test_every_folder_with_code_is_a_package() -> None:
    code = {name.rpartition("/")[0] for name in folder_files(ROOT) if name.endswith(".py")}
    assert [folder for folder in sorted(code) if not (ROOT / folder / "__init__.py").is_file()] == []


def test_the_version_is_stated_alike() -> None:
    assert tdc.__version__ == PROJECT["project"]["version"]
    assert f"## {tdc.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_test_command_of_the_readme_is_what_ci_runs() -> None:
    assert TEST_COMMAND in (ROOT / "README.md").read_text(encoding="utf-8")
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_import_has_a_declared_dependency() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    needs = [*PROJECT["project"]["dependencies"], *(need for extra in extras for need in extra)]
    distributions = {re.split(r"[<>=\[]", need)[0].lower().replace("-", "_") for need in needs} | {"triton"}
    declared = {IMPORT_NAMES.get(name, name) for name in distributions}
    undeclared = []
    for name in sorted(name for name in folder_files(ROOT) if name.endswith(".py")):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            roots = {module.split(".")[0] for module in modules} - {"tdc"} - set(sys.stdlib_module_names)
            undeclared += [f"{name}:{node.lineno} imports {root}" for root in sorted(roots - declared)]
    assert undeclared == []


def test_a_decomposition_of_another_distribution_is_found(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(
        "from tdc.decompositions.svd import SVD\nclass Elsewhere(SVD):\n    name = 'elsewhere'\n"
    )
    _distribution(tmp_path, "other", {"entry_points.txt": "[tdc.decompositions]\nx = elsewhere:Elsewhere\n"})
    code = "from tdc import decompositions; print(*decompositions.names())"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert run.returncode == 0, run.stderr
    assert "elsewhere" in run.stdout.split()


@pytest.mark.parametrize(
    "files",
    [
        {"top_level.txt": "tdc\n"},
        {"RECORD": "tdc/__init__.py,sha256=x,1\ntdc/metadata.py,sha256=y,2\n"},
        {"RECORD": "a.py,,\ntdc/__init__.py,,\n"},
    ],
)
def test_a_second_owner_of_the_folder_is_named(tmp_path: Path, files: dict[str, str]) -> None:
    _distribution(tmp_path, "PyTDC", files)
    _distribution(tmp_path, "tensor_decomposition_compiler", {"top_level.txt": "tdc\n"})
    problem = _clash._mixed(tmp_path / "tdc")
    assert f"holds files of PyTDC as well as of {NAME}" in problem
    assert problem.endswith(f"pip uninstall PyTDC {NAME}")


def test_a_package_that_hides_this_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _distribution(tmp_path, "PyTDC", {"top_level.txt": "tdc\n"})
    other = ModuleType("tdc")
    other.__file__ = str(tmp_path / "tdc" / "__init__.py")
    monkeypatch.setitem(sys.modules, "tdc", other)
    with pytest.raises(ImportError, match=r"(?s)the package of PyTDC, instead of .*pip uninstall PyTDC"):
        _clash.check()


def test_an_unmixed_package_passes_fast() -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _clash.check()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.005


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("tensor_decomposition_compiler", {"top_level.txt": "tdc\n"}),
        ("Tensor.Decomposition-Compiler", {"RECORD": "tdc/__init__.py,,\n"}),
        ("~ytdc", {"top_level.txt": "tdc\n"}),
        ("plugin", {"RECORD": "tdc_plugin/__init__.py,,\nother/tdc/__init__.py,,\n"}),
        ("odd", {"top_level.txt": "\udcff\x00", "RECORD": "\udcff,"}),
        ("empty", {}),
    ],
)
def test_other_metadata_is_no_clash(tmp_path: Path, name: str, files: dict[str, str]) -> None:
    _distribution(tmp_path, name, files)
    (tmp_path / "file-1.egg-info").write_text("tdc")
    (tmp_path / "tdc").mkdir()
    assert _clash._mixed(tmp_path / "tdc") == ""
    assert _clash._mixed(tmp_path / "nowhere" / "tdc") == ""


def _distribution(site: Path, name: str, files: dict[str, str]) -> None:
    folder = site / f"{name}-1.0.dist-info"
    folder.mkdir()
    for file, text in {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", **files}.items():
        (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
