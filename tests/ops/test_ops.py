"""Public ops: checks of the arguments, dispatch, torch.library registration."""

import pytest
import torch

from ndm_fast import ops
from ndm_fast.errors import InputError
from ndm_fast.geometry import reference
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.ops import backends, gradient, ksg, nearest
from ndm_fast.ops.cpu import extension

WIDTHS = [5, 3]
RUNNABLE = [name for name in backends.BACKENDS if backends.obstacle(name, "cpu") is None]


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 8, generator=generator)
    return {"queries": rows[:10], "keys": rows[10:], "rotation": random_rotation(8, generator)}


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backends_agree_with_the_oracle(case, backend, dtype):
    arguments = case | {"queries": case["queries"].to(dtype), "keys": case["keys"].to(dtype)}
    found = ops.nearest_neighbors(**arguments, widths=WIDTHS, backend=backend)
    expected = reference.nearest_neighbors(**arguments, widths=WIDTHS)
    assert found.distance.dtype == torch.float32
    assert found.index.dtype == torch.int64
    torch.testing.assert_close(found.distance.double(), expected.distance, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_ksg_agrees_with_the_oracle(case, backend):
    rest = {"widths": WIDTHS, "variances": torch.tensor([4.0, 2.0]), "pairs": torch.tensor([[0, 1]])}
    radius = ops.ksg_radius(**case, **rest, backend=backend)
    torch.testing.assert_close(
        radius.double(), reference.ksg_radius(**case, **rest).double(), rtol=1e-5, atol=1e-7
    )
    counts = ops.ksg_counts(**case, **rest, radius=radius, backend=backend)
    # A key whose distance is the radius, up to fp32 rounding, may fall on either side of it.
    fewest, most = (reference.ksg_counts(**case, **rest, radius=radius * (1 + e)) for e in (-1e-5, 1e-5))
    assert ((fewest <= counts) & (counts <= most)).all()
    assert float((most - fewest).double().mean()) < 1  # so the bracket leaves little room


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": torch.empty(0, 8)}, "keys has no rows"),
        ({"queries": torch.empty(0, 8)}, "queries has no rows"),
        ({"keys": torch.zeros(4, 7)}, "keys has shape"),
        ({"rotation": torch.eye(7)}, "rotation has shape"),
        ({"keys": torch.zeros(4, 8, dtype=torch.int64)}, "keys has dtype"),
        ({"queries": torch.full((3, 8), torch.nan)}, "queries holds NaN"),
        ({"keys": torch.full((3, 8), torch.inf)}, "keys holds NaN or Inf"),
        ({"metric": "manhattan"}, "metric"),
        ({"precision": "int4"}, "precision"),
        ({"widths": [8, 0]}, "widths"),
        ({"backend": "abacus"}, "unknown backend"),
        ({"keys": torch.zeros(4, 8, device="meta")}, "keys is on meta"),
    ],
)
def test_bad_arguments_are_named(case, change, words):
    arguments = {**case, "widths": WIDTHS, **change}
    with pytest.raises(InputError, match=words) as caught:
        ops.nearest_neighbors(**arguments)
    assert "\n" not in str(caught.value)


def test_environment_names_the_backend(case, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "reference")
    assert backends.choose("cpu") == ("reference", f"named by {backends.VARIABLE}")
    monkeypatch.setenv(backends.VARIABLE, "abacus")
    with pytest.raises(InputError, match="unknown backend"):
        ops.nearest_neighbors(**case, widths=WIDTHS)


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(extension, "why_unavailable", lambda: "it was not built")
    with pytest.raises(InputError, match="'cpu' cannot run: it was not built"):
        backends.choose("cpu", "cpu")
    assert backends.choose("cpu", "auto").name == "reference"


@pytest.mark.parametrize("backend", RUNNABLE)
def test_library_ops_pass_opcheck(case, backend):
    pairs, variances = torch.tensor([[0, 1]]), torch.tensor([1.0, 1.0])
    q, k, r = case["queries"], case["keys"], case["rotation"]
    torch.library.opcheck(
        nearest._nearest_neighbors, (q, k, r, WIDTHS, "euclidean", False, False, "fp32", True, backend)
    )
    torch.library.opcheck(ksg._ksg_radius, (q, k, r, WIDTHS, variances, pairs, False, backend))
    radius = torch.ones(1, len(q))
    torch.library.opcheck(ksg._ksg_counts, (q, k, r, WIDTHS, variances, pairs, radius, False, backend))
    torch.library.opcheck(ksg._ksg_radius_and_counts, (q, k, r, WIDTHS, variances, pairs, False, backend))


