"""Read and replace activations of a Hugging Face model with plain PyTorch hooks.

    with collect_activations(model, ["x9.mid", "m3"]) as captured:
        model(tokens)                                      # stops after block 9's resid_mid
    captured["x9.mid"]                                     # [B, T, d]

    with replace_activations(model, {"x9.mid": patch}):    # patch: [B, T, d] -> [B, T, d]
        logits = model(tokens).logits

Both nest in either order: replacing runs before reading, so what is read at a site is what the model went on
with. Neither changes the train/eval mode or gradient mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ndm_fast.activations.site_hooks import register
from ndm_fast.activations.sites import Site, resolve_sites
from ndm_fast.activations.wrappers import describe, unwrapped, without_compiler
from ndm_fast.errors import InputError, StoppedError

Replacement = Callable[[Tensor], Tensor]  # [B, T, d] -> [B, T, d]


class _StopForward(Exception):  # noqa: N818 - not an error, the way out of a forward pass
    """Raised inside the model when every wanted site has been read."""

    def __init__(self, owner: dict[str, Tensor]):
        super().__init__("all sites were read; raised inside collect_activations to end the forward pass")
        self.owner = owner  # the dictionary of the collector that raised it


@contextmanager
def collect_activations(
    model: nn.Module, sites: str | Iterable[str], *, stop_after_last: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Read activations during one forward pass inside the `with` block.

    Args:
        model: any model whose sites resolve (`ndm_fast.activations.sites`).
        sites: names in any accepted form; a single string counts as one name.
        stop_after_last: end the forward pass as soon as all sites are read. The pass ends by leaving the
            `with` block, so statements after the model call inside the block do not run; put them after it,
            or pass False to let the call return.

    Yields:
        Dictionary, filled by the forward pass: name as given -> detached activation [B, T, d] in the model's
        dtype. Tensors share memory with the model's own, without a copy, where the family is known not to
        write to them afterwards. If a site is passed several times, the first time counts.

    Raises:
        InputError: a name resolves to nothing, or no forward pass in the block reached a site.
    """
    names = [sites] if isinstance(sites, str) else list(dict.fromkeys(sites))
    wanted = dict(zip(names, resolve_sites(model, names), strict=True))
    captured: dict[str, Tensor] = {}
    with without_compiler(model), ExitStack() as hooks:
        for name, site in wanted.items():

            def keep(activation: Tensor, name: str = name, site: Site = site) -> None:
                if name in captured:
                    return
                # Families of the table write in place to no named point. Other modules' outputs may be
                # written to (Falcon adds attention onto the MLP's output), so they are copied.
                shared = site.is_named and not site.copied
                captured[name] = activation.detach() if shared else activation.detach().clone()
                if stop_after_last and len(captured) == len(wanted):
                    raise _StopForward(captured)

            hooks.callback(register(unwrapped(model), site, keep).remove)
        try:
            yield captured
        except _StopForward as stop:
            if stop.owner is not captured:
                if len(captured) < len(wanted):
                    raise _not_reached(wanted, captured, "another collect_activations stopped it") from None
                raise
    if len(captured) < len(wanted):
        raise _not_reached(wanted, captured, "the block was left")


@contextmanager
def replace_activations(model: nn.Module, replacements: Mapping[str, Replacement]) -> Iterator[None]:
    """Replace activations in every forward pass inside the `with` block.

    Args:
        model: any model whose sites resolve (`ndm_fast.activations.sites`).
        replacements: site name -> function from the activation [B, T, d] to its replacement, of the same
            shape. The function gets a copy and may write to it; its result is cast to the model's dtype and
            device. Where two blocks nested in each other replace the same site, the inner one goes first.

    The result is that of a hand-written forward pass with the variable itself replaced, so a residual-stream
    site is also replaced in the skip connection. Gradients flow through the replacement.

    Raises:
        InputError: a name resolves to nothing, two names are the same site, or a function returns something
            that is not a tensor of the activation's shape (raised from the forward pass).
    """
    sites = dict(zip(replacements, resolve_sites(model, replacements), strict=True))
    if len(set(sites.values())) < len(sites):
        raise InputError(f"two of {', '.join(sites)} are the same site: join their functions into one")
    with without_compiler(model), ExitStack() as hooks:
        for name, site in sites.items():

            def change(activation: Tensor, name: str = name, site: Site = site) -> Tensor:
                return replaced(activation, replacements[name], name, in_place=site.feeds_skip)

            hooks.callback(register(unwrapped(model), site, change, first=True).remove)
        yield


def replaced(activation: Tensor, replacement: Replacement, name: str, *, in_place: bool) -> Tensor:
    """[B, T, d] what a model goes on with at a site, checked.

    Args:
        in_place: write into the model's own tensor, as a site needs that feeds a skip connection.

    Raises:
        InputError: the function returned something that is not a tensor of the activation's shape.
    """
    new = _checked(replacement(activation.clone()), activation, name)
    # `resid_mid` is the input of a norm, and the block adds the same tensor object to the MLP's output.
    # Returning a new tensor would reach the norm alone; writing into the old one reaches both, exactly. The
    # sum that made it does not need its result for its gradient. The same goes for the input of blocks that
    # read it in several places.
    return activation.copy_(new) if in_place else new


@contextmanager
def forward_errors(model: nn.Module, what: str, tokens: Tensor, name: str = "") -> Iterator[None]:
    """One line for what a model's forward pass raises inside the `with` block.

    Args:
        what: the sites and the batch, for the message. tokens: [B, T] int64. name: of the model.

    Raises:
        InputError: in place of any other error.
    """
    try:
        yield
    except (_StopForward, InputError, StoppedError):
        raise
    except Exception as error:  # a model's own code raises whatever it likes
        said = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"model {name or describe(unwrapped(model))!r} failed on {what}, tokens {list(tokens.shape)} "
            f"({type(error).__name__}: {said}): {_advice(unwrapped(model), tokens)}"
        ) from None


def _advice(model: nn.Module, tokens: Tensor) -> str:
    """What may help a forward pass that failed on [B, T] tokens."""
    embedding = getattr(getattr(model, "base_model", model), "get_input_embeddings", lambda: None)()
    known, largest = getattr(embedding, "num_embeddings", None), int(tokens.max()) if tokens.numel() else 0
    if known is not None and largest >= known:
        return f"its tokenizer gives token {largest}, the model knows {known}: give its own"
    return "try a lower --context-length or --rows-per-batch"


def _checked(new: Any, old: Tensor, name: str) -> Tensor:
    if not isinstance(new, Tensor) or new.shape != old.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise InputError(
            f"the replacement for {name!r} returned {got}: return a tensor of shape {tuple(old.shape)}"
        )
    return new.to(device=old.device, dtype=old.dtype)


def _not_reached(wanted: Mapping[str, Site], captured: Mapping[str, Tensor], ending: str) -> InputError:
    missing = ", ".join(name for name in wanted if name not in captured)
    return InputError(
        f"no forward pass reached {missing} before {ending}: call the model once inside the `with` block, "
        "and name all sites in one collect_activations"
    )
