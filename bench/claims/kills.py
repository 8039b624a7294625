"""Kill -9 at random moments over every command that writes: does the command, run again, end right?

    OMP_NUM_THREADS=1 python bench/claims/kills.py --kills 200

"Right" is: exit code 0, and the same files as an undisturbed run leaves (apart from times in logs, and who
made a run). A command is killed at a moment drawn between its start and the time that it takes undisturbed;
three times in four not before the next change in its folder. Seven times in ten it is killed once more
while it is run again. Of two ranks one is killed. Under torchrun, which ends the other, it is killed once,
after it has begun to write.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests")]

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from measuring import RESULTS, made_with
from processes import has_ended
from writers import Scene, Writer, content, scene

from ndm_fast.table import text_table

TORCHRUN = "train, two ranks by torchrun"
_TORCHRUN_SHARE = 0.05
_AGAIN = 0.7
"""Chance that a command which was killed is killed once more while it is run again."""
_KILLED = -signal.SIGKILL


class Whole(NamedTuple):
    """An undisturbed run."""

    left: dict[str, bytes]
    seconds: float


def main() -> None:
    """Kill, run again, compare, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments, which the machine's load shifts")
    parser.add_argument("--out", type=Path, default=RESULTS / "kills.json")
    options = parser.parse_args()
    about = made_with()
    chance, began = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, scene(Path(folder), with_faults=False) as stage:
        trials = Trials(stage, chance)
        by_torchrun = round(_TORCHRUN_SHARE * options.kills)
        while trials.kills < options.kills - by_torchrun:
            for writer in stage.writers.values():
                if trials.kills < options.kills - by_torchrun:
                    trials.one(writer)
        while trials.kills < options.kills:
            trials.one_by_torchrun()
    record = {
        "rows": trials.counted(),
        "kills": trials.kills,
        "need_a_hand": len(trials.wrong),
        "wrong": trials.wrong,
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(sum(os.times()[:4])),
        "seed": options.seed,
        "made_with": about,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(text_table(record["rows"]))
    print(f"{trials.kills} kills, {len(trials.wrong)} need a hand; {options.out}")


class Trials:
    """Kills so far, and what came of them."""

    def __init__(self, stage: Scene, chance: random.Random) -> None:
        self.kills = 0
        self.wrong: list[str] = []
        self._stage, self._chance = stage, chance
        self._counts: dict[str, Counter[str]] = {}
        self._whole: dict[str, Whole] = {}

    def counted(self) -> list[dict[str, Any]]:
        """A row per command: kills, runs that ended before theirs, and what the command then gave."""
        names = ("killed", "ended before", "right", "wrong")
        return [{"command": c, **{n: counts[n] for n in names}} for c, counts in self._counts.items()]

    def one(self, writer: Writer) -> None:
        """Kill a command until chance lets it end."""
        whole = self._of(writer)
        self._stage.reset(writer)
        arguments, times = writer.first, 0
        while times == 0 or self._chance.random() < _AGAIN:
            times += 1
            processes = self._stage.start(writer, arguments, {})
            self._kill(processes, whole.seconds)
            codes = self._stage.wait(writer, processes).codes
            self._count(writer.name, "killed" if _KILLED in codes else "ended before")
            arguments = writer.again
        self._judge(writer.name, self._stage.ends_right(writer, whole.left))

    def one_by_torchrun(self) -> None:
        """Kill a rank of a job that torchrun started."""
        writer = self._stage.writers["train, two ranks"]
        whole = self._of(writer)
        self._stage.reset(writer)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "ndm_fast"]
        with subprocess.Popen(
            [*command, *writer.first], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as job:
            ranks = self._ranks(job)
            if ranks:
                self._kill(ranks, whole.seconds)
            code = job.wait(120)
        self._count(TORCHRUN, "killed" if code else "ended before")
        again = subprocess.run([*command, *writer.again], capture_output=True, text=True, check=False)
        differing = content(self._stage.out) != whole.left
        said = f"ends with {again.returncode}: {again.stderr[-500:]}" if again.returncode else ""
        self._judge(TORCHRUN, said or ("leaves other files" if differing else ""))

    def _of(self, writer: Writer) -> Whole:
        if writer.name not in self._whole:
            began = time.monotonic()
            left, _ = self._stage.undisturbed(writer)
            self._whole[writer.name] = Whole(left, time.monotonic() - began)
        return self._whole[writer.name]

    def _kill(self, processes: list[int], seconds: float) -> None:
        """SIGKILL one of the processes at a random moment; most often right after a change on disk."""
        victim = processes[self._chance.randrange(len(processes))]
        until = time.monotonic() + self._chance.uniform(0, seconds)
        while time.monotonic() < until and not has_ended(victim):
            time.sleep(0.0005)
        if self._chance.random() < 0.75:
            before = changed_at(self._stage.out)
            until = time.monotonic() + seconds
            while (
                changed_at(self._stage.out) == before and time.monotonic() < until and not has_ended(victim)
            ):
                time.sleep(0.0002)
        if not has_ended(victim):
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)

    def _ranks(self, job: subprocess.Popen[bytes]) -> list[int]:
        """The processes of a job's ranks, once they write."""
        while job.poll() is None and not (self._stage.out / "config.json").exists():
            time.sleep(0.01)
        ranks = []
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
                if re.search(r"(?:^|\0)RANK=", Path(f"/proc/{child}/environ").read_text()):
                    ranks.append(int(child))
        return ranks

    def _count(self, name: str, what: str) -> None:
        self._counts.setdefault(name, Counter())[what] += 1
        self.kills += what == "killed"

    def _judge(self, name: str, wrong: str) -> None:
        self._count(name, "wrong" if wrong else "right")
        if wrong:
            self.wrong.append(f"{name}: {wrong}")
            print(self.wrong[-1], flush=True)


def changed_at(folder: Path) -> int:
    """When anything in a folder was last written, made or renamed."""
    times = [0]
    for path in (folder, *folder.rglob("*")):
        with suppress(OSError):
            times.append(path.stat().st_mtime_ns)
    return max(times)


if __name__ == "__main__":
    main()
