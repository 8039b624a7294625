"""A folder of partitions for the Hugging Face Hub: one folder a hook, and the card of them all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from ndm_fast.activations.packaged import EMBEDDED_MODEL, GGUF_PACKAGES
from ndm_fast.config import RunConfig
from ndm_fast.errors import InputError
from ndm_fast.evaluate.purity.reading import describe
from ndm_fast.files import new_folder, parse_json, unwritable, write_atomic
from ndm_fast.partition import HUB_ABOUT, SubspacePartition
from ndm_fast.report.figures import draw_run, purity_tables
from ndm_fast.run.folder import RunFolder

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""What the hub takes for a name."""

_PLACES = ("model", "data", "rows", "acts")
"""Settings, and notes in a partition, that may hold a path of this machine."""

_UNTOLD = ("model", "site", "partial", "parallel", "log_every", "eval_every", "checkpoint_every")
"""Settings that say nothing of the partition, or that the card says elsewhere."""

_CAPTIONS = {
    "loss": "Mean distance to the nearest neighbor during training; dashed lines are merges",
    "merge_tree": "Which of the first subspaces joined, and when",
    "mutual_information": "Mutual information between all pairs of subspaces, at every round of merging",
    "purity": "What nearest neighbors share in each subspace",
}


def write_hub(folders: Sequence[RunFolder], out: Path, repository: str = "USER/NAME") -> Path:
    """Write the partitions of finished runs of one model, ready to be uploaded.

    ``out/HOOK`` holds each partition, for ``SubspacePartition.from_pretrained(repository, subfolder=HOOK)``,
    with the run's figures; ``out/README.md`` is the card. Paths of this machine do not travel: of a
    model, text or file that lies here, only the name is told.

    Args:
        out: a folder that is not there yet, is empty, or holds the very same.
        repository: its name on the hub, for the card's snippet.

    Returns:
        ``out/README.md``.

    Raises:
        InputError: a run is not finished, two have the same hook or another model, matplotlib is missing, or
            ``out`` holds something else or cannot be written to.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"{repository!r} is no name of a repository: give USER/NAME")
    hooks: dict[str, RunFolder] = {}
    for folder in folders:
        hook = _hook(folder)
        if hook in hooks:
            raise InputError(f"{hooks[hook].path} and {folder.path} are both of {hook}: give one of them")
        hooks[hook] = folder
    models = {_model(folder) for folder in folders}
    if len(models) != 1:
        raise InputError(f"runs of {' and '.join(sorted(models))}: one repository holds those of one model")
    try:
        with new_folder(out) as filling:
            told = [_write_hook(hook, one, filling / hook) for hook, one in sorted(hooks.items(), key=_order)]
            card = _card(models.pop(), told, repository, _base_model(folders[0].partition()))
            write_atomic(filling / "README.md", card.encode())
    except OSError as error:
        raise unwritable(out, error) from None
    return out / "README.md"


def _order(item: tuple[str, Any]) -> list[tuple[bool, int, str]]:
    """Hooks by the numbers in their names."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in item[0].split(".")]


def _hook(folder: RunFolder) -> str:
    source = folder.partition().source
    hook = str(source["site"]) if "site" in source else Path(str(source["rows"])).stem
    return hook.replace("/", "_")


def _model(folder: RunFolder) -> str:
    """Name of the model, or of the file of rows."""
    source = folder.partition().source
    return _name(str(source.get("model") or source["rows"]))


def _name(value: str) -> str:
    """A hub name as it is; of a path its last part."""
    return value if _REPOSITORY.fullmatch(value) and not Path(value).exists() else Path(value).name


def _base_model(partition: SubspacePartition) -> str | None:
    """The model's name on the hub; None for one that lies here, or comes as a Python package."""
    model = str(partition.source.get("model", ""))
    ours = model in GGUF_PACKAGES or model == EMBEDDED_MODEL
    return model if _REPOSITORY.fullmatch(model) and not ours and not Path(model).exists() else None


def _without_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _name(value) if name in _PLACES and isinstance(value, str) and value else value
        for name, value in values.items()
    }


def _write_hook(hook: str, folder: RunFolder, place: Path) -> dict[str, Any]:
    """Write one hook's folder; what the card tells of it."""
    result, partition = folder.result(), folder.partition()
    public = SubspacePartition(partition.rotation, partition.widths, _without_paths(partition.source))
    public.save_pretrained(place)
    (place / "README.md").unlink()  # the hub reads the card at the root alone
    figures = draw_run(folder, into=place / "figures")
    columns = zip(result["widths"], result["variance_share"], result["heldout_distance"], strict=True)
    settings = folder.config()
    return {
        "hook": hook,
        "width": partition.width,
        "steps": result["steps"],
        "heldout_loss": result["heldout_loss"],
        "metric": settings.train.metric,
        "subspaces": [dict(zip(("width", "share", "distance"), column, strict=True)) for column in columns],
        "readings": _readings(folder),
        "figures": [(figure.stem, _CAPTIONS[figure.stem]) for figure in figures],
        "settings": _changed(settings),
        "versions": _versions(folder),
    }


def _readings(folder: RunFolder) -> list[str]:
    """A line for each subspace, where `evaluate purity` has measured them."""
    if not folder.purity_file.exists():
        return []
    rows = purity_tables(folder.purity_file).get("ndm", [])
    return [describe(row).line for row in rows if "reading" in row]


def _changed(config: RunConfig) -> dict[str, Any]:
    """Settings other than the defaults."""
    defaults = RunConfig().flat()
    told = {name: value for name, value in config.flat().items() if value != defaults[name]}
    return {name: value for name, value in _without_paths(told).items() if name not in _UNTOLD}


def _versions(folder: RunFolder) -> str:
    found = parse_json(folder.config_file.read_bytes(), {"made_with": {"versions": {str: object}}})
    versions = found["made_with"]["versions"]
    return ", ".join(f"{name} {versions[name]}" for name in ("ndm-fast", "torch") if name in versions)


def _card(model: str, hooks: list[dict[str, Any]], repository: str, base_model: str | None) -> str:
    about = {**HUB_ABOUT, "base_model": base_model}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ndm_fast.report"),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md").render(
        metadata=ModelCardData(**about).to_yaml(), model=model, hooks=hooks, repository=repository
    )
