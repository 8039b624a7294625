"""When things happen in a run: phases of training, and what is due at their ends."""

from __future__ import annotations

from dataclasses import dataclass

from ndm_fast.config import MergeConfig, TrainConfig
from ndm_fast.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """Phases of a run: each ends with an escape, a merge check, or the end of the run."""

    train: TrainConfig
    merge: MergeConfig

    def __post_init__(self) -> None:
        if self.escape_start <= 0 < self.train.escape_tries:
            raise InputError(
                f"{self.train.escape_tries} escapes of {self.train.escape_steps} steps do not fit before "
                f"step {self._merging_from}: lower escape_tries or raise merge_start"
            )

    @property
    def _merging_from(self) -> int:
        start = self.merge.merge_start
        return self.train.max_steps if start is None else min(start, self.train.max_steps)

    @property
    def escape_start(self) -> int:
        """Step of the first escape; the last one is judged when merging starts."""
        return self._merging_from - self.train.escape_tries * self.train.escape_steps

    def phase(self, step: int) -> tuple[int, int]:
        """First step of the phase that a step is in, and the first step after it."""
        bounds = [0]
        while bounds[-1] <= step:
            bounds.append(self._next_bound(bounds[-1]))
        return bounds[-2], bounds[-1]

    def is_escape(self, step: int) -> bool:
        """Whether an escape begins or is judged before this step."""
        return (
            self.train.escape_tries > 0
            and self.escape_start <= step <= self._merging_from
            and ((step - self.escape_start) % self.train.escape_steps == 0)
        )

    def is_merge_check(self, step: int) -> bool:
        """Whether pairs are checked for merging before this step."""
        start = self.merge.merge_start
        return start is not None and step >= start and (step - start) % self.merge.merge_interval == 0

    def learning_rate(self, step: int) -> float:
        """Rate of a step: a linear rise from 0 at the start of its phase, then constant or linear to 0."""
        first, end = self.phase(step)
        rate = self.train.lr
        if first >= self._merging_from and self.merge.merge_lr is not None:
            rate = self.merge.merge_lr
        if self.train.warmup_steps:
            rate *= min(1.0, (step - first + 1) / self.train.warmup_steps)
        if self.train.schedule == "linear":
            rate *= (end - step) / (end - first)
        return rate

    def _next_bound(self, step: int) -> int:
        last = self.train.max_steps
        if step < self.escape_start:
            return min(self.escape_start, last)
        if step < self._merging_from:
            return min(step + self.train.escape_steps, last)
        if self.merge.merge_start is None or step >= last:
            return max(last, step + 1)
        checks = (step - self.merge.merge_start) // self.merge.merge_interval + 1
        return min(self.merge.merge_start + checks * self.merge.merge_interval, last)
