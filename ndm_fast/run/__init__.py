"""One run: its folder, its text or cache, its log, and how it is resumed."""

from ndm_fast.run.train import train_run

__all__ = ["train_run"]
