"""Scorers: a language model reads the history and says how likely each candidate is next."""
