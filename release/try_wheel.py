"""Install a wheel in an empty environment without a compiler, and train the toy, outside this tree.

    python release/try_wheel.py dist [--pip ARGUMENT ...]

The folder's wheel for this Python is taken. What pip is given beside it (``--pip``) says which torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LEAST_SHARE = 0.99
"""Of each group of features in one subspace, where the toy was taken apart."""


def main() -> None:
    options = _options()
    wheel = _wheel(options.folder)
    with tempfile.TemporaryDirectory(prefix="ndm-fast-wheel-") as folder:
        place = Path(folder)
        subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)
        bare = _Bare(place)
        began = time.monotonic()
        wanted = f"ndm-fast[figures] @ {wheel.as_uri()}"
        bare.run("pip", "install", "--quiet", wanted, *options.pip, cwd=Path.cwd())  # files named with --pip
        print(f"installed in {time.monotonic() - began:.0f} s")
        doctor = bare.run("ndm-fast", "doctor")
        print(doctor)
        if "cpu: fastest" not in doctor:
            sys.exit(f"{wheel.name}: its C++ extension does not run, `ndm-fast doctor` says why")
        began = time.monotonic()
        groups = json.loads(bare.run("ndm-fast", "toy", "--json"))["groups"]
        shares = [round(group["energy_share"], 4) for group in groups]
        if len({group["subspace"] for group in groups}) < len(groups) or min(shares) < LEAST_SHARE:
            sys.exit(f"{wheel.name}: `ndm-fast toy` did not find its groups: {groups}")
        print(f"the toy is taken apart, shares {shares}, in {time.monotonic() - began:.0f} s")


class _Bare:
    """Commands of an environment, with nothing else on the path, in a folder of its own."""

    def __init__(self, place: Path) -> None:
        self._path = place / "venv" / "bin"
        self._place = place
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NDM_"))}
        self._environment = {**kept, "PATH": str(self._path), "HF_HUB_OFFLINE": "1", "TERM": "dumb"}
        for compiler in ("cc", "gcc", "g++", "c++", "clang", "clang++"):
            if shutil.which(compiler, path=str(self._path)):
                sys.exit(f"{compiler} is on the path of the new environment: it is not bare")

    def run(self, command: str, *arguments: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [self._path / command, *arguments],
            cwd=cwd or self._place,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(
                f"`{command} {' '.join(arguments)}` exited with {done.returncode}: {done.stdout[-2000:]}"
            )
        return done.stdout


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of wheels")
    parser.add_argument(
        "--pip", nargs=argparse.REMAINDER, default=[], help="further arguments of pip install"
    )
    return parser.parse_args()


def _wheel(folder: Path) -> Path:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(folder.glob(f"ndm_fast-*-{tag}-{tag}-*_{platform.machine()}.whl"))
    if len(found) != 1:
        sys.exit(
            f"{folder} holds {len(found)} wheels for {tag} on {platform.machine()}: `make wheel` makes one"
        )
    return found[0].resolve()


if __name__ == "__main__":
    main()
