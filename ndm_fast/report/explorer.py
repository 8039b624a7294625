"""What the live page can ask: a text or a row of an index, and its neighbors in every subspace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ndm_fast.activations.hooks import collect_activations
from ndm_fast.activations.models import load_model, longest_context
from ndm_fast.activations.packing import frame
from ndm_fast.config import METRICS, RunConfig
from ndm_fast.errors import InputError
from ndm_fast.evaluate.connections.results import NAME, read_connections
from ndm_fast.report.index.format import PreimageIndex
from ndm_fast.report.index.search import nearest_rows
from ndm_fast.report.index.tokens import token_pieces
from ndm_fast.report.index.writer import run_index
from ndm_fast.report.views import radii, random_row, view_neighbors
from ndm_fast.run.folder import RunFolder

TEXT_LIMIT = 4000
"""Characters of a text."""


_TOKEN_LIMIT = 512


_NEIGHBOR_LIMIT, _WINDOW_LIMIT = 100, 100


@dataclass(frozen=True)
class Query:
    """A state of the page: everything that a deep link says.

    Attributes:
        site: one of the explorer's; text: what was typed, None where a row of the index is the query.
        place: number of the token in the text, or of the row in the index.
        k: neighbors in each subspace; within: largest relative distance, None for any.
        window: tokens before and after; subspaces: those to show.
    """

    site: str
    text: str | None
    place: int
    k: int
    within: float | None
    metric: str
    window: int
    subspaces: tuple[int, ...]


class Explorer:
    """Finished runs with their indexes and models, loaded once.

    Args:
        path: folder of a run, or of one run folder per site.
        rows: activations in an index that is built because there is none.

    Raises:
        InputError: there is no finished run, or an index is damaged.
    """

    def __init__(self, path: Path, *, rows: int, device: str = "cpu") -> None:
        self._configs: dict[str, RunConfig] = {}
        self._indexes: dict[str, PreimageIndex] = {}
        self._models: dict[tuple[str, str, str | None], tuple[Any, Any]] = {}
        self._device = device
        for folder in _run_folders(path):
            index = run_index(folder, rows=rows, device=device)
            config = folder.config()
            site = index.partition.source.get("site", config.harvest.site[0])
            self._configs[site], self._indexes[site] = config, index
            self._model(site)
        file = path / f"{NAME}.json"
        self.connections = read_connections(file) if file.exists() else None
        """What ``evaluate connections`` wrote into the folder."""
        self._generator = torch.Generator()
        self._generator.seed()

    def about(self) -> dict[str, Any]:
        """Sites with their subspaces, and the limits of a query."""
        return {
            "sites": [
                {
                    "name": site,
                    "model": self._configs[site].harvest.model,
                    "rows": len(index),
                    "widths": list(index.rows.widths),
                    "metric": self._configs[site].train.metric,
                }
                for site, index in self._indexes.items()
            ],
            "text_limit": TEXT_LIMIT,
        }

    def random(self, site: str) -> int:
        """The number of some row of a site's index."""
        return random_row(self._index(site), self._generator)

    def query(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """Answer a query in the words of a deep link, see :class:`Query`.

        Returns:
            ``tokens`` of the text or of the row's own text (``name``, ``text``, ``special``, and ``place``,
            None where it cannot be a query), ``place`` of the query among them, and ``subspaces``: for each
            one its number, width, rows ``within`` the distance, and ``neighbors``.

        Raises:
            InputError: a parameter is missing, wrong or over its limit.
        """
        query = self._parse(asked)
        index = self._index(query.site)
        searched = list(query.subspaces)
        exclude = None
        if query.text is None:
            tokens = _row_tokens(index, query.place)
            rotated = index.stored(torch.tensor([query.place]))
            exclude = torch.tensor([query.place])
        else:
            ids, special = self._tokenize(query.site, query.text)
            tokens = self._text_tokens(query.site, ids, special)
            if not 0 <= query.place < len(ids) or special[query.place]:
                raise InputError(f"token {query.place} is none of the text's: click another one")
            rotated = index.rotated(self._activation(query.site, ids)[query.place][None])
        found = nearest_rows(
            rotated,
            index.rows,
            query.k,
            metric=query.metric,
            radius=radii(index, query.within, query.metric, searched),
            subspaces=searched,
            exclude=exclude,
        )
        cards = [
            {
                "subspace": s,
                "width": index.rows.widths[s],
                "within": None if query.within is None else int(found.within[place, 0]),
                "neighbors": view_neighbors(
                    index, found, place, 0, s, metric=query.metric, window=query.window
                ),
            }
            for place, s in enumerate(searched)
        ]
        return {"tokens": tokens, "place": query.place, "subspaces": cards}

    def _parse(self, asked: Mapping[str, str]) -> Query:
        site = asked.get("site") or next(iter(self._indexes))
        index = self._index(site)
        text = asked.get("text")
        if text is None and "row" not in asked:
            raise InputError("nothing asked: type a text, or take a random query")
        if text is not None and not text.strip():
            raise InputError("the text is empty: type some words")
        if text is not None and len(text) > TEXT_LIMIT:
            raise InputError(
                f"the text has {len(text)} characters, at most {TEXT_LIMIT} are taken: shorten it"
            )
        metric = asked.get("metric") or self._configs[site].train.metric
        if metric not in METRICS:
            raise InputError(f"metric is {metric!r}: take one of {', '.join(METRICS)}")
        place = (
            _whole(asked, "row", 0, len(index) - 1)
            if text is None
            else _whole(asked, "token", 0, _TOKEN_LIMIT, self._first_token(site))
        )
        return Query(
            site=site,
            text=text,
            place=place,
            k=_whole(asked, "k", 1, _NEIGHBOR_LIMIT, 10),
            within=_within(asked.get("within")),
            metric=metric,
            window=_whole(asked, "window", 0, _WINDOW_LIMIT, 6),
            subspaces=_subspaces(asked.get("subspaces"), len(index.rows.widths)),
        )

    def _index(self, site: str) -> PreimageIndex:
        if site not in self._indexes:
            raise InputError(f"no site {site!r} here: take one of {', '.join(self._indexes)}")
        return self._indexes[site]

    def _model(self, site: str) -> tuple[Any, Any]:
        config = self._configs[site].harvest
        key = (config.model, config.dtype, config.revision)
        if key not in self._models:
            self._models[key] = load_model(config.model, config.dtype, self._device, **config.hub_options)
        return self._models[key]

    def _first_token(self, site: str) -> int:
        """Place of a text's first token after what is put before it."""
        return len(frame(self._model(site)[1], self._configs[site].harvest.bos).first)

    def _tokenize(self, site: str, text: str) -> tuple[list[int], list[bool]]:
        """Token ids of a text, framed as in training, and whether each is special."""
        model, tokenizer = self._model(site)
        around = frame(tokenizer, self._configs[site].harvest.bos)
        ids = [
            *around.first,
            *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            *around.last,
        ]
        limit = min(_TOKEN_LIMIT, longest_context(model.config))
        if len(ids) > limit:
            raise InputError(f"the text has {len(ids)} tokens, at most {limit} are taken: shorten it")
        special = set(tokenizer.all_special_ids)
        if all(token in special for token in ids):
            raise InputError("the text has no tokens of its own: type some words")
        return ids, [token in special for token in ids]

    def _text_tokens(self, site: str, ids: list[int], special: list[bool]) -> list[dict[str, Any]]:
        pieces = token_pieces(self._model(site)[1], sorted(set(ids)))
        return [
            {**pieces[token]._asdict(), "place": None if special[place] else place}
            for place, token in enumerate(ids)
        ]

    @torch.no_grad()
    def _activation(self, site: str, ids: list[int]) -> Tensor:
        """[L, d] activations of one text."""
        model, _ = self._model(site)
        tokens = torch.tensor([ids], device=next(model.parameters()).device)
        with collect_activations(model, [site]) as captured:
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        activation = captured[site][0].float().cpu()
        if not torch.isfinite(activation).all():
            raise InputError(f"the model gives NaN or Inf at {site} for this text: try another one")
        return activation


def _run_folders(path: Path) -> list[RunFolder]:
    if (path / "config.json").exists() or not path.is_dir():
        return [RunFolder(path)]
    folders = [RunFolder(found.parent) for found in sorted(path.glob("*/config.json"))]
    if not folders:
        raise InputError(f"{path} is no run of ndm-fast: give the folder of a finished run")
    return folders


def _row_tokens(index: PreimageIndex, row: int) -> list[dict[str, Any]]:
    """The row of text that an indexed row stands in; tokens that are indexed have its number as place."""
    sequence = int(index.place[row]) // index.context_length
    start = sequence * index.context_length
    bounds = torch.searchsorted(index.place, torch.tensor([start, start + index.context_length])).tolist()
    numbers = {int(index.place[number]) - start: number for number in range(*bounds)}
    return [
        {**index.pieces[token]._asdict(), "place": numbers.get(position)}
        for position, token in enumerate(index.tokens[sequence].tolist())
    ]


def _whole(asked: Mapping[str, str], name: str, least: int, most: int, default: int = 0) -> int:
    value = asked.get(name) or str(default)
    if not value.isascii() or not value.isdigit() or len(value) > 12 or not least <= int(value) <= most:
        raise InputError(f"{name} is {value[:20]!r}: give a whole number from {least} to {most}")
    return int(value)


def _within(value: str | None) -> float | None:
    if not value:
        return None
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number < 1e6:
        raise InputError(f"within is {value[:20]!r}: give a distance above 0, or leave it empty")
    return number


def _subspaces(value: str | None, count: int) -> tuple[int, ...]:
    if not value:
        return tuple(range(count))
    names = value.split(",")
    if len(names) > count or not all(
        name.isascii() and name.isdigit() and int(name[:9]) < count for name in names
    ):
        raise InputError(
            f"subspaces is {value[:40]!r}: give numbers from 0 to {count - 1}, with commas between"
        )
    return tuple(sorted({int(name) for name in names}))