@pytest.mark.parametrize("backend", RUNNABLE)
def test_library_ops_of_a_step_pass_opcheck(case, backend):
    q, k, r = case["queries"], case["keys"], case["rotation"]
    index = torch.zeros(2, len(q), dtype=torch.int64)
    for counted in (None, torch.ones_like(index, dtype=torch.bool)):
        arguments = (q, k, index, r, WIDTHS, "euclidean", counted, torch.ones(2), True, backend)
        torch.library.opcheck(gradient._loss_and_gradient, arguments)
    torch.library.opcheck(nearest._nearest_index, (q, k, r, WIDTHS, "euclidean", "fp32", backend))
    moments = torch.zeros(8, 8), torch.ones(8, 8)
    for product, half in ((torch.randn(8, 8), False), (None, True)):
        arguments = (product, *moments, 1e-3, 1e-8, [0.9, 0.999], half, backend)
        torch.library.opcheck(torch.ops.ndm_fast.lie_update.default, arguments)


def test_an_architecture_without_a_record_is_logged_once(monkeypatch, caplog):
    monkeypatch.setitem(backends._OBSTACLES, "triton", lambda device: None)
    monkeypatch.setattr(backends, "why_no_triton", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 9))
    backends._log_unverified.cache_clear()
    for name in ("auto", "triton", None):
        choice = backends.choose("cuda", name)
        assert choice.name == "triton"
        assert "never checked on sm_99" in choice.reason
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    monkeypatch.setitem(backends.VERIFIED, "triton", (99,))
    assert "never" not in backends.choose("cuda").reason


def test_compiles_into_one_graph(case):
    def mean_distance(queries, keys, rotation):
        found = ops.nearest_neighbors(queries, keys, rotation, WIDTHS, check_finite=False)
        return found.distance.mean() * 2

    eager = mean_distance(**case)
    compiled = torch.compile(mean_distance, fullgraph=True, backend="aot_eager")(**case)
    torch.testing.assert_close(eager, compiled)


def test_a_step_compiles_into_one_graph(case):
    """Where nothing looks at values; the checks themselves do not break a graph."""

    def step(queries, keys, rotation):
        index = ops.nearest_index(queries, keys, rotation, WIDTHS)
        found = ops.loss_and_gradient(queries, keys, index, rotation, WIDTHS, check_index=False)
        first, second = torch.zeros(8, 8), torch.ones(8, 8)
        update = ops.lie_update(rotation.T @ found.gradient, first, second, 1e-3, 1e-8, (0.9, 0.999))
        return found.by_subspace.mean(), update, first

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(**case)
    torch.testing.assert_close(step(**case), compiled)


@pytest.mark.parametrize("backend", [name for name in RUNNABLE if name != "triton"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_autocast_changes_nothing(case, backend, metric):
    """Nor does it in a backward pass, which would run in bf16."""

    def everything():
        rotation = case["rotation"].clone().requires_grad_()
        given = (case["queries"], case["keys"], rotation, WIDTHS)
        found = ops.nearest_neighbors(*given, metric=metric, backend=backend)
        near = ops.k_nearest_neighbors(*given, 5, metric=metric, backend=backend)
        (found.distance.sum() + near.distance.sum()).backward()
        closed = ops.loss_and_gradient(
            *given[:2], found.index, rotation.detach(), WIDTHS, metric, backend=backend
        )
        variances, pairs = torch.tensor([4.0, 2.0]), torch.tensor([[0, 1]])
        both = ops.ksg_radius_and_counts(
            *given[:2], rotation.detach(), WIDTHS, variances, pairs, backend=backend
        )
        return [*found, *near, *closed, *both, rotation.grad]

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        got = everything()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_fake_tensors_are_traced(case):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        queries, keys, rotation = (mode.from_tensor(case[name]) for name in ("queries", "keys", "rotation"))
        found = ops.nearest_neighbors(queries, keys, rotation, WIDTHS)
        assert found.distance.shape == (2, 10)
        lost = ops.loss_and_gradient(queries, keys, found.index, rotation, WIDTHS)
        assert lost.gradient.shape == (8, 8)
        pairs = mode.from_tensor(torch.tensor([[0, 1]]))
        radius, counts = ops.ksg_radius_and_counts(
            queries, keys, rotation, WIDTHS, mode.from_tensor(torch.ones(2)), pairs
        )
        assert (radius.shape, counts.shape) == ((1, 10), (1, 2, 10))


@pytest.mark.parametrize("name", ["sse9", "avx512"])
def test_impossible_isa_is_refused(name, monkeypatch):
    if not extension.available() or (name == "avx512" and extension.isa().startswith(name)):
        pytest.skip("this CPU runs it, or nothing is compiled")
    monkeypatch.setenv(extension.ISA_VARIABLE, name)
    with pytest.raises(InputError, match=extension.ISA_VARIABLE):
        extension.isa()


def test_package_imports_without_the_extension():
    import os
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['ndm_fast._C'] = None\n"
        "from ndm_fast.ops.cpu import extension\n"
        "assert not extension.available() and 'not built' in extension.why_unavailable()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)


def test_import_touches_nothing():
    """Importing the package neither initialises CUDA nor imports triton kernels."""
    import subprocess
    import sys

    code = (
        "import sys, torch, ndm_fast, ndm_fast.ops;"
        "assert not torch.cuda.is_initialized();"
        "assert not any(name.startswith('ndm_fast.kernels.') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
