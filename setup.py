"""Builds the optional C++ extension ``ndm_fast._C``; everything else is in pyproject.toml.

The extension needs a C++17 compiler and pybind11, nothing else: no torch, no OpenMP. If it cannot be built
the package installs without it and runs on its torch code; ``NDM_FAST_REQUIRE_EXT=1`` makes that an error.
"""

from __future__ import annotations

import os
import platform
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
PLAIN_SOURCES = ["module.cpp", "driver.cpp", "dispatch.cpp", "parallel.cpp"]


class BuildExtension(build_ext):
    """Per-file flags, and a warning instead of a failed install."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self._without_extension(error)

    def build_extension(self, ext: Extension) -> None:
        try:
            self._compile_with_own_flags()
            super().build_extension(ext)
        except Exception as error:
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


setup(
    ext_modules=[
        Extension(
            "ndm_fast._C",
            sources=[f"csrc/{name}" for name in [*PLAIN_SOURCES, *KERNEL_FLAGS]],
            depends=[str(path) for path in Path("csrc").glob("*.h")],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=COMMON_FLAGS,
            extra_link_args=["-ldl", "-pthread"] if sys.platform.startswith("linux") else [],
            language="c++",
            optional=os.environ.get("NDM_FAST_REQUIRE_EXT") != "1",
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
