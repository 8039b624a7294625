"""Site names, and where each one lives in a Hugging Face model.

Forms accepted for block 3:

    blocks.3.hook_resid_pre    x3.pre     input of the block
    blocks.3.hook_resid_mid    x3.mid     residual stream between attention and MLP
    blocks.3.hook_resid_post   x3.post    output of the block (before any final norm of the model)
    blocks.3.hook_attn_out     a3         what attention adds to the residual stream
    blocks.3.hook_mlp_out      m3         what the MLP adds to the residual stream
    transformer.h.3.mlp                   any module path: the module's output, of a tuple its first tensor

The first column (TransformerLens) is canonical. In pre-norm families `resid_mid = resid_pre + attn_out` and
`resid_post = resid_mid + mlp_out`; with parallel attention `resid_post = resid_pre + attn_out + mlp_out` and
there is no resid_mid. BERT normalises after each sum: `resid_mid = LayerNorm(resid_pre + attn_out)`,
`resid_post = LayerNorm(resid_mid + mlp_out)`. attn_out is what the first branch adds; hybrid
models have a mixer of another kind there. What a family multiplies before it adds it counts multiplied. Of
a model that hands on another tensor than [B, T, d], the text's part is given in that shape (`layout`).

A few families are in a table (`families`). Those of all others are told by their structure in a run on a few
tokens (`structure`), the first time a site of the model is asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from ndm_fast.activations.block_points import HIDDEN_SUM, PARALLEL
from ndm_fast.activations.blocks import likely_blocks, number_in_config
from ndm_fast.activations.families import family_of
from ndm_fast.activations.site import FORMS, Site, canonical_name, parse
from ndm_fast.activations.structure import structure_of
from ndm_fast.activations.wrappers import describe, is_empty, join, text_config, unwrapped
from ndm_fast.errors import InputError

__all__ = [
    "Site",
    "blocks_without",
    "canonical_name",
    "list_sites",
    "number_of_blocks",
    "parts_below",
    "resolve_site",
    "resolve_sites",
    "site_width",
    "weight_site",
]


def resolve_site(model: nn.Module, name: str) -> Site:
    """The site that `name` stands for in `model`.

    Args:
        model: a Hugging Face model, with or without its head or wrappers; any `nn.Module` for module paths.
        name: one of the forms in the module's docstring. A module path may be given with or without the
            prefix that a head puts before it (`transformer.h.3` and `h.3` both work on either model).

    Raises:
        InputError: no such site; the message says what exists.
    """
    model = unwrapped(model)
    point = parse(name)
    if point is None:
        return _resolve_path(model, name)
    index, kind = point
    try:
        count, points = number_of_blocks(model), _points(model, index)
    except InputError as error:
        near = join(_near_paths(model, f"layers.{index}"))
        raise InputError(f"no site {name!r}: {error}, e.g. {near}") from None
    if index >= count:
        raise InputError(f"no site {name!r}: {describe(model)} has {count} blocks, use 0 to {count - 1}")
    if kind not in points:
        exist = [f"blocks.{index}.hook_{other}" for other in points]
        raise InputError(f"no site {name!r}: {_why_not(model, index, kind)}; use {join(exist)}")
    return points[kind]


def resolve_sites(model: nn.Module, names: str | Iterable[str]) -> list[Site]:
    """`resolve_site` for every name, in the order given; a single string counts as one name.

    Raises:
        InputError: a name resolves to nothing, or `names` is empty.
    """
    sites = [resolve_site(model, name) for name in ([names] if isinstance(names, str) else names)]
    if not sites:
        raise InputError(f"no site given: name at least one, as {FORMS}")
    return sites


def list_sites(model: nn.Module) -> list[str]:
    """Canonical names of all named sites in forward order; the module paths where there are none."""
    model = unwrapped(model)
    try:
        blocks = range(number_of_blocks(model)) if _blocks(model) else ()
    except InputError:
        return [path for path, _ in model.named_modules() if path]
    return [f"blocks.{i}.hook_{kind}" for i in blocks for kind in _points(model, i)]


def number_of_blocks(model: nn.Module) -> int:
    """How many transformer blocks the model has.

    Raises:
        InputError: neither its structure nor its config says.
    """
    model = unwrapped(model)
    if family_of(model) is not None:
        return len(_blocks(model))
    try:
        return len(_blocks(model))
    except InputError:
        # Without weights, or without named sites. A config may count the encoder's blocks, where only the
        # decoder is there, so the structure comes first.
        count = number_in_config(model)
        if count is None:
            raise
        return int(count)


def parts_below(model: nn.Module, site: Site) -> tuple[list[nn.Module], nn.Module | None] | None:
    """What need not run again for a residual-stream site whose activation is known.

    Returns:
        The blocks wholly below the site and, for a resid_mid, its block's attention, which is below too; None
        where a part of a block's sum lies on either side (attn_out, mlp_out, post-norm families, paths), and
        in families outside of the table, whose blocks may hand on more than the stream.
    """
    model = unwrapped(model)
    family, point = family_of(model), parse(site.name)
    if family is None or point is None or family.is_post_norm:
        return None
    index, kind = point
    blocks = [model.get_submodule(path) for (path,) in _blocks(model)]
    if kind == "resid_mid":
        inner = family.attention or family.attn_out
        return blocks[:index], blocks[index].get_submodule(inner)
    if kind in ("resid_pre", "resid_post"):
        return blocks[: index + (kind == "resid_post")], None
    return None


def blocks_without(model: nn.Module, sites: Iterable[Site]) -> list[nn.Module]:
    """The transformer blocks that no site lies inside of; a block's own input and output are not inside.

    Of blocks that no module holds together, their parts; of blocks that share a module, that one once.

    Raises:
        InputError: the blocks are not known.
    """
    model = unwrapped(model)
    try:
        paths = dict.fromkeys(path for block in _blocks(model) for path in block)
    except InputError as error:
        raise InputError(f"{error}; and leave --compile-model away") from None
    inside = [site.module for site in sites]
    return [
        model.get_submodule(path)
        for path in paths
        if not any(module.startswith(f"{path}.") for module in inside)
    ]


def site_width(model: nn.Module, site: Site) -> int:
    """Width d of the activation at `site`: the hidden size, for a module path that module's own output width.

    Raises:
        InputError: the width cannot be told without a forward pass.
    """
    model = unwrapped(model)
    if not site.is_named:
        module = model.get_submodule(site.module)
        own = _output_width(module)
        # A container ends with its last matrix: c_proj, down_proj, o_proj, dense.
        inside = [w for w in map(_output_width, module.modules()) if w is not None]
        width = own or (inside[-1] if inside else None)
        if width is None and next(module.children(), None) is None:
            raise InputError(
                f"the width of {site.module!r} ({type(module).__name__}) is not known before a forward pass: "
                "name the module before or after it"
            )
        if width is not None:
            return width
    elif family_of(model) is None and not is_empty(model):
        return structure_of(model).width
    hidden = getattr(text_config(model), "hidden_size", None)
    if hidden is None:
        raise InputError(f"{describe(model)} has no hidden_size in its config: name a linear layer's path")
    return int(hidden)


def weight_site(model: nn.Module, name: str) -> Site:
    """A site of a model without weights, near enough to count what lies below it: it may be its whole block.

    Raises:
        InputError: no such site.
    """
    model, point = unwrapped(model), parse(name)
    if point is None or family_of(model) is not None or not is_empty(model):
        return resolve_site(model, name)
    paths, count = likely_blocks(model), number_of_blocks(model)
    if point[0] >= count or not paths:
        raise InputError(f"no site {name!r}: {describe(model)} has {count} blocks, use 0 to {count - 1}")
    return Site(canonical_name(name), f"{paths[0]}.{point[0]}", "output")


def _points(model: nn.Module, index: int) -> dict[str, Site]:
    """Point -> site of one block; of a block that does not exist nothing."""
    family = family_of(model)
    if family is None:
        points = structure_of(model).points
        return points[index] if index < len(points) else {}
    path = family.blocks_path(model)
    return {
        kind: Site(f"blocks.{index}.hook_{kind}", f"{path}.{index}.{inner}".rstrip("."), end)
        for kind, (inner, end) in family.points(model.config).items()
    }


def _why_not(model: nn.Module, index: int, kind: str) -> str:
    """Why a block has no such point."""
    form = PARALLEL if family_of(model) else structure_of(model).forms[index]
    if kind == "resid_mid" and form == PARALLEL:
        return f"{describe(model)} runs attention and MLP in parallel, with nothing between"
    if kind == "resid_mid" and form == HIDDEN_SUM:
        return f"in {describe(model)} no module takes or gives the sum between attention and MLP"
    return f"no module of block {index} of {describe(model)} gives a {kind} that adds up"


def _blocks(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Of each block the paths of its modules."""
    family = family_of(model)
    if family is None:
        return structure_of(model).blocks
    path = family.blocks_path(model)
    return tuple((f"{path}.{name}",) for name, _ in model.get_submodule(path).named_children())


