from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tdc.ir import Decline
from tdc.kernels.c import build, two_products

SOURCE = '__attribute__((visibility("default"))) int seven(void) { return 7; }\n'
BROKEN = "int seven(void) { return missing; }\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "seven.c"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    path.mkdir(mode=0o700)
    return path


def decline(answer: ctypes.CDLL | Decline) -> str:
    assert isinstance(answer, Decline), answer
    return answer.reason


@pytest.mark.usefixtures("compiled")
def test_a_library_is_built_once_and_then_taken_from_the_folder(source: Path, folder: Path) -> None:
    assert build.build(source, folder).seven() == 7
    (built,) = folder.iterdir()
    first = built.stat()
    assert stat.S_IMODE(first.st_mode) == 0o700
    assert build.build(source, folder).seven() == 7
    assert (built.stat().st_ino, built.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)


@pytest.mark.usefixtures("compiled")
def test_other_source_flags_and_compilers_are_other_files(source: Path, folder: Path) -> None:
    keys = {
        build._key({"s.c": "a"}, ("-O3",), ("cc",), "1"),
        build._key({"s.c": "b"}, ("-O3",), ("cc",), "1"),
        build._key({"s.c": "a"}, ("-O2",), ("cc",), "1"),
        build._key({"s.c": "a"}, ("-O3",), ("gcc",), "1"),
        build._key({"s.c": "a"}, ("-O3",), ("cc",), "2"),
    }
    assert len(keys) == 5
    assert build.build(source, folder).seven() == 7
    source.write_text(SOURCE.replace("7", "8"))
    assert build.build(source, folder).seven() == 8
    assert len(list(folder.iterdir())) == 2


@pytest.mark.usefixtures("compiled")
def test_what_a_source_includes_counts_as_its_text(source: Path, folder: Path) -> None:
    header = source.with_name("number.h")
    header.write_text("enum { NUMBER = 7 };\n")
    source.write_text('#include "number.h"\n' + SOURCE.replace("7", "NUMBER"))
    assert build.build(source, folder).seven() == 7
    header.write_text("enum { NUMBER = 9 };\n")
    assert build.build(source, folder).seven() == 9
    assert len(list(folder.iterdir())) == 2


def test_a_failed_build_gives_the_reason_and_leaves_nothing(source: Path, folder: Path) -> None:
    source.write_text(BROKEN)
    reason = decline(build.build(source, folder))
    assert "C compiler" in reason
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("compiled")
def test_the_reason_of_a_failed_build_is_the_compilers(source: Path, folder: Path) -> None:
    source.write_text(BROKEN)
    reason = decline(build.build(source, folder))
    assert "failed (1)" in reason
    assert "missing" in reason


