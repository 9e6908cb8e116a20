"""The tuned language model as one thing: made, saved, loaded, grown with the catalogue.

There is one class a make of model: `LanguageModel` reads an item as one vector, `WordLanguageModel` in
`word_model.py` as words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmrec.adapter import HEAD, fresh_adapter, kept_adapter, on_device, read_adapter, write_adapter
from llmrec.card import Card, make_card
from llmrec.errors import ModelError
from llmrec.families import Texts
from llmrec.index.faiss_index import EXACT_UP_TO, FaissIndex
from llmrec.lora import merge
from llmrec.prompt import Prompt
from llmrec.protocols import Floats, Mask, Scorer, VectorIndex
from llmrec.recipe import HeldOut
from llmrec.score.config import ItemTokensConfig, LMConfig
from llmrec.score.engine import Engine
from llmrec.score.item_tokens import ItemTokenModel, ItemTokenScorer, Wish, instruction_tokens
from llmrec.score.loading import body_dtype, load_body, need_positions, shared_body
from llmrec.score.unseen import fit_unseen, still_late
from llmrec.score.words import WISH_TOKENS, Vocabulary
from llmrec.text import typed_words


class CachingScorer(Scorer, Protocol):
    """A scorer that keeps what it read of histories."""

    def forget(self) -> None:
        """Drop what was read."""
        ...


class TunedModel(Protocol):
    """What a recommender needs of a language model, whatever its mode.

    Attributes
    ----------
    card
        What it belongs to; None before it is trained.
    scored
        How many of the first candidates it scores; None for all.
    scores_all
        Whether it scores all candidates, so that weights can be fitted anew with its score.
    judged
        How many held-out users choose its weight, at most; None for `retrieval.lm_users`.
    proposes
        Whether its own best items join the candidates; then its scorer is a `Retriever` too.
    reads_unlisted
        Whether it scores any item that has a text, in the catalogue or not, without much ado.
    """

    card: Card | None
    scored: int | None
    scores_all: bool
    judged: int | None
    proposes: bool
    reads_unlisted: bool

    @property
    def config(self) -> LMConfig:
        """Its shape."""
        ...

    @property
    def scorer(self) -> CachingScorer:
        """Scores candidates."""
        ...

    @property
    def counts(self) -> NDArray[Any]:
        """Weight of the training events of each item, shape (items,)."""
        ...

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        ...

    def grown(self, texts: Texts) -> Self:
        """The same for a catalogue whose texts changed or grew."""
        ...

    def fresh(self) -> Self:
        """The same with nothing read; who still asks the old one leaves nothing here."""
        ...

    def recounted(self, counts: NDArray[Any]) -> Self:
        """The same model after other training events, whose weight for each item has shape (items,)."""
        ...


def load_language_model(
    folder: Path,
    base: Path,
    texts: Texts,
    data: str | None,
    *,
    trainable: bool = False,
    shares: bool = False,
    engine: Engine | None = None,
    served: str = "",
    ids: Sequence[str] | None = None,
) -> TunedModel:
    """Load what `save` wrote, of whatever mode.

    Parameters
    ----------
    base
        Folder of the causal LM; must hold the weights that the adapter was trained on.
    texts
        Of the catalogue, which may have grown since.
    data
        Fingerprint of the log; another one than it was trained on is a warning. None for any log.
    trainable
        Whether its LoRA matrices can be trained further; then it shares.
    shares
        Whether it stands on the weights of the base that others of this process share, and costs no more than
        its own size. Else its matrices are merged into weights of its own, which takes less time a request.
    engine, served
        Inference server that runs it, and its name there; None where it runs in this process.
    ids
        Of the items of the catalogue, which begins with those that it was trained on; None for no check.

    Raises
    ------
    ModelError
        If anything is missing, anything that the adapter depends on is another, or the server cannot run it.
    """
    from llmrec.remote_model import RemoteLanguageModel
    from llmrec.word_model import WordLanguageModel

    config, card, head = read_adapter(folder)
    log = card.data_sha256 if data is None else data
    card.check(make_card(config.prompt_name, base, texts.encoder.fingerprint, log, {}))
    if ids is not None:
        card.check_items(ids)
    if len(head["counts"]) > len(texts.lines):
        counted = f"{len(head['counts']):,} items, and the catalogue has {len(texts.lines):,}"
        raise ModelError(f"the adapter in {folder} knows {counted}")
    if engine is not None:
        return RemoteLanguageModel.restored(folder, base, texts, config, card, head, engine, served)
    make: Any = LanguageModel if isinstance(config, ItemTokensConfig) else WordLanguageModel
    made: TunedModel = make.restored(
        folder, base, texts, config, card, head, trainable=trainable, shares=shares or trainable
    )
    return made


class LanguageModel:
    """A model of the `item_tokens` mode with its settings and its card.

    Parameters
    ----------
    model
        With LoRA matrices in its body.
    config
        Its shape.
    wish
        How a typed wish is read; None where the prompt has no place for one.
    card
        What it belongs to; None before it is trained.
    """

    def __init__(
        self, model: ItemTokenModel, config: ItemTokensConfig, wish: Wish | None, card: Card | None = None
    ) -> None:
        self.model, self.config, self.wish, self.card = model, config, wish, card
        self.dtype = body_dtype(config.precision)
        # Too many items to score them all for each request: what serves searches an index.
        many = len(model.counts) > EXACT_UP_TO
        self.scorer = self.scorer_of(model, _indexed if many else None)
        self.scored: int | None = None
        self.scores_all = True
        self.judged: int | None = None
        self.proposes = True
        self.reads_unlisted = True

    def scorer_of(
        self, model: ItemTokenModel, index: Callable[[Floats], VectorIndex] | None = None
    ) -> ItemTokenScorer:
        """A scorer with nothing kept; it scores all items unless it is given what makes an index."""
        wish = self.wish if self.config.wishes > 0 else None
        return ItemTokenScorer(model, self.config.window, self.dtype, wish=wish, index=index)

    def typing(self, lines: Sequence[str]) -> Callable[[int, np.random.Generator], Sequence[int]]:
        """Draws what somebody might type who looks for an item, in tokens; none for a line without words."""

        def typed(item: int, rng: np.random.Generator) -> Sequence[int]:
            words = typed_words(lines[item], rng)
            return self.wish.tokens(words) if self.wish is not None and words else ()

        return typed

    def fit_unseen(self, held_out: HeldOut) -> None:
        """Fit the bias of items without training events to held-out users; see `fit_unseen`."""
        histories = [query.history for query in held_out.queries]
        fit_unseen(self.model, self.scorer_of(self.model), histories, held_out.targets)
        self.scorer.forget()

    @property
    def counts(self) -> NDArray[Any]:
        """Weight of the training events of each item, shape (items,)."""
        counts: NDArray[Any] = self.model.counts.cpu().numpy()
        return counts

    @classmethod
    def new(
        cls,
        config: ItemTokensConfig,
        base: Path,
        vectors: Floats,
        counts: NDArray[Any],
        seed: int = 0,
        late: Mask | None = None,
    ) -> LanguageModel:
        """Make a model to train: fresh LoRA matrices and head.

        Parameters
        ----------
        base
            Folder of the causal LM.
        vectors
            Text vectors of the catalogue, shape (items, dim).
        counts
            Weight of the training events of each item, shape (items,).
        late
            Whether an item comes after training, shape (items,); None for none.

        Raises
        ------
        ConfigError
            If the base model cannot read histories as long as they may be.
        """
        torch.manual_seed(seed)
        body = load_body(base, config.layers, body_dtype(config.precision))
        model, _, wish = _assemble(fresh_adapter(body, config), config, base, vectors, counts, late)
        typed = WISH_TOKENS + len(wish.tokens("")) if wish is not None else 0
        need_positions(body, len(model.instruction) + config.window + typed, "lm.window")
        return cls(model, config, wish)

    def save(self, folder: Path) -> None:
        """Write adapter, head and card into a folder; only a trained model can be."""
        head = self.model.head() | {
            "counts": self.model.counts,
            "unseen": self.model.unseen,
            "late": self.model.late,
        }
        write_adapter(folder, self.model.body, head, self.config, self.card)

    @classmethod
    def restored(
        cls,
        folder: Path,
        base: Path,
        texts: Texts,
        config: ItemTokensConfig,
        card: Card,
        head: dict[str, Tensor],
        *,
        trainable: bool = False,
        shares: bool = False,
    ) -> LanguageModel:
        """Put together what `read_adapter` read from a folder; see `load_language_model`."""
        counts = head.pop("counts").numpy()
        load = shared_body if shares else load_body
        body = load(base, config.layers, body_dtype(config.precision))
        body = kept_adapter(body, folder, trainable=trainable)
        late = head.pop("late").numpy()
        model, _, wish = _assemble(body, config, base, texts.vectors[: len(counts)], counts, late)
        unseen = head.pop("unseen")
        if set(head) != set(model.head_names):
            raise ModelError(
                f"{folder} holds no complete adapter: {HEAD} has {', '.join(sorted(head))} alone"
            )
        try:
            model.load_state_dict(head, strict=False)
        except RuntimeError as other:
            raise ModelError(f"{folder} holds no complete adapter: {other}") from other
        model.unseen.copy_(unseen)
        on_device(model)
        if not shares:
            merge(model.body)
        return cls(model, config, wish, card).grown(texts)

    def grown(self, texts: Texts) -> LanguageModel:
        """The same for a catalogue whose texts changed or grew: new items are known by their text."""
        old, vectors = self.model, texts.vectors
        counts = np.zeros(len(vectors), dtype=np.float32)
        counts[: len(old.counts)] = old.counts.cpu().numpy()
        instruction = old.instruction.tolist()
        late = np.ones(len(vectors), dtype=bool)
        late[: len(old.late)] = old.late.cpu().numpy()
        model = _model(old.body, instruction, vectors, counts, self.config, late, drawn=False)
        # Whoever ranks an item that is not listed grows the model for one request.
        model.share_head(old)
        model.unseen.copy_(old.unseen)
        made = LanguageModel(model.to(old.counts.device).eval(), self.config, self.wish, self.card)
        made.scorer.grow_from(self.scorer)
        return made

    def fresh(self) -> LanguageModel:
        """The same with nothing read; who still asks the old one leaves nothing here."""
        made = LanguageModel(self.model, self.config, self.wish, self.card)
        made.scorer.grow_from(self.scorer)
        return made

    def recounted(self, counts: NDArray[Any]) -> LanguageModel:
        """The same model after other training events: items that had none before get id vectors.

        For items that came after the earlier training see `still_late`.
        """
        old = self.model
        counted = counts.astype(np.float32)
        vectors = old.text_vectors.cpu().numpy()
        late = still_late(old.late.cpu().numpy(), self.counts, counted)
        model = _model(old.body, old.instruction.tolist(), vectors, counted, self.config, late, drawn=False)
        model.load_state_dict(old.head(), strict=False)
        model.unseen.copy_(old.unseen)
        return LanguageModel(model.to(old.counts.device).eval(), self.config, self.wish, self.card)


def _indexed(vectors: Floats) -> VectorIndex:
    """A graph over vectors, shape (items, dim)."""
    index = FaissIndex(vectors.shape[1], exact_up_to=EXACT_UP_TO)
    index.add(vectors)
    return index


def _assemble(
    body: torch.nn.Module,
    config: ItemTokensConfig,
    base: Path,
    vectors: Floats,
    counts: NDArray[Any],
    late: Mask | None,
) -> tuple[ItemTokenModel, ItemTokensConfig, Wish | None]:
    prompt = Prompt.load(config.prompt)
    wishing = "wish" in prompt.slots or config.wishes > 0
    before, line = prompt.around("history", *(["wish"] if wishing else []))
    if "\n" in line or (line and not wishing):
        raise ModelError(f"prompt {prompt.name!r}: only a line with {{wish}} may follow the history")
    words = instruction_tokens(base, before)
    wish = Wish(Vocabulary(base), line) if wishing else None
    return _model(body, words, vectors, counts, config, late), config, wish


def _model(
    body: torch.nn.Module,
    instruction: Sequence[int],
    vectors: Floats,
    counts: NDArray[Any],
    config: ItemTokensConfig,
    late: Mask | None = None,
    *,
    drawn: bool = True,
) -> ItemTokenModel:
    return ItemTokenModel(
        body,
        instruction,
        vectors,
        counts,
        config.head_dim,
        config.dropout,
        config.id_dropout,
        config.id_out_dropout,
        late,
        drawn=drawn,
    )
