"""Registers, shared memory and spills of every shipped kernel, compiled ahead of time; no GPU is needed.

    python -m ndm_fast.kernels.resources [--arch 80 90] [--json PATH]

Not with TRITON_INTERPRET set, which makes kernels that cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import gradient_kernels, ksg, lie_update, look, rerank, resolve, stream, sweep, tiles, tuning

WIDTHS = (32, 64, 72, 128, 256, 432)
"""One subspace width of each class of the tables, and those of the published runs."""

KEYS = 409_600
"""Of a search, whose number of tiles decides how many minima are held."""

_TYPES = {
    "keys": "*fp16",
    "rotation": "*fp16",
    "packed": "*fp16",
    "packed_rest": "*fp16",
    "raw_queries": "*fp16",
    "raw_keys": "*fp16",
    "exact_rotation": "*fp32",
    "queries": "*fp64",
    "exact_queries": "*fp64",
    "best": "*fp64",
    **dict.fromkeys(("index", "candidates", "pairs", "counts"), "*i64"),
    **dict.fromkeys(("origin", "scales", "errors", "minima", "few", "sizes", "half_norms"), "*fp32"),
    **dict.fromkeys(("inverse_variances", "radius", "limits"), "*fp32"),
    **dict.fromkeys(("rounding", "absolute", "query_share", "share", "toward", "slow", "fresh"), "fp32"),
    **dict.fromkeys(("projected", "distances", "weights", "losses", "gradient", "log_floor"), "*fp32"),
    **dict.fromkeys(("first", "second"), "*fp32"),
    "counted": "*i1",
    **dict.fromkeys(("pieces", "subspaces", "few_tiles"), "*i32"),
}


_EVEN = (
    "key_stride",
    "rotation_stride",
    "depth",
    "query_slots",
    "query_stride",
    "raw_key_stride",
    "width",
    "plane",
)
"""Numbers that are multiples of 16 where d is."""


class Case(NamedTuple):
    """One kernel with its compile-time choices."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]
    types: dict[str, str]


class Usage(NamedTuple):
    """What a block of a compiled kernel takes."""

    registers: int
    stack: int
    """Bytes of local memory for a thread: spills, or arrays that did not fit in registers."""
    shared: int
    """Bytes."""
    tensor_core: str
    """Matrix instruction it uses, or ``-``."""


