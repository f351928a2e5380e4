"""Builds the CPU kernels where there is a C++ compiler; all else about the package is in pyproject.toml.

They are one shared library without a word of Python or torch in it, so one wheel serves all versions of both. Without
a compiler the package installs as pure Python, and torch attends. `CSKV_BUILD_KERNELS=0` builds no kernels; under
`CSKV_BUILD_KERNELS=1` it is an error where they cannot be built, for one level of instructions or for all. `CXX` picks
the compiler.
"""

from __future__ import annotations

import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

WANTED = os.environ.get("CSKV_BUILD_KERNELS", "")
if WANTED not in ("", "0", "1"):
    raise SystemExit(f"error: CSKV_BUILD_KERNELS is {WANTED!r}; expected 0 or 1, or nothing")

KERNELS = Path("src", "cskv", "attention", "cpu", "kernels")
LIBRARY = "cskv.attention.cpu._kernels"
FLAGS = ["-O3", "-fPIC", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")), "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
# Of x86-64, besides the baseline that every compiler has; which of them a processor has shows when it runs.
LEVELS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}


class BuildKernels(build_ext):
    """Compile the kernels once for each level of instructions, and link them to one library."""

    def run(self) -> None:
        """Build the library; where that fails, go on without one, and without an old one."""
        filename = self.get_ext_filename(LIBRARY)
        built = Path(self.build_lib, filename)
        for folder in (built.parent, KERNELS.parent) if self.inplace else (built.parent,):
            for old in folder.glob("_kernels*.so"):
                old.unlink()
        super().run()
        if not built.exists():
            self.extensions = self.distribution.ext_modules = []

    def build_extension(self, ext: Extension) -> None:
        """Build the library.

        Raises:
            CompileError: it cannot be built. Setuptools makes a line of that and goes on, as the library is optional.
        """
        if WANTED == "0":
            raise CompileError("CSKV_BUILD_KERNELS=0 switches it off")
        if sys.platform == "win32":
            raise CompileError("there is none for Windows")
        compiler = find_compiler()
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        threads = ["-fopenmp"] if has_openmp(compiler, objects) else []
        start = [*compiler, *FLAGS, *threads, "-c"]

        def target(name: str) -> str:
            return str(objects / f"{name}.o")

        commands = {
            level: [*start, *flags, f"-DLEVEL={level}", str(KERNELS / "level.cpp"), "-o", target(level)]
            for level, flags in {"baseline": [], **(LEVELS if platform.machine() == "x86_64" else {})}.items()
        }
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            complaints = dict(zip(commands, pool.map(run, commands.values())))
        for level, complaint in complaints.items():
            if complaint is not None:
                if level == "baseline" or WANTED == "1":
                    raise CompileError(f"{level}: {complaint}")
                self.warn(f"CPU kernels without {level}: {complaint}")
        built = [level for level, complaint in complaints.items() if complaint is None]

        flags = ["-fvisibility=default", *(f"-DBUILT_{level.upper()}" for level in built)]
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        for command in (
            [*start, *flags, str(KERNELS / "library.cpp"), "-o", target("library")],
            # Without -fopenmp: the functions are those of torch's OpenMP, which is loaded before.
            [*compiler, "-shared", *map(target, (*built, "library")), "-o", str(library)],
        ):
            if (complaint := run(command)) is not None:
                raise CompileError(complaint)
        self.announce(f"CPU kernels for {', '.join(built)}{'' if threads else ', without OpenMP'}", logging.INFO)

    def get_ext_filename(self, fullname: str) -> str:
        """Return where the library lies, under a name without an ABI of Python."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class Wheel(bdist_wheel):
    """A wheel for every Python on this platform; a pure one where there are no kernels."""

    def run(self) -> None:
        """Build first, which tells what wheel it is."""
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag, which names the platform alone."""
        return "py3", "none", super().get_tag()[2]


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler: g++ before clang++, as torch's OpenMP on Linux is GNU's."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for command in map(shlex.split, names):
        if shutil.which(command[0]):
            return command
    raise CompileError(f"there is no C++ compiler: looked for {', '.join(names)}")


def has_openmp(compiler: list[str], folder: Path) -> bool:
    """Return whether a compiler has the OpenMP that torch brings: GNU's on Linux.

    Clang's code needs LLVM's, and a process should not hold two; on macOS it is aborted when they are both LLVM's.
    """
    source = folder / "openmp.cpp"
    source.write_text("#include <omp.h>\n#ifdef __clang__\n#error no OpenMP of GNU's\n#endif\n")
    return sys.platform == "linux" and run([*compiler, "-fopenmp", "-fsyntax-only", str(source)]) is None


def run(command: list[str]) -> str | None:
    """Run a compiler; return its first error, None where it makes none."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), f"{command[0]} ended with {done.returncode}")


setup(
    ext_modules=[
        Extension(
            LIBRARY,
            sources=sorted(map(str, KERNELS.glob("*.cpp"))),
            depends=sorted(map(str, KERNELS.glob("*.h"))),
            optional=WANTED != "1",
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
