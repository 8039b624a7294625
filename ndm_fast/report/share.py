"""The report of a run as one zip, to be sent to people: unzipped anywhere, it opens without a network."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

from ndm_fast.errors import InputError
from ndm_fast.files import unwritable, write_atomic
from ndm_fast.report.site import report_pages
from ndm_fast.run.folder import RunFolder

FOLDER = "ndm-report"
"""What unzipping makes; its ``index.html`` is the first page."""

_LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""Time of every file, the earliest that a zip can hold: two zips of the same pages are the same bytes."""

_UNIX, _PLAIN_FILE = 3, 0o100644


def write_share(folder: RunFolder, out: Path, *, rows: int, device: str = "cpu") -> Path:
    """Write the pages of :func:`~ndm_fast.report.site.write_report` into one zip.

    The same run gives the same bytes, whenever and wherever it lies (with the same zlib and matplotlib).

    Args:
        out: the zip. One that is there already stays: it is an error where it holds anything else.
        rows: activations in the index that is built where there is none.

    Returns:
        ``out``.

    Raises:
        InputError: see ``write_report``; or there is another file at ``out``.
    """
    taken = InputError(f"{out} exists and holds something else: choose another -o, or delete it")
    if out.exists() and not (out.is_file() and zipfile.is_zipfile(out)):
        raise taken  # before the work
    content = zipped(report_pages(folder, rows=rows, device=device))
    try:
        if out.exists():
            if out.read_bytes() != content:
                raise taken
            return out
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from None
    write_atomic(out, content)
    return out


def zipped(pages: Mapping[str, str]) -> bytes:
    """Pages by name as a zip of ``ndm-report/NAME``, in the order of their names."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in sorted(pages):
            entry = zipfile.ZipInfo(f"{FOLDER}/{name}", _LONG_AGO)
            entry.create_system, entry.external_attr = _UNIX, _PLAIN_FILE << 16
            archive.writestr(entry, pages[name].encode(), zipfile.ZIP_DEFLATED, 9)
    return held.getvalue()
