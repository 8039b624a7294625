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
`resid_post = LayerNorm(resid_mid + mlp_out)`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ndm_fast.errors import InputError

End = Literal["input", "output"]

_BLOCK_INPUT: tuple[str, End] = ("", "input")


_BLOCK_OUTPUT: tuple[str, End] = ("", "output")


_FORMS = (
    "blocks.3.hook_resid_pre|resid_mid|resid_post|attn_out|mlp_out, x3.pre|mid|post, a3, m3, or a module path"
)


_CANONICAL = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")


_SHORT = re.compile(r"x(\d+)\.(pre|mid|post)|([am])(\d+)")


@dataclass(frozen=True)
class Site:
    """A place in a model whose activation [B, T, d] can be read and replaced."""

    name: str  # canonical name; for a module path that is none of the named points, the path itself
    module: str  # path of the module as in `model.named_modules()`
    end: End  # which side of the module

    @property
    def is_named(self) -> bool:
        """Whether this is one of the named points of a known family, not just some module."""
        return self.name != self.module

    @property
    def feeds_skip(self) -> bool:
        """Whether the module's input tensor is also read by a skip connection around the module."""
        return self.end == "input" and self.name.endswith(".hook_resid_mid")


@dataclass(frozen=True)
class _Family:
    """Where the named points of one architecture live."""

    blocks: tuple[str, ...]  # paths the list of blocks may have: under a head first, bare last
    mid: tuple[str, End] | None  # module inside the block and its end; None: no such point
    attn_out: str
    mlp_out: str
    parallel_flag: str | None = None  # config field that, when true, leaves the block without resid_mid
    attention: str = ""  # the attention module itself, where attn_out is a module after it

    def points(self, config: Any) -> dict[str, tuple[str, End]]:
        """Point -> (module inside the block, end), in the order of the forward pass."""
        parallel = self.parallel_flag is not None and bool(getattr(config, self.parallel_flag))
        mid = {} if self.mid is None or parallel else {"resid_mid": self.mid}
        return {
            "resid_pre": _BLOCK_INPUT,
            "attn_out": (self.attn_out, "output"),
            **mid,
            "mlp_out": (self.mlp_out, "output"),
            "resid_post": _BLOCK_OUTPUT,
        }


_LLAMA_LIKE = _Family(
    blocks=("model.layers", "layers"),
    mid=("post_attention_layernorm", "input"),
    attn_out="self_attn",
    mlp_out="mlp",
)


# Gemma normalises each branch before adding it, so what is added is the output of these norms.
_GEMMA = _Family(
    blocks=(
        "model.language_model.layers",
        "language_model.model.layers",
        "language_model.layers",
        "model.layers",
        "layers",
    ),
    mid=("pre_feedforward_layernorm", "input"),
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    attention="self_attn",
)


# `config.model_type` -> family.
_FAMILIES: dict[str, _Family] = {
    "gpt2": _Family(("transformer.h", "h"), mid=("ln_2", "input"), attn_out="attn", mlp_out="mlp"),
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi": _Family(("model.layers", "layers"), mid=None, attn_out="self_attn", mlp_out="mlp"),
    "gpt_neox": _Family(
        ("gpt_neox.layers", "layers"),
        mid=("post_attention_layernorm", "input"),
        attn_out="post_attention_dropout",
        mlp_out="post_mlp_dropout",
        parallel_flag="use_parallel_residual",
        attention="attention",
    ),
    "bert": _Family(
        ("bert.encoder.layer", "encoder.layer"),
        mid=("attention.output", "output"),
        attn_out="attention.output.dropout",
        mlp_out="output.dropout",
    ),
}


def resolve_site(model: nn.Module, name: str) -> Site:
    """The site that `name` stands for in `model`.

    Args:
        model: a Hugging Face model, with or without its head; any `nn.Module` for module paths.
        name: one of the forms in the module's docstring. A module path may be given with or without the
            prefix that a head puts before it (`transformer.h.3` and `h.3` both work on either model).

    Raises:
        InputError: no such site; the message says what exists.
    """
    point = _parse(name)
    if point is None:
        return _resolve_path(model, name)
    index, kind = point
    family = _family(model)
    if family is None:
        raise InputError(
            f"{_describe(model)} is not a family with named sites, so {name!r} means nothing in it: "
            f"give a module path, e.g. {_join(_near_paths(model, f'layers.{index}'))}"
        )
    blocks, points = _blocks_path(model, family), family.points(model.config)
    count = number_of_blocks(model)
    if index >= count:
        raise InputError(f"no site {name!r}: {_describe(model)} has {count} blocks, use 0 to {count - 1}")
    if kind not in points:
        exist = [f"blocks.{index}.hook_{other}" for other in points]
        raise InputError(
            f"no site {name!r}: {_describe(model)} runs attention and MLP in parallel, with nothing between; "
            f"use {_join(exist)}"
        )
    inner, end = points[kind]
    module = f"{blocks}.{index}.{inner}" if inner else f"{blocks}.{index}"
    return Site(canonical_name(name), module, end)


def resolve_sites(model: nn.Module, names: str | Iterable[str]) -> list[Site]:
    """`resolve_site` for every name, in the order given; a single string counts as one name.

    Raises:
        InputError: a name resolves to nothing, or `names` is empty.
    """
    sites = [resolve_site(model, name) for name in ([names] if isinstance(names, str) else names)]
    if not sites:
        raise InputError(f"no site given: name at least one, as {_FORMS}")
    return sites


def canonical_name(name: str) -> str:
    """`name` in its canonical form as far as that is told without a model: short names, not module paths."""
    point = _parse(name)
    return f"blocks.{point[0]}.hook_{point[1]}" if point else name


