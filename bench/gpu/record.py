"""The result of ``check.py``: printed and written row by row, and summed up at the end."""

from __future__ import annotations

import json
import platform
import subprocess
import threading
import time
from pathlib import Path

import floors
from jobs import Row

ROOT = Path(__file__).resolve().parents[2]
PREDICTED = Path(__file__).with_name("predicted.json")


class Record:
    """The result, printed and written row by row."""

    def __init__(self, path: Path, head: Row) -> None:
        self.path, self.rows, self.lock, self.began = path, [], threading.Lock(), time.monotonic()
        self.head, self.ceilings = head, {}
        self.predicted = json.loads(PREDICTED.read_text()) if PREDICTED.exists() else {}

    def add(self, job: str, row: Row) -> None:
        """One row of a job."""
        with self.lock:
            row = {"job": job, **row}
            if job == "ceilings" and "ms" in row:
                self.ceilings[row["name"]] = row["tflops"] or row["gbs"]
            if "tflops" in row and "float16" in self.ceilings:
                row["share_of_fp16_peak"] = row["tflops"] / self.ceilings["float16"]
            predicted = self.predicted.get(f"{row.get('model')} Q{row.get('Q')} {row['name']}")
            if predicted is not None:
                row["predicted_ms"] = predicted
            floor = floors.of_row(row) if self.head["machine"]["capability"] == (9, 0) else None
            if floor is not None:
                row["floor_ms"] = floor
                if row["ms"] < floor:
                    row["failed"] = f"{row['ms']:.4f} ms cannot be: no card takes less than {floor:.4f}"
            self.rows.append(row)
            self._print(row)
            self.head["seconds"] = time.monotonic() - self.began
            whole = json.dumps({**self.head, "ceilings": self.ceilings, "rows": self.rows}, indent=1)
            self.path.with_suffix(".part").write_text(whole + "\n")
            self.path.with_suffix(".part").replace(self.path)

    def _print(self, row: Row) -> None:
        began = f"{time.monotonic() - self.began:4.0f} s {row['job']:28} {str(row['name'])[:44]:44}"
        if "failed" in row:
            print(f"{began} {row['failed']}", flush=True)
        elif "tflops" in row:
            rates = f"{row['tflops']:7.1f} TFLOP/s {row['gbs']:6.0f} GB/s"
            if "scores_per_s" in row:
                rates += f" {row['scores_per_s'] / 1e12:7.3f} T scores/s"
            predicted = f" (predicted {row['predicted_ms']})" if "predicted_ms" in row else ""
            floor = f" (floor {row['floor_ms']:.3f})" if "floor_ms" in row else ""
            print(f"{began} {row['ms']:9.3f} ms {rates}{predicted}{floor}", flush=True)
        elif "ms" in row:
            print(f"{began} {row['ms']:9.3f} ms {row['calls']:5} calls", flush=True)
        elif "registers" in row and row["spills"]:
            print(f"{began} {row['registers']} registers, {row['spills']} spilled", flush=True)
        elif "said" in row:
            print(f"{began} {str(row['said']).strip()[-200:]}", flush=True)

    def table(self) -> list[str]:
        """Lines of measured beside predicted, with registers and blocks of the kernels that do the work."""
        lines = []
        for row in self.rows:
            if "predicted_ms" not in row or "failed" in row:
                continue
            floor = f"{row['floor_ms']:.3f}" if "floor_ms" in row else "-"
            lines.append(
                f"{row['model']:14} Q{row['Q']:<5} {str(row['name'])[:44]:44} {row['ms']:8.3f} ms, "
                f"predicted {row['predicted_ms']:g}, floor {floor} | {self._usage(row['job'])}"
            )
        return lines

    def _usage(self, job: str) -> str:
        """Registers and blocks a multiprocessor of a job's kernels that have products."""
        wanted = ("sweep_kernel", "stream_kernel", "resolve_kernel", "project_kernel", "gradient_kernel")
        found: dict[str, str] = {}
        for row in self.rows:
            name = str(row["name"]).removeprefix("kernel ")
            if row["job"] == job and name in wanted and "registers" in row:
                found[name] = f"{name.removesuffix('_kernel')} {row['registers']}/{row['blocks_per_sm']}"
        return ", ".join(found.values())

    def write_tiles(self) -> None:
        """The fastest of what was tried, in the form of ``kernels/tuning.json``, beside the record."""
        from ndm_fast.kernels import autotune, tuning

        table: dict = {}
        tried = [row for row in self.rows if "choice" in row and "failed" not in row]
        for row in sorted(tried, key=lambda row: -row["ms"]):
            key = tuning.Key(**row["key"])
            table = autotune.added(table, row["kind"], key, row["choice"], row["ms"], self.path.name)
        if table:
            self.path.with_suffix(".tiles.json").write_text(json.dumps(table, indent=1) + "\n")

    def failures(self) -> list[Row]:
        """Rows that failed or were wrong."""
        return [row for row in self.rows if "failed" in row]


def machine(device: str) -> Row:
    """Hardware, versions and commit."""
    import torch
    import triton

    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    card = torch.cuda.get_device_name() if device == "cuda" else "none: interpreted"
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    return {"card": card, "capability": capability, "cuda": torch.version.cuda, "commit": commit, **versions}
