"""What others may import: a name that goes, or comes, shows here; and what importing costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import ndm_fast
from ndm_fast import ops

NAMES = [
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

OPS = {
    "k_nearest_neighbors": (
        "(queries, keys, rotation, widths, k, *, exclude=None, metric='euclidean', "
        "keys_rotated=False, queries_rotated=False, backend=None, check_finite=True)"
    ),
    "ksg_counts": (
        "(queries, keys, rotation, widths, variances, pairs, radius, *, rotated=False, backend=None)"
    ),
    "ksg_radius": "(queries, keys, rotation, widths, variances, pairs, *, rotated=False, backend=None)",
    "ksg_radius_and_counts": (
        "(queries, keys, rotation, widths, variances, pairs, *, rotated=False, backend=None)"
    ),
    "lie_update": "(product, first, second, scale, guard, betas, *, half=False, backend=None)",
    "loss_and_gradient": (
        "(queries, keys, index, rotation, widths, metric='euclidean', counted=None, *, "
        "log_floor=None, backend=None, check_index=True)"
    ),
    "nearest_index": (
        "(queries, keys, rotation, widths, metric='euclidean', precision='fp32', *, backend=None)"
    ),
    "nearest_neighbors": (
        "(queries, keys, rotation, widths, *, metric='euclidean', precision='fp32', "
        "keys_rotated=False, queries_rotated=False, backend=None, check_finite=True)"
    ),
}
"""Names and arguments of the ops: others build on them (docs/embed.md)."""


def test_the_names_of_the_package() -> None:
    assert sorted(ndm_fast.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(ndm_fast))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_there(name: str) -> None:
    assert getattr(ndm_fast, name) is not None


def test_the_names_of_the_ops() -> None:
    assert sorted(ops.__all__) == sorted(OPS)


@pytest.mark.parametrize("name", OPS)
def test_the_arguments_of_an_op(name: str) -> None:
    given = inspect.signature(getattr(ops, name))
    bare = [each.replace(annotation=each.empty) for each in given.parameters.values()]
    assert str(given.replace(parameters=bare, return_annotation=given.empty)) == OPS[name]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nearest_neighbours'"):
        _ = ndm_fast.nearest_neighbours


def test_an_op_costs_no_other_package() -> None:
    """Nor what only runs, figures and pages need."""
    program = """
import sys
import ndm_fast
assert "torch" not in sys.modules
ndm_fast.nearest_neighbors
heavy = {"transformers", "matplotlib", "tokenizers", "datasets", "yaml", "jinja2", "huggingface_hub"}
rooms = {"activations", "adapters", "train", "run", "evaluate", "report", "cli", "config"}
print(sorted(heavy & set(sys.modules)), sorted(r for r in rooms if f"ndm_fast.{r}" in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout == "[] []\n"
