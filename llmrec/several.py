"""Several tuned language models in one blend, each of another mode or training."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from llmrec.blending import OBJECTIVE, best_lm_weight, gained
from llmrec.candidates import compared, normalise, to_score, with_rest
from llmrec.card import Card
from llmrec.errors import ModelError
from llmrec.families import Texts
from llmrec.features import Features
from llmrec.language_model import CachingScorer, TunedModel, load_language_model
from llmrec.metrics import clear, per_user
from llmrec.protocols import Codes, Floats, Hits, Query, Retriever
from llmrec.recipe import HeldOut, Recipe, RetrievalConfig
from llmrec.score.config import LMConfig
from llmrec.score.engine import Engine
from llmrec.search import chosen_on

SEVERAL = "several.json"
"""File that says of an adapter's folder that it holds several, each in a folder by its number."""

REMEMBERED = 1024
"""Queries of which is kept what was proposed for them, until they are scored."""

NOTHING: Codes = np.empty(0, np.int32)

SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Shares of a further model that are tried; the one before has 1."""


@dataclass(frozen=True)
class Member:
    """One of several models.

    Parameters
    ----------
    share
        Of its score, scaled to [0, 1] among a request's candidates, in the sum of all.
    """

    model: TunedModel
    share: float


class SeveralScorer:
    """The sum of what several models say, each scaled to [0, 1] among a request's candidates.

    Candidates come as the merge ordered them: a model that reads words scores the first ones and what it has
    proposed for the query, as it does alone, and the others get its lowest score. Since `score` scales each
    query by itself, what it says of two queries is comparable in its order alone; see `compared`.
    """

    name = "lm"

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self.proposing = next((member for member in members if member.model.proposes), None)
        # By the identity of a query, which is kept so that no other one has it.
        self._proposed: OrderedDict[int, tuple[Query, Codes]] = OrderedDict()
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Drop what was read of histories."""
        for member in self.members:
            member.model.scorer.forget()
        with self._lock:
            self._proposed.clear()

    def score(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        """The weighted sum for each candidate of each query."""
        totals = [np.zeros(len(items), np.float32) for items in candidates]
        for member in self.members:
            rows = [self._rows(member, query, own) for query, own in zip(queries, candidates, strict=True)]
            asked = [items[own] for items, own in zip(candidates, rows, strict=True)]
            scores = member.model.scorer.score(queries, asked)
            for total, own, values in zip(totals, rows, scores, strict=True):
                total += np.float32(member.share) * normalise(with_rest(values, own, len(total)))
        with self._lock:
            for query in queries:
                self._proposed.pop(id(query), None)
        return totals

    def compared(self, queries: Sequence[Query], items: Codes) -> list[Floats]:
        """Scores of the same items for several queries: each model on the scale of the first query."""
        total = np.zeros((len(queries), len(items)), np.float32)
        for member in self.members:
            own = to_score(np.zeros(len(items), np.int32), member.model.scored)
            found = compared(member.model.scorer, queries, items[own])
            rows = [with_rest(values, own, len(items)) for values in found]
            total += np.float32(member.share) * np.stack([normalise(row, rows[0]) for row in rows])
        return list(total)

    def _rows(self, member: Member, query: Query, items: Codes) -> NDArray[np.int64]:
        """Which candidates a member scores."""
        ranks = np.zeros(len(items), np.int32)
        if member is self.proposing:
            with self._lock:
                _, own = self._proposed.get(id(query), (query, NOTHING))
            rank_of = {code: rank for rank, code in enumerate(own.tolist(), start=1)}
            ranks[:] = [rank_of.get(code, 0) for code in items.tolist()]
        return to_score(ranks, member.model.scored)

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """The best items of the first model that proposes any."""
        assert self.proposing is not None
        found = cast(Retriever, self.proposing.model.scorer).retrieve(queries, k)
        with self._lock:
            self._proposed |= {id(q): (q, hits.items) for q, hits in zip(queries, found, strict=True)}
            while len(self._proposed) > max(REMEMBERED, len(queries)):
                self._proposed.popitem(last=False)
        return found


class SeveralModels:
    """Several tuned models as one.

    Parameters
    ----------
    members
        Two or more on one base, in the order in which they were added.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        models = [member.model for member in members]
        self.scorer: CachingScorer = SeveralScorer(members)
        scored = [model.scored for model in models]
        self.scored: int | None = None if None in scored else max(n for n in scored if n is not None)
        self.scores_all = all(model.scores_all for model in models)
        judged = [model.judged for model in models if model.judged is not None]
        self.judged = min(judged) if judged else None
        self.proposes = any(model.proposes for model in models)
        self.reads_unlisted = all(model.reads_unlisted for model in models)

    @property
    def config(self) -> LMConfig:
        """Shape of the first one."""
        return self.members[0].model.config

    @property
    def card(self) -> Card | None:
        """That of the latest one, on which is noted what all bring together."""
        return self.members[-1].model.card

    @card.setter
    def card(self, card: Card | None) -> None:
        self.members[-1].model.card = card

    @property
    def counts(self) -> NDArray[Any]:
        """Weight of the training events of each item, shape (items,)."""
        return self.members[0].model.counts

    def save(self, folder: Path) -> None:
        """Write each into a folder of its own, and their shares."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, member in enumerate(self.members):
            member.model.save(folder / str(number))
        shares = {"shares": [member.share for member in self.members]}
        (folder / SEVERAL).write_text(json.dumps(shares), encoding="utf-8")

    def grown(self, texts: Texts) -> SeveralModels:
        """The same for a catalogue whose texts changed or grew."""
        return SeveralModels([Member(m.model.grown(texts), m.share) for m in self.members])

    def fresh(self) -> SeveralModels:
        """The same with nothing read; who still asks the old one leaves nothing here."""
        return SeveralModels([Member(m.model.fresh(), m.share) for m in self.members])

    def recounted(self, counts: NDArray[Any]) -> SeveralModels:
        """The same models after other training events, whose weight for each item has shape (items,)."""
        return SeveralModels([Member(m.model.recounted(counts), m.share) for m in self.members])


def load_models(
    folder: Path,
    base: Path,
    texts: Texts,
    data: str | None,
    *,
    shares: bool = False,
    engine: Engine | None = None,
    served: str = "",
    ids: Sequence[str] | None = None,
) -> TunedModel:
    """Load what `save` of one model, or of several, wrote; see `load_language_model`.

    Raises
    ------
    ModelError
        As there, if what says how many there are is damaged, or if several should run on one server.
    """
    path = folder / SEVERAL
    if not path.is_file():
        return load_language_model(
            folder, base, texts, data, shares=shares, engine=engine, served=served, ids=ids
        )
    if engine is not None:
        raise ModelError(
            f"{folder} holds several language models, and an inference server runs one: unset engine.url and "
            f"LLMREC_ENGINE_URL, or tune one"
        )
    try:
        weights = [float(share) for share in json.loads(path.read_text(encoding="utf-8"))["shares"]]
    except (OSError, ValueError, KeyError, TypeError) as broken:
        raise ModelError(f"{path} is damaged: {broken!r}") from broken
    models = [
        load_language_model(folder / str(number), base, texts, data, shares=shares, ids=ids)
        for number in range(len(weights))
    ]
    return SeveralModels([Member(model, weight) for model, weight in zip(models, weights, strict=True)])


class Remembered:
    """A model whose answers to the same candidates are not computed again."""

    def __init__(self, model: TunedModel) -> None:
        self.model, self.scorer = model, self
        self.scored, self.proposes = model.scored, model.proposes
        self._scores: dict[tuple[bytes, str, bytes], Floats] = {}
        self._hits: list[Hits] | None = None

    def score(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        """Scores of the candidates of each query."""
        keys = [
            (q.history.tobytes(), q.text, items.tobytes())
            for q, items in zip(queries, candidates, strict=True)
        ]
        rows = [row for row, key in enumerate(keys) if key not in self._scores]
        found = self.model.scorer.score([queries[i] for i in rows], [candidates[i] for i in rows])
        self._scores |= {keys[row]: scores for row, scores in zip(rows, found, strict=True)}
        return [self._scores[key] for key in keys]

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """The model's own best items for queries that are the same each time."""
        if self._hits is None:
            self._hits = cast(Retriever, self.model.scorer).retrieve(queries, k)
        return self._hits


def beside(
    earlier: TunedModel,
    new: TunedModel,
    recipe: Recipe,
    retrievers: Mapping[str, Retriever],
    held_out: HeldOut,
    config: RetrievalConfig,
) -> tuple[TunedModel, dict[str, Any]]:
    """Whether a further model joins the one before, takes its place, or is left out; and what says so.

    By cross-fitting over users: the way, the share and the weight that are best in NDCG@10 on one half are
    judged on the other, and have to beat the model before, with the best weight for it, by more than twice
    the standard error of the gain. Neither model nor `retrievers` may have been trained on `held_out`.
    """
    judged = [model.judged for model in (earlier, new) if model.judged is not None]
    entry: dict[str, Any] = {"search": f"language model, {new.config.mode} beside what was there"}
    if not len(held_out.targets):
        return earlier, {**entry, "judged": 0, "gain": 0.0, "standard_error": 0.0, "chosen": "earlier"}
    part = held_out.sample(config.lm_users, config.seed)
    entry = chosen_on(entry["search"], part)
    part = part.sample(min([config.lm_users, *judged]), config.seed).with_history()
    weights = recipe.history.with_lm(0.0)
    used = [name for name in recipe.settings if weights.ever_uses(name)]
    hits = {n: retrievers[n].retrieve(part.queries, config.depth) for n in used}
    before = earlier.members if isinstance(earlier, SeveralModels) else (Member(earlier, 1.0),)
    known = [(cast(TunedModel, Remembered(m.model)), m.share) for m in before]
    added = cast(TunedModel, Remembered(new))

    def blended(share_before: float, share: float) -> Features:
        shares = [*((model, share_before * own) for model, own in known), (added, share)]
        members = [Member(model, own) for model, own in shares if own > 0]
        scorer = SeveralScorer(members)
        proposes = any(member.model.proposes for member in members)
        proposed = scorer.retrieve(part.queries, config.depth) if proposes else None
        return Features.with_lm(hits, proposed, scorer, part, weights)

    ways = {"earlier": (1.0, 0.0), "new": (0.0, 1.0)} | {f"both, {s:g}": (1.0, s) for s in SHARES}
    features = {name: blended(*shares) for name, shares in ways.items()}

    def fitted(names: Sequence[str], rows: NDArray[np.int64]) -> tuple[str, float, dict[str, float]]:
        """The best of some ways on some users, its weight, and NDCG@10 of each way with the best weight."""
        found = {name: best_lm_weight(features[name].take(rows), weights) for name in names}
        means = {name: values[weight] for name, (values, weight) in found.items()}
        best = max(names, key=lambda name: round(means[name], 7))
        return best, found[best][1], means

    half = np.random.default_rng(config.seed).permutation(len(part.targets)) % 2
    gain = np.zeros(len(half))
    new_ways = [name for name in ways if name != "earlier"]
    for side in (0, 1):
        own, rest = np.flatnonzero(half == side), np.flatnonzero(half != side)
        for names, sign in ((new_ways, 1.0), (["earlier"], -1.0)):
            name, weight, _ = fitted(names, rest)
            ranks = features[name].take(own).of_targets(weights.with_lm(weight))
            gain[own] += sign * per_user(ranks, OBJECTIVE)
    best, _, means = fitted(list(ways), np.arange(len(half)))
    taken = best != "earlier" and clear(gain)
    entry |= {
        "judged": len(part.targets),
        OBJECTIVE: {name: round(value, 5) for name, value in means.items()},
        **gained(gain),
        "chosen": best if taken else "earlier",
    }
    if not taken:
        return earlier, entry
    if best == "new":
        return new, entry
    return SeveralModels([*before, Member(new, ways[best][1])]), entry
