"""Topic encoder: latent Dirichlet allocation over item texts, no model to download."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma

from llmrec.errors import DataError
from llmrec.protocols import Floats
from llmrec.words import VERSION, telling_words


class TopicEncoder:
    """Unit vectors from topic mixtures; fitted on the catalogue (Blei, Ng and Jordan 2003).

    The vector is the square root of the mixture, so an inner product is the Bhattacharyya coefficient of
    two mixtures: 1 if they are equal, 0 if they share no topic.

    Parameters
    ----------
    vocabulary
        Word to column.
    topics
        Word weights of each topic (pseudo-counts), shape (dim, words).
    """

    def __init__(self, vocabulary: Mapping[str, int], topics: NDArray[np.float64]) -> None:
        from sklearn.decomposition import LatentDirichletAllocation
        from sklearn.feature_extraction.text import CountVectorizer

        self.vocabulary, self.topics = dict(vocabulary), topics
        self.dim = len(topics)
        self._words: Any = CountVectorizer(**self._settings(), vocabulary=self.vocabulary)
        self._model: Any = LatentDirichletAllocation(self.dim, random_state=0)
        # What the library needs to infer mixtures: the weights, and their expectation under Dirichlet.
        self._model.n_features_in_ = topics.shape[1]
        self._model._init_latent_vars(topics.shape[1], dtype=topics.dtype)
        self._model.components_ = topics
        expected = digamma(topics) - digamma(topics.sum(axis=1, keepdims=True))
        self._model.exp_dirichlet_component_ = np.exp(expected)
        digest = hashlib.sha256(f"words {VERSION} {json.dumps(self.vocabulary, sort_keys=True)}".encode())
        digest.update(topics.tobytes())
        self.fingerprint = digest.hexdigest()

    @staticmethod
    def _settings() -> dict[str, Any]:
        return {
            "tokenizer": telling_words,
            "token_pattern": None,
            "lowercase": False,
            "stop_words": "english",
        }

    @classmethod
    def fit(cls, texts: Sequence[str], dim: int = 50, max_words: int = 20_000) -> TopicEncoder:
        """Fit on item texts.

        Raises
        ------
        DataError
            If no text holds a word.
        """
        from sklearn.decomposition import LatentDirichletAllocation
        from sklearn.feature_extraction.text import CountVectorizer

        words: Any = CountVectorizer(**cls._settings(), max_features=max_words)
        try:
            counts = words.fit_transform(texts)
        except ValueError as empty:
            raise DataError(f"the item texts hold no words to find topics in ({len(texts)} texts)") from empty
        model = LatentDirichletAllocation(dim, max_iter=10, learning_method="online", random_state=0)
        model.fit(counts)
        return cls({word: int(column) for word, column in words.vocabulary_.items()}, model.components_)

    def encode(self, texts: Sequence[str]) -> Floats:
        """Return float32 vectors of length 1 (0 where no word is known), shape (len(texts), dim)."""
        if len(texts) == 0:
            return np.zeros((0, self.dim), dtype=np.float32)
        counts = self._words.transform(texts)
        mixture = self._model.transform(counts)
        mixture[np.asarray(counts.sum(axis=1)).ravel() == 0] = 0.0
        vectors: Floats = np.sqrt(mixture).astype(np.float32)
        return vectors

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything needed to make the encoder again, as arrays without objects."""
        words = json.dumps(self.vocabulary).encode()
        return {"vocabulary": np.frombuffer(words, dtype=np.uint8), "topics": self.topics}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> TopicEncoder:
        """Make the encoder from `arrays()`."""
        return cls(json.loads(arrays["vocabulary"].tobytes()), arrays["topics"])
