"""Offline evaluation: splits and full-ranking runs."""
