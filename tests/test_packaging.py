"""What `pip install .` puts on a machine, and that it works there."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def source_files() -> set[str]:
    return {str(path.relative_to(ROOT)) for room in ("engine", "kernels") for path in (ROOT / room).rglob("*.py")}


def build_wheel(folder: Path, env: dict[str, str] | None = None) -> Path:
    """Built from a copy: a build folder in the repository could bring old files."""
    source, target = folder / "source", folder / "wheel"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ("engine", "kernels", "csrc", "tests"):
        # with __pycache__, as in a used checkout; libraries are of this machine's last build
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("*.so"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", target, ".", cwd=source, env=env)
    [path] = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("build"))


def libraries() -> set[str]:
    """What csrc/ gives here: one library per compiler that is installed."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    compilers = {"_cpu.so": shutil.which("g++") or shutil.which("c++") or shutil.which("clang++"), "_cuda.so": nvcc}
    return {f"tandem/kernels/{name}" for name, compiler in compilers.items() if compiler}


def test_the_wheel_holds_sources_and_libraries_under_tandem_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert set(names) == {f"tandem/{name}" for name in source_files()} | libraries()
    assert wheel.name.split("-")[2:4] == ["py3", "none"], "the libraries know nothing of Python"
    assert "tandem/__init__.py" not in names


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    """A path on which there is Python alone; nvcc, where it is found all the same, misses its host compiler."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    return os.environ | {"PATH": str(tmp_path / "bin")}


def test_without_a_compiler_the_wheel_is_built_all_the_same(no_compiler: dict[str, str], tmp_path: Path) -> None:
    bare = build_wheel(tmp_path, env=no_compiler)
    assert not [name for name in zipfile.ZipFile(bare).namelist() if name.endswith(".so")]


def test_without_a_compiler_the_build_says_so_once_and_succeeds(no_compiler: dict[str, str], tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for room in ("engine", "kernels", "csrc"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=no_compiler, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: ") == done.stderr.count("the kernels in plain torch serve instead") == 1
    assert "_cpu.so is not built (there is no compiler for it)" in done.stderr
    assert "_cuda.so is not built" in done.stderr
    assert not list((tmp_path / "kernels").glob("*.so"))


def test_the_wheel_brings_the_command_and_the_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    texts = {name.split(".dist-info/")[1]: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "tandem = tandem.engine.cli:main" in texts["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert "Apache License" in texts["licenses/LICENSE"]
    assert "Requires-Python: >=3.11" in texts["METADATA"]


def test_the_installed_wheel_runs_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    """In a virtual environment of its own, which borrows the dependencies of this one and not its editable install."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for path in Path(pytest.__file__).parents[1].iterdir():
        if "tandem" not in path.name and path.suffix != ".pth":
            (borrowed / path.name).symlink_to(path)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": str(borrowed)}
    where = run(python, "-c", "import tandem.engine.config as c, tandem.kernels as k; print(c.__file__)", cwd=tmp_path, env=env).strip()
    assert where == str(site / "tandem/engine/config.py")
    assert "toy_cpu" in run(tmp_path / "venv/bin/tandem", "train", "--help", cwd=tmp_path, env=env)


def test_torchrun_finds_the_entry_point_from_any_folder(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    shown = run(*torchrun, "-m", "tandem.engine.train", "--help", cwd=tmp_path)
    assert "toy_cpu" in shown


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old-python"
    script = "exec(sys.argv.pop(1).replace('sys.version_info', '(3, 9)'))"
    old.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -c "import sys; {script}" "$@"\n')
    old.chmod(0o755)
    done = subprocess.run(["make", "install", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert "Tandem needs Python 3.11 or later" in done.stderr
    assert "is 3.9" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_fails_when_no_test_ran(tmp_path: Path) -> None:
    """The script with a `make` whose tests are all skipped."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "bin").mkdir()
    make = tmp_path / "bin/make"
    (tmp_path / "bin/bwrap").symlink_to("/bin/true")  # installing it is not what is tested
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for summary, status in (("12 skipped in 0.1s", 1), ("0 passed", 1), ("10 passed, 2 skipped in 3s", 0)):
        make.write_text(f'#!/bin/sh\n[ "$1" = test ] && echo "{summary}"\nexit 0\n')
        make.chmod(0o755)
        done = subprocess.run([tmp_path / ".ci/run"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == status, (summary, done.stdout, done.stderr)
