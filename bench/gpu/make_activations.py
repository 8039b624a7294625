"""Write ``activations.safetensors``: a few rows of real activations for ``check.py`` to carry.

    ndm-fast harvest --model smollm2 --site blocks.20.hook_resid_post --data TEXT --out ACTS
    ndm-fast train --preset language-model --acts ACTS --repeat-data --out RUN
    python bench/gpu/make_activations.py --acts ACTS --run RUN --site blocks.20.hook_resid_post

Keys are drawn from the first shard and queries from the last, so from other documents. Rows are in fp16, the
trained rotation in fp32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ndm_fast import SubspacePartition

KEYS, QUERIES = 2048, 128
OUT = Path(__file__).with_name("activations.safetensors")


def drawn(shard: Path, count: int, seed: int) -> torch.Tensor:
    """[count, d] fp16 rows of a shard, in the order in which they lie there."""
    rows = load_file(shard)["rows"]
    places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    chosen = rows[places].half()
    if not bool(chosen.isfinite().all()):
        raise SystemExit(f"make_activations.py: {shard} has rows that fp16 cannot hold")
    return chosen.contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--acts", type=Path, required=True, help="a folder of ndm-fast harvest")
    parser.add_argument("--run", type=Path, required=True, help="a run of ndm-fast train on it")
    parser.add_argument("--site", required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    shards = sorted((arguments.acts / arguments.site).glob("rows-*.safetensors"))
    partition = SubspacePartition.from_pretrained(arguments.run / arguments.site / "partition")
    tensors = {
        "keys": drawn(shards[0], KEYS, 0),
        "queries": drawn(shards[-1], QUERIES, 1),
        "rotation": partition.rotation.detach().float().contiguous(),
        "widths": torch.tensor(partition.widths),
    }
    source = {key: str(value) for key, value in (partition.source or {}).items() if key in ("model", "site")}
    save_file(tensors, arguments.out, metadata=source)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 2**20:.2f} MiB, {source}")


if __name__ == "__main__":
    main()
