"""Neighbor distance minimization, fast: the interpretable subspaces of a transformer's activations.

    from ndm_fast import SubspacePartition, Trainer, nearest_neighbors

See the README for a first run, ``ndm_fast.reference`` for the glossary.
"""

from ndm_fast.activation_cache import ActivationCache
from ndm_fast.config import HarvestConfig, MergeConfig, RunConfig, TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.harvest import ActivationStream, load_model
from ndm_fast.hooks import collect_activations, replace_activations
from ndm_fast.mutual_information import mutual_information
from ndm_fast.ops import ksg_counts, ksg_radius, nearest_neighbors
from ndm_fast.partition import SubspacePartition
from ndm_fast.pool import ActivationPool, TensorStream
from ndm_fast.reference import Neighbors
from ndm_fast.run import train_run
from ndm_fast.run_folder import RunFolder
from ndm_fast.step_ops import lie_update, loss_and_gradient, nearest_index
from ndm_fast.text import open_documents
from ndm_fast.trainer import Observer, Trainer
from ndm_fast.version import __version__

__all__ = [
    "ActivationCache",
    "ActivationPool",
    "ActivationStream",
    "HarvestConfig",
    "InputError",
    "MergeConfig",
    "Neighbors",
    "Observer",
    "RunConfig",
    "RunFolder",
    "SubspacePartition",
    "TensorStream",
    "TrainConfig",
    "Trainer",
    "__version__",
    "collect_activations",
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
