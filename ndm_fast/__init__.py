"""Neighbor distance minimization, fast: the interpretable subspaces of a transformer's activations.

    from ndm_fast import SubspacePartition, Trainer, nearest_neighbors

See the README for a first run, ``ndm_fast.geometry.reference`` for the glossary. Names are imported at their
first use, so that a program which wants one op does not pay for models, text and figures.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ndm_fast.version import __version__

if TYPE_CHECKING:
    from ndm_fast.activations.cache import ActivationCache
    from ndm_fast.activations.documents import open_documents
    from ndm_fast.activations.hooks import collect_activations, replace_activations
    from ndm_fast.activations.models import load_model
    from ndm_fast.activations.pool import ActivationPool, PoolConfig
    from ndm_fast.activations.rows import TensorStream
    from ndm_fast.activations.stream import ActivationStream
    from ndm_fast.config import HarvestConfig, MergeConfig, RunConfig, RunSettings, TrainConfig
    from ndm_fast.errors import InputError
    from ndm_fast.geometry.reference import Neighbors
    from ndm_fast.ops.gradient import loss_and_gradient
    from ndm_fast.ops.k_nearest import k_nearest_neighbors
    from ndm_fast.ops.ksg import ksg_counts, ksg_radius
    from ndm_fast.ops.lie_update import lie_update
    from ndm_fast.ops.nearest import nearest_index, nearest_neighbors
    from ndm_fast.partition import SubspacePartition
    from ndm_fast.run.folder import RunFolder
    from ndm_fast.run.reporters import Reporter
    from ndm_fast.run.train import train_run
    from ndm_fast.train.merge.mutual_information import mutual_information
    from ndm_fast.train.trainer import Observer, Trainer

_HOMES = {
    "ActivationCache": "activations.cache",
    "ActivationPool": "activations.pool",
    "ActivationStream": "activations.stream",
    "HarvestConfig": "config",
    "InputError": "errors",
    "MergeConfig": "config",
    "Neighbors": "geometry.reference",
    "Observer": "train.trainer",
    "PoolConfig": "activations.pool",
    "Reporter": "run.reporters",
    "RunConfig": "config",
    "RunFolder": "run.folder",
    "RunSettings": "config",
    "SubspacePartition": "partition",
    "TensorStream": "activations.rows",
    "TrainConfig": "config",
    "Trainer": "train.trainer",
    "collect_activations": "activations.hooks",
    "k_nearest_neighbors": "ops",
    "ksg_counts": "ops",
    "ksg_radius": "ops",
    "lie_update": "ops",
    "load_model": "activations.models",
    "loss_and_gradient": "ops",
    "mutual_information": "train.merge.mutual_information",
    "nearest_index": "ops",
    "nearest_neighbors": "ops",
    "open_documents": "activations.documents",
    "replace_activations": "activations.hooks",
    "train_run": "run.train",
}
"""Where each public name lives."""

__all__ = [
    "ActivationCache",
    "ActivationPool",
    "ActivationStream",
    "HarvestConfig",
    "InputError",
    "MergeConfig",
    "Neighbors",
    "Observer",
    "PoolConfig",
    "Reporter",
    "RunConfig",
    "RunFolder",
    "RunSettings",
    "SubspacePartition",
    "TensorStream",
    "TrainConfig",
    "Trainer",
    "__version__",
    "collect_activations",
    "k_nearest_neighbors",
    "ksg_counts",
    "ksg_radius",
    "lie_update",
    "load_model",
    "loss_and_gradient",
    "mutual_information",
    "nearest_index",
    "nearest_neighbors",
    "open_documents",
    "replace_activations",
    "train_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"ndm_fast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
