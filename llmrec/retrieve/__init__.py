"""Retrievers: each proposes candidates from history or query."""
