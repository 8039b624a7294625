"""Builds the optional extensions ``ndm_fast._C`` and ``ndm_fast._cuda``; all else is in pyproject.toml.

The extension needs a C++17 compiler and pybind11, nothing else: no torch, no OpenMP. If it cannot be built
the package installs without it and runs on its torch code; ``NDM_FAST_REQUIRE_EXT=1`` makes that an error.

``ndm_fast._cuda`` is built where nvcc is found and ``NDM_FAST_CUDA`` is not 0, for the compute capabilities
in ``NDM_FAST_CUDA_ARCHS`` (default 80,90). It links the CUDA runtime statically and never breaks an install.
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
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMMON_FLAGS = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Wno-psabi", "-fvisibility=hidden"]

# One file per instruction set, each with its own flags; the rest runs on any machine of the platform.
# Products and sums may fuse into one rounding (-ffp-contract), which the error bounds allow; nothing else.
KERNEL_FLAGS = {
    "kernels_portable.cpp": ["-ffp-contract=fast"],
    "kernels_avx2.cpp": ["-ffp-contract=fast", "-mavx2", "-mfma", "-mf16c"],
    # GCC 12 takes the undefined parts of its own AVX-512 intrinsics for mistakes (its bug 105593).
    "kernels_avx512.cpp": [
        "-ffp-contract=fast",
        "-Wno-maybe-uninitialized",
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    ],
    "kernels_avx512bf16.cpp": [
        "-ffp-contract=fast",
        "-Wno-maybe-uninitialized",
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
    ],
}
CUDA_SOURCES = ["sweep.cu", "resolve.cu"]
PLAIN_SOURCES = [
    "module.cpp",
    "driver.cpp",
    "ksg_driver.cpp",
    "step_driver.cpp",
    "dispatch.cpp",
    "parallel.cpp",
]


class BuildExtension(build_ext):
    """Per-file flags, and a warning instead of a failed install."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self._without_extension(error)

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "ndm_fast._cuda":
            try:
                ext.extra_objects = [self._compile_cuda(name) for name in CUDA_SOURCES]
                super().build_extension(ext)
            except Exception as error:
                print(
                    f"\nWARNING: ndm_fast._cuda was not built ({error}); Triton remains.\n", file=sys.stderr
                )
            return
        try:
            self._compile_with_own_flags()
            super().build_extension(ext)
        except Exception as error:
            self._without_extension(error)

    def _compile_cuda(self, name: str) -> str:
        target = Path(self.build_temp) / "csrc" / "cuda" / f"{name}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([str(NVCC), *nvcc_flags(), "-c", f"csrc/cuda/{name}", "-o", str(target)], check=True)
        return str(target)

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
        """Lets the compiler add the flags of the file it is at."""
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            own = self._supported(KERNEL_FLAGS.get(Path(src).name, []))
            return compile_one(obj, src, ext, cc_args, [*extra_postargs, *own], pp_opts)

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
    """nvcc in CUDA_HOME or on the path, unless NDM_FAST_CUDA is 0."""
    if os.environ.get("NDM_FAST_CUDA") == "0" or not sys.platform.startswith("linux"):
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    return Path(found).resolve() if found else None


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
        sources=["csrc/cuda/module.cpp"],
        depends=[str(path) for path in Path("csrc/cuda").glob("*") if path.name != "module.cpp"],
        include_dirs=[pybind11.get_include()],
        library_dirs=[str(home / "lib64") for home in homes],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        extra_compile_args=COMMON_FLAGS,
        language="c++",
        optional=True,
    )


setup(
    ext_modules=[
        *([cuda_extension(NVCC)] if NVCC else []),
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
    ],
    cmdclass={"build_ext": BuildExtension},
)