def list_sites(model: nn.Module) -> list[str]:
    """Canonical names of all named sites in forward order; the module paths if the family is unknown."""
    family = _family(model)
    if family is None:
        return [path for path, _ in model.named_modules() if path]
    points = family.points(model.config)
    return [f"blocks.{i}.hook_{kind}" for i in range(number_of_blocks(model)) for kind in points]


def number_of_blocks(model: nn.Module) -> int:
    """How many transformer blocks the model has.

    Raises:
        InputError: unknown family whose config does not say.
    """
    family = _family(model)
    if family is not None:
        blocks = model.get_submodule(_blocks_path(model, family))
        assert isinstance(blocks, nn.ModuleList)
        return len(blocks)
    count = getattr(_text_config(model), "num_hidden_layers", None)
    if count is None:
        raise InputError(f"{_describe(model)} does not say how many blocks it has: name sites by module path")
    return int(count)


def parts_below(model: nn.Module, site: Site) -> tuple[list[nn.Module], nn.Module | None] | None:
    """What need not run again for a residual-stream site whose activation is known.

    Returns:
        The blocks wholly below the site and, for a resid_mid, its block's attention, which is below too; None
        where a part of a block's sum lies on either side (attn_out, mlp_out, post-norm families, paths).
    """
    family, point = _family(model), _parse(site.name)
    if family is None or point is None or _is_post_norm(family):
        return None
    index, kind = point
    blocks = model.get_submodule(_blocks_path(model, family))
    assert isinstance(blocks, nn.ModuleList)
    if kind == "resid_mid":
        inner = family.attention or family.attn_out
        return list(blocks[:index]), blocks[index].get_submodule(inner)
    if kind in ("resid_pre", "resid_post"):
        return list(blocks[: index + (kind == "resid_post")]), None
    return None


def blocks_without(model: nn.Module, sites: Iterable[Site]) -> list[nn.Module]:
    """The transformer blocks that no site lies inside of; a block's own input and output are not inside.

    Raises:
        InputError: the family is unknown, so that the blocks are not known either.
    """
    family = _family(model)
    if family is None:
        raise InputError(
            f"the blocks of {_describe(model)} are not known, as its family has no named sites: leave "
            "--compile-model away"
        )
    path = _blocks_path(model, family)
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    inside = [site.module for site in sites]
    return [
        block
        for number, block in enumerate(blocks)
        if not any(module.startswith(f"{path}.{number}.") for module in inside)
    ]


def site_width(model: nn.Module, site: Site) -> int:
    """Width d of the activation at `site`: the hidden size, for a module path that module's own output width.

    Raises:
        InputError: the width cannot be told without a forward pass.
    """
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
    hidden = getattr(_text_config(model), "hidden_size", None)
    if hidden is None:
        raise InputError(f"{_describe(model)} has no hidden_size in its config: name a linear layer's path")
    return int(hidden)


def _parse(name: str) -> tuple[int, str] | None:
    """(block, point) of a canonical or short name; None for anything else."""
    if match := _CANONICAL.fullmatch(name):
        return int(match[1]), match[2]
    if match := _SHORT.fullmatch(name):
        if match[1]:
            return int(match[1]), f"resid_{match[2]}"
        return int(match[4]), "attn_out" if match[3] == "a" else "mlp_out"
    return None


def _resolve_path(model: nn.Module, path: str) -> Site:
    modules = {name for name, _ in model.named_modules() if name}
    # `base_model_prefix` is where a head keeps the model; Gemma-3 names another place than it uses.
    prefixes = (getattr(model, "base_model_prefix", "model"), "model")
    spellings = [path, *(s for p in prefixes for s in (f"{p}.{path}", path.removeprefix(f"{p}.")))]
    found = next((spelling for spelling in spellings if spelling in modules), None)
    if found is None:
        near = difflib.get_close_matches(path, list_sites(model), n=2) + _near_paths(model, path)
        raise InputError(
            f"no site {path!r} in {_describe(model)}: accepted are {_FORMS}; near it: {_join(near[:5])}"
        )
    if (family := _family(model)) is not None:
        start = f"{_blocks_path(model, family)}."
        index, _, inner = found.removeprefix(start).partition(".")
        for kind, where in family.points(model.config).items():
            if found.startswith(start) and where == (inner, "output"):
                return Site(f"blocks.{index}.hook_{kind}", found, "output")
    return Site(found, found, "output")


def _near_paths(model: nn.Module, path: str) -> list[str]:
    paths = [name for name, _ in model.named_modules() if name]
    return difflib.get_close_matches(path, paths, n=4, cutoff=0.3) or paths[:4]


def _family(model: nn.Module) -> _Family | None:
    return _FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))


def _is_post_norm(family: _Family) -> bool:
    """Whether the family normalises after each sum, so that resid_mid is a module's output, not a sum."""
    return family.mid is not None and family.mid[1] == "output"


def _blocks_path(model: nn.Module, family: _Family) -> str:
    paths = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for path in family.blocks:
        if path in paths:
            return path
    raise InputError(
        f"the blocks of {_describe(model)} are not at {_join(family.blocks)}: load it with AutoModel or "
        "AutoModelForCausalLM"
    )


def _text_config(model: nn.Module) -> Any:
    """The config that has the language model's sizes (multimodal models nest it)."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _output_width(module: nn.Module) -> int | None:
    """Last dimension of the output of a matrix or embedding; None for other modules."""
    # `nf` is transformers' Conv1D, GPT-2's transposed linear layer.
    names = ("out_features", "nf", "embedding_dim")
    return next((int(w) for n in names if isinstance(w := getattr(module, n, None), int)), None)


def _describe(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} ({kind})" if kind else type(model).__name__


def _join(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
