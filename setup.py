"""Builds the optional extensions ``ndm_fast._C`` and ``ndm_fast._cuda``; all else is in pyproject.toml.

The extension needs a C++17 compiler and pybind11, nothing else: no torch, no OpenMP. If it cannot be built
the package installs without it and runs on its torch code; ``NDM_FAST_REQUIRE_EXT=1`` makes that an error.

``ndm_fast._cuda`` takes three quarters of the time to compile, and no op takes it unasked: it is built only
with ``NDM_FAST_CUDA=1``, where a failure is an error (unset, empty or 0: not built). ``NDM_FAST_CUDA_ARCHS``
names its compute capabilities (default 80,90). It links the CUDA runtime statically.

Files compile beside each other, as many as there are cores or ``MAX_JOBS`` says. A line names each as it
begins; pip shows these lines with ``-v``.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMMON_FLAGS = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Wno-psabi", "-fvisibility=hidden"]

# One file per instruction set, each with its own flags; the rest runs on any machine of the platform.
# Products and sums may fuse into one rounding (-ffp-contract), which the error bounds allow; nothing else.
# GCC 12 takes the undefined parts of its own AVX-512 intrinsics for mistakes (its bug 105593).
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [
    "-Wno-maybe-uninitialized",
    *AVX2_FLAGS,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
]
KERNEL_FLAGS = {
    "kernels_avx512.cpp": ["-ffp-contract=fast", *AVX512_FLAGS],
    "kernels_avx512bf16.cpp": ["-ffp-contract=fast", *AVX512_FLAGS, "-mavx512bf16"],
    "kernels_avx2.cpp": ["-ffp-contract=fast", *AVX2_FLAGS],
    "kernels_portable.cpp": ["-ffp-contract=fast"],
}
PLAIN_SOURCES = [
    "module.cpp",
    "driver.cpp",
    "ksg_driver.cpp",
    "step_driver.cpp",
    "product_driver.cpp",
    "dispatch.cpp",
    "parallel.cpp",
]
CUDA_SOURCES = ["module.cpp", "sweep.cu", "resolve.cu"]


class BuildExtension(build_ext):
    """Own flags for each file, several files at once, and a warning instead of a failed install."""

    def run(self) -> None:
        self.cuda_error: Exception | None = None
        try:
            super().run()
        except Exception as error:
            self._without_extension(error)
        if self.cuda_error:  # only now: the CPU's extension is in place
            raise self.cuda_error

    def build_extensions(self) -> None:
        self._compile_with_own_flags()
        with ParallelCompile("MAX_JOBS"):
            super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            if ext.name == "ndm_fast._cuda":
                self.cuda_error = error
            else:
                self._without_extension(error)

    def _without_extension(self, error: Exception) -> None:
        if os.environ.get("NDM_FAST_REQUIRE_EXT") == "1":
            raise error
        print(
            f"\nWARNING: ndm_fast._C was not built ({type(error).__name__}: {error}).\n"
            "WARNING: ndm_fast works without it, slower. It needs a C++17 compiler (g++ or clang++);\n"
            "WARNING: set NDM_FAST_REQUIRE_EXT=1 to make this an error.\n",
            file=sys.stderr,
        )

    def _compile_with_own_flags(self) -> None:
        """Lets the compiler name the file it is at, add that file's flags, and leave CUDA to nvcc."""
        compile_one = self.compiler._compile
        self.compiler.src_extensions = [*self.compiler.src_extensions, ".cu"]

        def compile_with_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            print(f"compiling {src}\n", end="", flush=True)  # one write: other threads print too
            if ext == ".cu":
                subprocess.run([str(NVCC), *nvcc_flags(), "-c", src, "-o", obj], check=True)
                return
            own = self._supported(KERNEL_FLAGS.get(Path(src).name, []))
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *own], pp_opts)

        self.compiler._compile = compile_with_flags

    def _supported(self, flags: list[str]) -> list[str]:
        """The flags, or none where the target or compiler lacks one: the file then compiles to a stub."""
        machine_flags = [flag for flag in flags if flag.startswith("-m")]
        if not machine_flags:
            return flags
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return []
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.cpp"
            probe.write_text("int main() { return 0; }\n")
            command = [
                *self.compiler.compiler_so,
                *flags,
                "-c",
                str(probe),
                "-o",
                str(probe.with_suffix(".o")),
            ]
            works = subprocess.run(command, capture_output=True, check=False).returncode == 0
        return flags if works else []


def find_nvcc() -> Path | None:
    """nvcc in CUDA_HOME or on the path where NDM_FAST_CUDA=1 asks for it."""
    wanted = os.environ.get("NDM_FAST_CUDA", "")
    if wanted in ("", "0"):
        return None
    if wanted != "1":
        sys.exit(f"NDM_FAST_CUDA is {wanted!r}: give 1 to build the CUDA extension, or 0")
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if not found:
        sys.exit("NDM_FAST_CUDA=1 needs nvcc: put it on the path, set CUDA_HOME, or unset NDM_FAST_CUDA")
    return Path(found).resolve()


def nvcc_flags() -> list[str]:
    """Machine code for each architecture asked for, and portable code of the last for later ones."""
    archs = os.environ.get("NDM_FAST_CUDA_ARCHS", "80,90").split(",")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return ["-std=c++17", "-O3", "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden", *codes]


NVCC = find_nvcc()


def cuda_extension(nvcc: Path) -> Extension:
    # nvcc on the path may be a script that calls the real one.
    homes = [
        Path(os.environ.get("CUDA_HOME", nvcc.parent.parent)),
        nvcc.parent.parent,
        Path("/usr/local/cuda"),
    ]
    return Extension(
        "ndm_fast._cuda",
        sources=[f"csrc/cuda/{name}" for name in CUDA_SOURCES],
        depends=[str(path) for path in Path("csrc/cuda").glob("*h")],
        include_dirs=[pybind11.get_include()],
        library_dirs=[str(home / "lib64") for home in homes],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        extra_compile_args=COMMON_FLAGS,
        language="c++",
        optional=True,  # so that what was built is put in place first; see BuildExtension.run
    )


setup(
    ext_modules=[
        Extension(
            "ndm_fast._C",
            sources=[f"csrc/cpu/{name}" for name in [*PLAIN_SOURCES, *KERNEL_FLAGS]],
            depends=[str(path) for path in Path("csrc/cpu").glob("*.h")],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=COMMON_FLAGS,
            extra_link_args=["-ldl", "-pthread"] if sys.platform.startswith("linux") else [],
            language="c++",
            optional=os.environ.get("NDM_FAST_REQUIRE_EXT") != "1",
        ),
        *([cuda_extension(NVCC)] if NVCC else []),
    ],
    cmdclass={"build_ext": BuildExtension},
)
