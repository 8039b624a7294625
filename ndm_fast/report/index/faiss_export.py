"""An index as faiss files, one per subspace, for those who search with faiss."""

from __future__ import annotations

from pathlib import Path

import torch

from ndm_fast.errors import InputError
from ndm_fast.files import unwritable, write_atomic
from ndm_fast.report.index.format import PreimageIndex


def export_faiss(index: PreimageIndex, folder: str | Path, metric: str = "euclidean") -> list[Path]:
    """Write ``subspace-00.faiss`` ... with all rows of the index in their order, so that ids are row numbers.

    Flat indexes of fp32 vectors: ``IndexFlatL2`` of rows rotated and less the origin, see
    ``PreimageIndex.rotated``; for ``"cosine"`` ``IndexFlatIP`` of rotated rows of norm 1. One subspace is in
    memory at a time, 4 bytes times rows times width.

    Raises:
        InputError: faiss is not installed, or the folder cannot be written to.
    """
    try:
        import faiss  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise InputError("faiss is not installed: pip install 'ndm-fast[faiss]'") from None
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None
    written = []
    for subspace, columns in enumerate(index.rows.columns):
        width = index.rows.widths[subspace]
        flat = faiss.IndexFlatIP(width) if metric == "cosine" else faiss.IndexFlatL2(width)
        for shard in index.rows.shards:
            rows = shard.rows[:, columns].float()
            if metric == "cosine":
                rows = torch.nn.functional.normalize(rows + index.rows.origin[columns])
            flat.add(rows.contiguous().numpy())
        written.append(folder / f"subspace-{subspace:02}.faiss")
        write_atomic(written[-1], faiss.serialize_index(flat).tobytes())
    return written
