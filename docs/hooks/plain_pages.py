"""Pages for readers without a browser, as language models are: ``llms.txt``, and every page as Markdown.

``llms.txt`` (llmstxt.org) names the pages. Beside each ``NAME.html`` lies ``NAME.md``, as it is read, tables
of records included; ``api.md`` holds signatures and docstrings themselves. mkdocs calls the ``on_`` ones.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_ITEM = re.compile(r"^::: (\S+)$", re.M)
_ROLE = re.compile(r":(?:func|class|meth|attr|mod):(?=`)")
_SUMMARY = """\
Neighbor distance minimization (NDM) learns a rotation of a language model's activations, and a partition of
its columns into subspaces that can be read one by one. This package trains it, measures and shows what it
found, and offers its search as an operation of PyTorch.
Command line: `ndm-fast`; Python: `import ndm_fast`."""

_pages: dict[str, str] = {}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Keep a page as it is by now; the hooks before have filled it."""
    _pages[page.file.src_uri] = with_docstrings(markdown)
    return markdown


def on_post_build(config: Any, **_: Any) -> None:
    """Write the pages beside those of the site."""
    site = Path(config["site_dir"])
    for name, markdown in _pages.items():
        (site / name).write_text(markdown, encoding="utf-8")
    (site / "llms.txt").write_text(llms(config["site_name"], config["nav"], _pages), encoding="utf-8")


def llms(name: str, nav: list[Any], pages: Mapping[str, str]) -> str:
    """What is where.

    Args:
        nav: mkdocs' ``nav``, titles and pages, or titles and such lists.
        pages: Markdown by file name.
    """
    lines = [f"# {name}", "", *(f"> {line}" for line in _SUMMARY.splitlines()), ""]
    for section, entries in _sections(nav):
        lines += [f"## {section}", ""]
        lines += [f"- [{title}]({page}): {_first_words(pages[page])}" for title, page in entries]
        lines.append("")
    return "\n".join(lines)


def _sections(nav: list[Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Single pages first, then those of each list."""
    items = [(title, inside) for entry in nav for title, inside in entry.items()]
    yield "Pages", [(title, inside) for title, inside in items if isinstance(inside, str)]
    for title, inside in items:
        if not isinstance(inside, str):
            yield title, [pair for entry in inside for pair in entry.items()]


def _first_words(markdown: str) -> str:
    """The headings of a page, in one line."""
    outside = re.sub(r"^```.*?^```$", "", markdown, flags=re.M | re.S)
    parts = re.findall(r"^## (.+)$", outside, re.M) or re.findall(r"^# (.+)$", outside, re.M)
    return "; ".join(parts)


def with_docstrings(markdown: str) -> str:
    """A page with signature and docstring in place of every line ``::: PATH``."""
    return _ITEM.sub(lambda found: f"{described(found[1])}\n", markdown)


def described(path: str) -> str:
    """Signature and docstring of a dotted path, and of a class's public members."""
    module, _, name = path.rpartition(".")
    value = getattr(import_module(module), name)
    parts = [f"### {_shortest(path, value)}", *_told(name, value)]
    if inspect.isclass(value):
        for member, inside in vars(value).items():
            if not member.startswith("_") and not dataclasses.is_dataclass(inside):
                parts += _member(value, member)
    return "\n\n".join(parts)


def _shortest(path: str, value: Any) -> str:
    """By which name to import something."""
    name = path.rpartition(".")[2]
    for home in ("ndm_fast", "ndm_fast.ops"):
        module = import_module(home)
        if name in module.__all__ and getattr(module, name) is value:
            return f"{home}.{name}"
    return path


def _told(name: str, value: Any) -> list[str]:
    fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    parts = [f"```python\n{_signature(name, value)}\n```"] if callable(value) else []
    parts += [_ROLE.sub("", inspect.getdoc(value) or "").strip()]
    if fields and inspect.isclass(value):
        from ndm_fast.fields import meanings

        about = meanings(value)
        parts.append("\n".join(f"- `{field}`: {about[field]}" for field in fields if field in about))
    return [part for part in parts if part]


def _member(cls: type, name: str) -> list[str]:
    value = inspect.getattr_static(cls, name)
    if isinstance(value, property):
        return [f"#### {cls.__name__}.{name} (property)", *_told(name, value)]
    if inspect.isfunction(value) or isinstance(value, classmethod | staticmethod):
        return [f"#### {cls.__name__}.{name}", *_told(name, getattr(cls, name))]
    return []


def _signature(name: str, value: Any) -> str:
    """``def`` or ``class`` line, one argument a line where it is long."""
    kind = "class" if inspect.isclass(value) else "def"
    try:
        signature = inspect.signature(value)
    except ValueError:  # made in C, as InputError's is
        return f"{kind} {name}"
    parts, star = [], False
    for argument in signature.parameters.values():
        if argument.kind is argument.KEYWORD_ONLY and not star:
            parts.append("*")
        star = star or argument.kind in (argument.KEYWORD_ONLY, argument.VAR_POSITIONAL)
        default = _Bare("...") if " at 0x" in repr(argument.default) else argument.default
        parts.append(str(argument.replace(annotation=_bare(argument.annotation), default=default)))
    back = "" if signature.return_annotation is signature.empty else f" -> {signature.return_annotation}"
    line = f"{kind} {name}({', '.join(parts)}){back}"
    if len(line) <= 100:
        return line
    inside = "".join(f"    {part},\n" for part in parts)
    return f"{kind} {name}(\n{inside}){back}"


class _Bare(str):
    """Text that is shown without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _bare(annotation: Any) -> Any:
    return _Bare(annotation) if isinstance(annotation, str) else annotation
