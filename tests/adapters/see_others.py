"""Let an environment see the packages of others, after its own: ``see_others.py ENVIRONMENT OTHER ...``."""

import sys
import sysconfig
from pathlib import Path


def packages_of(environment: str) -> Path:
    """Folder of an environment's packages."""
    where = {"base": str(Path(environment).resolve()), "platbase": str(Path(environment).resolve())}
    return Path(sysconfig.get_path("purelib", "posix_prefix", where))


if __name__ == "__main__":
    own, *others = map(packages_of, sys.argv[1:])
    # Also what a .pth file there adds: ndm_fast itself, installed to be edited.
    lines = [f"import site; site.addsitedir({str(folder)!r})\n" for folder in others]
    (own / "others.pth").write_text("".join(lines))
