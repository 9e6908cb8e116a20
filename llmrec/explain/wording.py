"""Reasons in a language model's own words, kept only where they name nothing but the evidence.

The model's sentence is untrusted: `grounded` is a pure check, and what fails it leaves the template's
sentence in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmrec.prompt import Prompt
from llmrec.quiet import quiet_transformers
from llmrec.types import Reason, Recommendation

LONGEST = 240
"""Characters of a sentence, at most."""

TOKENS = 60
"""Tokens that the model may write."""

MENTIONED = 3
"""History items and shared values that the model is told of, at most."""

Write = Callable[[Sequence[str]], Sequence[str]]
"""Continues prompts; one answer each."""

_WORD = re.compile(r"[^\W_]+")
# Words that name nothing. A sentence made of these and of words of the evidence can claim no other thing.
_PLAIN = frozenset(
    _WORD.findall(
        "a about also an and another are as asked at based be because been both but by can chose "
        "chosen common could do enjoy enjoyed enjoying fan fans find fit fits for from go goes good "
        "has have here if in interest interested interests is it its just kind like liked likely "
        "likes looking love loved loves match matches may might more of on or other others past "
        "person pick picked picks recommend recommended recommending right same searched seem seems "
        "share shared shares sharing similar since so some something style suggest suggested than "
        "that the their them these they this those to too was watched we well were what which who "
        "will with words would you your "
    )
)


def facts(one: Recommendation, reason: Reason) -> dict[str, str]:
    """What the model is told, by slot of the prompt; empty where there is nothing to tell."""
    return {
        "title": one.title,
        "history": "; ".join(influence.title for influence in reason.history[:MENTIONED]),
        "shared": "; ".join(f"{shared.name} {shared.value}" for shared in reason.shared[:MENTIONED]),
        "words": " ".join(reason.words),
    }


def grounded(sentence: str, told: dict[str, str]) -> bool:
    """Whether a sentence names nothing but what was told, and something of the evidence.

    Every word must be one of the facts or one that names nothing, and some title, shared value or typed
    word must be in it: a sentence that would fit any item gives no reason.
    """
    said = _words(sentence)
    if not said or len(sentence) > LONGEST or "\n" in sentence:
        return False
    known = set(_PLAIN).union(*(_words(fact) for fact in told.values()))
    evidence = [fact for slot in ("history", "shared", "words") for fact in told[slot].split("; ")]
    whole = " ".join(said)
    mentioned = any(f" {' '.join(_words(fact))} " in f" {whole} " for fact in evidence if _words(fact))
    values = [fact.split(" ", 1)[-1] for fact in told["shared"].split("; ") if fact]
    mentioned = mentioned or any(f" {' '.join(_words(value))} " in f" {whole} " for value in values)
    return mentioned and set(said) <= known


def worded(found: Sequence[Recommendation], write: Write) -> list[Recommendation]:
    """The same with the model's sentences where they are grounded; others keep what the template says.

    Items without a history item, shared value or matched word in evidence are not asked about.
    """
    result = list(found)
    asked: list[tuple[int, Reason, dict[str, str]]] = []
    for row, one in enumerate(found):
        if one.reason is not None:
            told = facts(one, one.reason)
            if told["history"] or told["shared"] or told["words"]:
                asked.append((row, one.reason, told))
    answers = write([prompt_of(told) for _, _, told in asked]) if asked else []
    for (row, reason, told), answer in zip(asked, answers, strict=True):
        sentence = _first_sentence(answer)
        if grounded(sentence, told):
            result[row] = replace(result[row], reason=replace(reason, sentence=sentence, worded=True))
    return result


def prompt_of(told: dict[str, str]) -> str:
    """The prompt filled with facts; a line whose fact is empty is left out."""
    lines = Prompt.load("reason").text.splitlines()
    kept = [line for line in lines if not any(f"{{{slot}}}" in line and not told[slot] for slot in told)]
    text = "\n".join(kept)
    # In one pass: a fact that holds the name of a slot is not filled again.
    return re.sub(r"\{(\w+)\}", lambda slot: told[slot[1]], text)


class Writer:
    """A causal LM that continues prompts, without drawing: the same prompts give the same words.

    Parameters
    ----------
    folder
        Of the model; one with a chat template is asked by it, any other continues the text.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with quiet_transformers():
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, padding_side="left"
            )
            # Weights are kept in a type that says little on a processor that does not multiply it.
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=False
            ).eval()
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """What the model writes after each prompt."""
        import torch

        tokenizer = self._tokenizer
        if tokenizer.chat_template:
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
                for prompt in prompts
            ]
        else:
            texts = [f"{prompt}\nWhy: " for prompt in prompts]
        read = tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=not tokenizer.chat_template
        )
        with torch.inference_mode():
            written = self._model.generate(
                **read, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        new = written[:, read["input_ids"].shape[1] :]
        answers: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _first_sentence(text: str) -> str:
    """Up to the first line end; a sentence that was cut off is given up."""
    line = text.strip().split("\n", 1)[0].strip().strip('"')
    end = max(line.rfind(mark) for mark in ".!")
    return line[: end + 1].strip() if end >= 0 else ""