def test_without_a_compiler_the_answer_names_those_that_were_looked_for(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    assert decline(build.build(source, folder)) == "no C compiler: cc, gcc, clang, not found"
    monkeypatch.setenv("CC", "mycc -m64")
    assert decline(build.build(source, folder)) == "no C compiler: CC names mycc, not found"
    monkeypatch.setenv("CC", "'")
    assert decline(build.build(source, folder)).startswith("CC cannot be read: No closing quotation")


def test_what_is_no_compiler_is_declined(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{sys.executable} -c 'import sys; print(1); sys.exit(\"--version\" not in sys.argv)'")
    assert "failed (1)" in decline(build.build(source, folder))
    broken = folder.parent / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o700)
    monkeypatch.setenv("CC", str(broken))
    assert "broken cannot be run" in decline(build.build(source, folder))
    silent = folder.parent / "silent"
    silent.write_text("#!/bin/sh\nexit 0\n")
    silent.chmod(0o700)
    monkeypatch.setenv("CC", str(silent))
    assert "cannot be built" in decline(build.build(source, folder))
    assert list(folder.iterdir()) == []


def test_a_compiler_that_never_ends_is_stopped(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = folder.parent / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o700)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setattr(build, "LONGEST", 0.2)
    assert "took more than 0.2 s" in decline(build.build(source, folder))


@pytest.mark.usefixtures("compiled")
def test_a_folder_that_is_gone_is_declined(source: Path, folder: Path) -> None:
    assert decline(build.build(source, folder / "gone")).startswith("the C kernels cannot be built in ")


@pytest.mark.usefixtures("compiled")
def test_a_broken_file_in_the_folder_is_not_a_crash(source: Path, folder: Path) -> None:
    assert build.build(source, folder).seven() == 7
    (built,) = folder.iterdir()
    built.unlink()
    built.write_bytes(b"no library")
    built.chmod(0o700)
    assert build.build(source, folder).seven() == 7
    assert [path.name for path in folder.iterdir()] == [built.name]


@pytest.mark.usefixtures("compiled")
def test_a_file_that_others_could_have_written_is_built_anew(source: Path, folder: Path) -> None:
    build.build(source, folder)
    (built,) = folder.iterdir()
    built.unlink()
    built.write_bytes(b"planted")
    built.chmod(0o722)
    assert build.build(source, folder).seven() == 7
    assert built.read_bytes() != b"planted"
    assert stat.S_IMODE(built.stat().st_mode) == 0o700


@pytest.mark.usefixtures("compiled")
def test_a_compiler_without_threads_builds_for_one(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "THREADS", ("-fno-such-flag-of-this-compiler=yes",))
    assert build.build(source, folder).seven() == 7


def test_the_cache_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    folder = build.cache_folder()
    assert folder == tmp_path / "new" / "tdc" / "kernels"
    for part in (folder, folder.parent):
        assert stat.S_IMODE(part.stat().st_mode) == 0o700


def test_without_a_setting_the_cache_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for base in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert build.cache_folder() == tmp_path / ".cache" / "tdc" / "kernels"


@pytest.mark.parametrize("spoiled", ["mode", "mode of the upper one", "owner", "link", "file"])
def test_a_cache_folder_that_others_can_enter_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoiled: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = build.cache_folder()
    if spoiled == "mode":
        folder.chmod(0o750)
    elif spoiled == "mode of the upper one":
        folder.parent.chmod(0o777)
    elif spoiled == "owner":
        user = os.geteuid()
        monkeypatch.setattr(build.os, "geteuid", lambda: user + 1)
    else:
        folder.rmdir()
        if spoiled == "link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            folder.symlink_to(tmp_path / "elsewhere")
        else:
            folder.write_text("")
    other = build.cache_folder()
    assert tmp_path not in other.parents
    assert stat.S_IMODE(other.stat().st_mode) == 0o700
    assert other == build.cache_folder(), "one for the life of the process"


@pytest.mark.usefixtures("compiled")
def test_processes_that_build_at_once_all_get_the_library(source: Path, folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tdc.kernels.c.build import build; sys.stdin.read(1)\n"
        "print(build(Path(sys.argv[1]), Path(sys.argv[2])).seven())"
    )
    command = [sys.executable, "-c", code, str(source), str(folder)]
    runs = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)
        for _ in range(2)
    ]
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("g")
        run.stdin.flush()
    assert [run.communicate()[0].strip() for run in runs] == ["7", "7"]
    assert len(list(folder.iterdir())) == 1


def test_importing_the_package_compiles_and_registers_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, tdc, tdc.kernels, torch\n"
        "print(any(name.startswith('tdc.kernels.c') for name in sys.modules), hasattr(torch.ops.tdc, 'two_products'))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == ["False", "False"], run.stderr
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_the_operator_runs_the_reference(tmp_path: Path) -> None:
    code = (
        "import torch; from tdc.kernels.c import two_products as t\n"
        "x, a, b = torch.randn(2, 5), torch.randn(3, 5), torch.randn(4, 3)\n"
        "print(t.available().reason); print(torch.equal(t.operator()(x, a, b), t.reference(x, a, b)), t.versions())"
    )
    environment = {**os.environ, "CC": "nowhere", "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.splitlines() == ["no C compiler: CC names nowhere, not found", "True ()"], run.stderr


def test_the_source_of_the_kernels_has_no_warnings(tmp_path: Path) -> None:
    command = build.compiler()
    if isinstance(command, Decline):
        pytest.skip(command.reason)
    flags = ["-Wall", "-Wextra", "-std=gnu11", "-O1", "-c", str(two_products.SOURCE), "-o", str(tmp_path / "x.o")]
    run = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
