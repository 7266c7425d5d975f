"""Maps the folders of the repository onto the import names `tandem.engine` and `tandem.kernels`, and builds csrc/ where it can.

The libraries are plain shared objects, opened with ctypes: they need neither torch nor Python headers, and one file serves every
version of both. Without a compiler the install succeeds, says so, and the reference in plain torch serves.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# compute capability 8.0 (A100), 9.0 with its own instructions (H100, H200), and PTX for what comes later
CUDA_ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
]
CPU = Extension("tandem.kernels._cpu", sorted(map(str, Path("csrc").glob("*.cpp"))))
CUDA = Extension("tandem.kernels._cuda", sorted(map(str, Path("csrc").glob("*.cu"))))


def compiler_command(extension: Extension) -> list[str] | None:
    """The command that compiles an extension, without its output; None where there is no compiler for it."""
    if extension.name == CPU.name:
        found = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
        return [found, "-O3", "-std=c++17", "-fPIC", "-shared", *extension.sources] if found else None
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    options = ["-O3", "-std=c++17", "--threads=2", *CUDA_ARCHITECTURES, "-Xcompiler=-fPIC", "-shared", "-cudart=static"]
    return [found, *options, *extension.sources] if found else None


class BuildLibraries(build_ext):
    def run(self) -> None:
        self.problems: list[str] = []
        super().run()
        if self.problems:
            print(f"warning: {'; '.join(self.problems)}; the kernels in plain torch serve instead", file=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = compiler_command(ext)
        problem = "there is no compiler for it"
        if command is not None:
            done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, check=False)
            problem = f"{command[0]} failed:\n{done.stderr}" if done.returncode else ""
        if problem:
            self.problems.append(f"{target.name} is not built ({problem})")

    def copy_extensions_to_source(self) -> None:
        self.extensions = [ext for ext in self.extensions if Path(self.build_lib, self.get_ext_filename(ext.name)).exists()]
        super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [output for output in super().get_outputs() if Path(output).exists()]


class PlatformWheel(bdist_wheel):
    """For this platform and any Python 3: the libraries know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


packages = [
    f"tandem.{room}{'.' + name if name else ''}"
    for room in ("engine", "kernels")
    for name in ["", *find_namespace_packages(where=room, exclude=["__pycache__", "*.__pycache__"])]
]
setup(
    packages=packages,
    package_dir={"tandem.engine": "engine", "tandem.kernels": "kernels"},
    ext_modules=[CPU, CUDA],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
