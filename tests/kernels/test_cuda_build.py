"""The CUDA C++ kernels compile without spills where nvcc is; ``test_gpu_search.py`` runs them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ndm_fast.ops import backends, cuda

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"


@pytest.mark.slow  # half a minute for each
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", [80, 90])
def test_no_spills(arch: int, tmp_path: Path) -> None:
    for name in ("sweep", "resolve"):
        done = subprocess.run(
            [
                *("nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin"),
                *(str(SOURCES / f"{name}.cu"), "-o", str(tmp_path / "out.cubin")),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
        assert len(frames) == (27 if name == "sweep" else 1), done.stderr
        assert all(frame == ("0", "0") for frame in frames), done.stderr


@pytest.mark.skipif(cuda._cuda is None, reason=str(cuda._OBSTACLE))
@pytest.mark.skipif(not backends.has_triton_installed(), reason="needs the cuobjdump that triton carries")
def test_what_was_built_keeps_everything_in_registers() -> None:
    import triton.backends.nvidia

    assert cuda._cuda is not None
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(cuda._cuda.__file__)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stacks = re.findall(r"REG:\d+ STACK:(\d+)", report)
    assert len(stacks) % 28 == 0  # sweeps of nine widths and three types, and one resolve, per architecture
    assert set(stacks) == {"0"}


def test_says_why_it_cannot_run_on_a_cpu() -> None:
    assert backends.obstacle("cuda", "cpu") == "it runs on CUDA devices, not on cpu"
    assert "not built" in str(cuda._OBSTACLE) or cuda._cuda is not None


def test_every_padded_width_has_a_tile() -> None:
    if cuda._cuda is None:
        pytest.skip(str(cuda._OBSTACLE))
    assert all(cuda._cuda.tile_keys(width) in (32, 64, 128, 256) for width in cuda.PADDED_WIDTHS)
    assert cuda._cuda.tile_keys(33) == 0


def test_extension_refuses_sizes_that_would_read_outside() -> None:
    if cuda._cuda is None:
        pytest.skip(str(cuda._OBSTACLE))
    good = [(0, 0, 8), 100, 0, 0, 0, 0, 10, 64, 0, 1, 30, 32, False]
    cuda._cuda.Sweep(*good)
    for place, value in ((0, (0, 7, 8)), (1, 0), (6, 65), (7, 63), (9, 0), (10, 33), (11, 33)):
        with pytest.raises(ValueError, match=r"size|width|type"):
            cuda._cuda.Sweep(*[value if i == place else old for i, old in enumerate(good)])


@pytest.mark.gpu
def test_matches_the_oracle_on_a_gpu() -> None:
    from ndm_fast import ops
    from ndm_fast.geometry import reference

    if cuda._cuda is None:
        pytest.skip(str(cuda._OBSTACLE))
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(104, 104, dtype=torch.float64))[0].float()
    queries, keys = torch.randn(70, 104), torch.randn(3001, 104)
    expected = reference.nearest_neighbors(queries, keys, rotation, [72, 32])
    found = ops.nearest_neighbors(queries.cuda(), keys.cuda(), rotation.cuda(), [72, 32], backend="cuda")
    torch.testing.assert_close(found.distance.cpu().double(), expected.distance, rtol=1e-5, atol=0)
    assert torch.equal(found.index.cpu(), expected.index)
