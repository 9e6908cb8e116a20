"""Reasons: evidence from leaving history items out, and the sentence that names it."""
