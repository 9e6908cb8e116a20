"""Light text encoder: TF-IDF and truncated SVD (latent semantic analysis), no model to download."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.errors import DataError
from llmrec.protocols import Floats
from llmrec.words import VERSION, words_in


class LightEncoder:
    """Unit vectors from word and word-pair counts; fitted on the catalogue (Deerwester et al. 1990).

    Parameters
    ----------
    vocabulary
        Term to column.
    idf
        Inverse document frequency of each column, shape (terms,).
    components
        Right singular vectors, shape (dim, terms).
    """

    def __init__(self, vocabulary: Mapping[str, int], idf: Floats, components: Floats) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.vocabulary, self.idf, self.components = dict(vocabulary), idf, components
        self.dim = int(components.shape[0])
        self._terms: Any = TfidfVectorizer(**self._settings(), vocabulary=self.vocabulary)
        self._terms.idf_ = idf.astype(np.float64)
        digest = hashlib.sha256(f"words {VERSION} {json.dumps(self.vocabulary, sort_keys=True)}".encode())
        digest.update(idf.tobytes() + components.tobytes())
        self.fingerprint = digest.hexdigest()

    @staticmethod
    def _settings() -> dict[str, Any]:
        return {
            "tokenizer": words_in,
            "token_pattern": None,
            "lowercase": False,
            "ngram_range": (1, 2),
            "sublinear_tf": True,
            "dtype": np.float32,
        }

    @classmethod
    def fit(cls, texts: Sequence[str], dim: int = 128, max_terms: int = 50_000) -> LightEncoder:
        """Fit on item texts; `dim` falls to what the texts can fill.

        Raises
        ------
        DataError
            If no text holds a word.
        """
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        terms: Any = TfidfVectorizer(**cls._settings(), max_features=max_terms)
        try:
            counts = terms.fit_transform(texts)
        except ValueError as empty:
            raise DataError(f"the item texts hold no words to encode ({len(texts)} texts)") from empty
        components: Floats = np.ones((1, 1), dtype=np.float32)
        # The library refuses a single term, for which there is nothing to decompose.
        if counts.shape[1] > 1:
            with np.errstate(invalid="ignore"):  # its share of variance is 0 / 0 if all texts are equal
                svd = TruncatedSVD(n_components=min(dim, *counts.shape), random_state=0).fit(counts)
            components = svd.components_.astype(np.float32)
        vocabulary = {term: int(column) for term, column in terms.vocabulary_.items()}
        return cls(vocabulary, terms.idf_.astype(np.float32), components)

    def encode(self, texts: Sequence[str]) -> Floats:
        """Return float32 vectors of length 1 (0 where no term is known), shape (len(texts), dim)."""
        if len(texts) == 0:
            return np.zeros((0, self.dim), dtype=np.float32)
        vectors: Floats = (self._terms.transform(texts) @ self.components.T).astype(np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        # A text whose terms the components leave out has a length of rounding errors, not a direction.
        known = lengths > 1e-5
        return np.where(known, vectors / np.where(known, lengths, np.float32(1.0)), np.float32(0.0))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything needed to make the encoder again, as arrays without objects."""
        terms = json.dumps(self.vocabulary).encode()
        return {
            "vocabulary": np.frombuffer(terms, dtype=np.uint8),
            "idf": self.idf,
            "components": self.components,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> LightEncoder:
        """Make the encoder from `arrays()`."""
        vocabulary = json.loads(arrays["vocabulary"].tobytes())
        return cls(vocabulary, arrays["idf"], arrays["components"])