def cases(arch: int) -> Iterator[Case]:
    """Every kernel at every shape class of an architecture."""
    projection = {"CENTRE": False, "PROJECT": False, "COSINE": False, "DEPTH_BLOCK": 64, "DOT": "tf32x3"}
    for width in WIDTHS:
        tile = tuning.sweep(arch, width)
        main, rest = tuning.pieces(width)
        swept: dict[str, Any] = {
            "WIDTH": width,
            "P1": main,
            "P2": rest,
            "TILE": tile.tile,
            "STAGES": tile.stages,
            "TOGETHER": tile.together,
        }
        swept |= {"QUERY_BLOCK": tile.query_block, **projection}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        yield Case(f"sweep {width}", sweep.sweep_kernel, swept, options, {})
        if width in (32, 72):
            fused = swept | {"PROJECT": True, "CENTRE": True}
            yield Case(f"sweep {width} fused", sweep.sweep_kernel, fused, options, {})
        search = {"WIDTH": width, "TILE": tile.tile, **projection}
        if width in (32, 72, 432):
            yield from resolve_cases(arch, width, search)
    wide = tuning.WIDE
    shape = {"WIDTH": 768, "PADDED": 768, "TILE": wide.tile, "QUERY_BLOCK": wide.query_block, "PIECE": 64}
    options = {"num_warps": wide.warps, "num_stages": wide.stages}
    shape |= {"CENTRE": False, "COSINE": False}
    yield Case("sweep 768 wide", sweep.sweep_wide_kernel, shape, options, {})
    yield from stream_cases()
    shape = dict(tuning.LOOK)
    warps = {"num_warps": shape.pop("num_warps")}
    yield Case("look", look.look_kernel, shape, warps, {})
    candidates = {"P": 32, "SLOT_COUNT": 4, "QUERY_BLOCK": tuning.RERANK_ROWS // 4, "WIDTH": 72}
    candidates |= {"DOUBLE": arch in tuning.FP64_IS_FAST, "COSINE": False, "DEPTH_BLOCK": tuning.RERANK_DEPTH}
    types = {"rotation": "*fp32", "listed": "*i32", "listed_counts": "*i32"}
    for name, listed in (("rerank", False), ("rerank listed", True)):
        yield Case(name, rerank.rerank_kernel, candidates | {"LISTED": listed}, {"num_warps": 4}, types)
    columns = {"queries": "*fp32", "keys": "*fp32"}
    distances, reductions = dict(tuning.KSG_DISTANCES), dict(tuning.KSG_REDUCTIONS)
    warps, few = ({"num_warps": shape.pop("num_warps")} for shape in (distances, reductions))
    yield Case("ksg distances", ksg.distances_kernel, {"WIDTH": 32, **distances}, warps, columns)
    yield Case("ksg radius", ksg.radius_kernel, reductions, few, {})
    yield Case("ksg counts", ksg.counts_kernel, reductions, few, {})
    yield from update_cases(arch)


def stream_cases() -> Iterator[Case]:
    """The sweep for few queries."""
    for width in (32, 64, 72, 128):
        for queries in (128, 256):
            tile = tuning.sweep(90, width, queries)
            main, rest = tuning.pieces(width)
            shape = {"WIDTH": width, "P1": main, "P2": rest, "TILE": tile.tile, "QUERIES": tile.query_block}
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            chosen = shape | {"STAGES": tile.stages}
            yield Case(f"stream {width} {queries}", stream.stream_kernel, chosen, options, {})


def resolve_cases(arch: int, width: int, search: dict[str, Any]) -> Iterator[Case]:
    """What a query does with a tile of keys: as given, fp32 copies of raw rows, copies in half precision."""
    copy = {"keys": "*fp32"}
    for mode, slots, types in (("rotated", 1, {}), ("rotated", 1, copy), ("raw", 1, copy), ("slots", 4, {}),
                               ("slots", 8, {"keys": "*bf16"})):  # fmt: skip
        for cosine in (False, True) if width != 432 else (False,):
            for fused in (False, True) if mode != "rotated" and width == 32 else (False,):
                tile = tuning.sweep(arch, width).tile
                shape = tuning.resolve_shape(width, tile, fused=fused, raw=mode == "raw", cosine=cosine)
                chosen = {**search, "MODE": getattr(tiles, mode.upper()).value, "SLOT_COUNT": slots}
                chosen["FEW"] = look.FEW
                chosen |= {"PROJECT": fused, "CENTRE": fused or mode == "rotated", "COSINE": cosine}
                chosen |= {"DEPTH_BLOCK": 32 if mode == "raw" else 64, **shape.constants(KEYS // tile)}
                words = (mode, types.get("keys", "*fp16")[1:], "cosine" * cosine, "fused" * fused)
                rows = {name: types.get("keys", "*fp16") for name in ("keys", "rotation")}
                yield Case(
                    f"resolve {width} {' '.join(filter(None, words))}",
                    resolve.resolve_kernel,
                    chosen,
                    shape.options,
                    rows,
                )


def update_cases(arch: int) -> Iterator[Case]:
    """The kernels of a training step beside the search, at Q = 128."""
    for widths in ((7,) * 9, (32,) * 24, (72,) * 32, (64,) * 24, (432,) * 4):
        yield from gradient_cases(widths, "ieee", tuning.gradient_shape(arch, "ieee"))
    for products in ("tf32x3", "fp16x3"):
        yield from gradient_cases((32,) * 24, products, tuning.gradient_shape(arch, products))
    for name, dtype, factor in (("fp32", "*fp32", "fp32"), ("bf16", "*bf16", "*fp32")):
        step = {"BLOCK": tuning.LIE_BLOCK, "TAKE": True, "ON_DEVICE": factor == "*fp32"}
        types = {"update": dtype, "product": dtype, "scale": factor, "guard": factor}
        yield Case(f"lie update {name}", lie_update.lie_update_kernel, step, {"num_warps": 4}, types)


def gradient_cases(widths: tuple[int, ...], products: str, shape: tuning.Gradient) -> Iterator[Case]:
    """The gradient's kernels, at Q = 128."""
    main, rest = tuning.gradient_columns(widths, products)
    pieces = sum(-(-width // (main + rest)) for width in widths)
    splits = tuning.gradient_splits(shape, 128, sum(widths), pieces)
    types = {"queries": "*fp16", "rotation": "*fp32", "units": "*fp16" if products == "fp16x3" else "*fp32"}
    # Steps of one: triton compiles integers of 1 as constants.
    common: dict[str, Any] = {"index_step": 1, "counted_step": 1, "DOT": products}
    common |= {"COUNTED": widths[0] == 432, "ALIGNED": math.gcd(16, *widths)}
    pieced = common | {"MAIN": main, "REST": rest}
    launches = [
        ("project", gradient_kernels.project_kernel, pieced | shape.project(splits) | {"HALF": True}),
        (
            "units",
            gradient_kernels.units_kernel,
            common | tuning.units_shape(widths, splits) | {"LOG": False},
        ),
        ("gradient", gradient_kernels.gradient_kernel, pieced | shape.total() | {"LOG": False, "HALF": True}),
        (
            "gradient log",
            gradient_kernels.gradient_kernel,
            pieced | shape.total() | {"LOG": True, "HALF": False},
        ),
    ]
    for name, kernel, choices in launches:
        options: dict[str, int] = {key: value for key, value in choices.items() if key.startswith("num_")}
        constants = {key: value for key, value in choices.items() if key in kernel.arg_names}
        yield Case(f"{name} {widths[0]} {products}", kernel, constants, options, types)


def compile_case(case: Case, arch: int) -> Usage:
    """Compile for a compute capability such as 90 and read what the assembler reports."""
    signature, attributes = {}, {}
    for number, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = case.types.get(name, _TYPES.get(name, "i32"))
        if signature[name].startswith("*") or name in _EVEN:
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, case.constants, attributes)
    options = {**case.options, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    code = compiled.asm["ptx"]
    instruction = next((i for i in ("wgmma", "tcgen05", "mma.sync") if i in code), "-")
    return Usage(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared, instruction)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for arch in arguments.arch:
        for case in cases(arch):
            usage = compile_case(case, arch)
            limit = tuning.SHARED_MEMORY[tuning.architecture(arch)] * 1024
            rows.append(
                {"arch": arch, "kernel": case.name, "limit": limit, **usage._asdict(), **case.options}
            )
            print(
                f"sm_{arch} {case.name:20} {usage.registers:4} registers {usage.stack:5} B stack "
                f"{usage.shared:7} B shared  {case.options['num_warps']} warps  {usage.tensor_core}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