def _resolve_path(model: nn.Module, path: str) -> Site:
    modules = {name for name, _ in model.named_modules() if name}
    # `base_model_prefix` is where a head keeps the model; Gemma-3 names another place than it uses.
    prefixes = (getattr(model, "base_model_prefix", "model"), "model")
    spellings = [path, *(s for p in prefixes for s in (f"{p}.{path}", path.removeprefix(f"{p}.")))]
    found = next((spelling for spelling in spellings if spelling in modules), None)
    if found is None:
        near = difflib.get_close_matches(path, list_sites(model), n=2) + _near_paths(model, path)
        raise InputError(
            f"no site {path!r} in {describe(model)}: accepted are {FORMS}; near it: {join(near[:5])}"
        )
    return _named_output(model, found) or Site(found, found, "output")


def _named_output(model: nn.Module, path: str) -> Site | None:
    """The named point that a module's output is."""
    if family_of(model) is None and (is_empty(model) or not hasattr(model, "config")):
        return None
    try:
        inside = f"{path}."
        blocks = [n for n, own in enumerate(_blocks(model)) if any(inside.startswith(f"{p}.") for p in own)]
        points = _points(model, blocks[0]) if len(blocks) == 1 else {}
    except InputError:
        return None  # no named points
    outputs = (site for site in points.values() if (site.module, site.end, site.scale) == (path, "output", 1))
    return next(outputs, None)


def _near_paths(model: nn.Module, path: str) -> list[str]:
    paths = [name for name, _ in model.named_modules() if name]
    return difflib.get_close_matches(path, paths, n=4, cutoff=0.3) or paths[:4]


def _output_width(module: nn.Module) -> int | None:
    """Last dimension of the output of a matrix or embedding; None for other modules."""
    # `nf` is transformers' Conv1D, GPT-2's transposed linear layer.
    names = ("out_features", "nf", "embedding_dim")
    return next((int(w) for n in names if isinstance(w := getattr(module, n, None), int)), None)
