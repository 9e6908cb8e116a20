"""Reasons in a language model's own words, kept only where they name nothing but the evidence.

While it writes, the model is held to ways of saying it (`patterns`): it chooses words, and which of the facts
are named. Small models that are left free name something else, or nothing, nearly always. The sentence is
untrusted all the same: `grounded` is a pure check, and what fails it leaves the template's sentence in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmrec.explain.grammar import Grammar
from llmrec.explain.reasons import PINNED, common, value_text
from llmrec.prompt import Prompt
from llmrec.quiet import quiet_transformers
from llmrec.types import Reason, Recommendation

LONGEST = 240
"""Characters of a sentence, at most."""

TOKENS = 60
"""Tokens that the model may write."""

MENTIONED = 3
"""History items and shared values that the model is told of, at most."""

Facts = dict[str, str]
"""What a model is told, by slot of the prompt."""

Write = Callable[[Sequence[Facts]], Sequence[str]]
"""Writes a sentence for each set of facts."""

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


BETWEEN = "\n"
"""Between the titles and the shared values of the facts, none of which has a line end."""


def facts(one: Recommendation, reason: Reason) -> Facts:
    """What the model is told, by slot of the prompt; empty where there is nothing to tell.

    Each shared value is one of every history item that is told of, so that any of both may be named together:
    where the first ones have none in common, the first is told of alone.
    """
    history = reason.history[:MENTIONED]
    shared = common(reason.shared, history)
    if not shared and (first := common(reason.shared, history[:1])):
        history, shared = history[:1], first
    return {
        "title": one.title,
        "history": BETWEEN.join(influence.title for influence in history),
        "shared": BETWEEN.join(f"{one.name}\t{value_text(one)}" for one in shared[:MENTIONED]),
        "words": " ".join(reason.words),
    }


def evidence_of(told: Facts) -> list[str]:
    """The facts of which a sentence has to name one: titles of the history, shared values, typed words."""
    values = [fact.rpartition("\t")[2] for fact in told["shared"].split(BETWEEN)]
    return [fact for fact in (*told["history"].split(BETWEEN), *values, *told["words"].split()) if fact]


def patterns(told: Facts) -> list[list[list[str]]]:
    """Ways to say why: for each its slots, for each slot what may stand there."""
    past = [fact for fact in told["history"].split(BETWEEN) if fact]
    values = [fact.rpartition("\t")[2] for fact in told["shared"].split(BETWEEN) if fact]
    title = [" this", f" {told['title']}"]
    found = []
    if past:
        chosen = [f" {fact}" for fact in past]
        begin = [["Because", "Since", "As"], [" you chose", " you picked"], chosen]
        end = [
            [", you may", ", you might"],
            [" like", " enjoy", " be interested in"],
            title,
            ["", *(f", with {value} in common" for value in values)],
            ["."],
        ]
        found += [[*begin, *end]]
        if len(past) > 1:
            found += [[*begin, [" and"], chosen, *end]]
    if told["words"]:
        asked = [["You asked for", "You searched for"], [f" {told['words']}"], [", and"]]
        found += [[*asked, title, [" fits", " matches", " goes with it"], ["."]]]
    return found


def grounded(sentence: str, told: Facts) -> bool:
    """Whether a sentence names nothing but what was told, and something of the evidence.

    Every word must be one of the facts or one that names nothing, and some title, shared value or typed
    word must be in it: a sentence that would fit any item gives no reason.
    """
    said = _words(sentence)
    if not said or len(sentence) > LONGEST or "\n" in sentence:
        return False
    known = set(_PLAIN).union(*(_words(fact) for fact in told.values()))
    whole = f" {' '.join(said)} "
    mentioned = any(f" {' '.join(_words(fact))} " in whole for fact in evidence_of(told) if _words(fact))
    return mentioned and set(said) <= known


def worded(found: Sequence[Recommendation], write: Write) -> list[Recommendation]:
    """The same with the model's sentences where they are grounded; others keep what the template says.

    Items without a history item, shared value or matched word in evidence are not asked about, nor are those
    that the request itself put there.
    """
    result = list(found)
    asked: list[tuple[int, Reason, Facts]] = []
    for row, one in enumerate(found):
        if one.reason is not None and one.reason.sentence != PINNED:
            told = facts(one, one.reason)
            if told["history"] or told["shared"] or told["words"]:
                asked.append((row, one.reason, told))
    answers = write([told for _, _, told in asked]) if asked else []
    for (row, reason, told), answer in zip(asked, answers, strict=True):
        sentence = _first_sentence(answer)
        if grounded(sentence, told):
            result[row] = replace(result[row], reason=replace(reason, sentence=sentence, worded=True))
    return result


def prompt_of(told: Facts) -> str:
    """The prompt filled with facts; a line whose fact is empty is left out."""
    lines = Prompt.load("reason").text.splitlines()
    kept = [line for line in lines if not any(f"{{{slot}}}" in line and not told[slot] for slot in told)]
    text = "\n".join(kept)
    # In one pass: a fact that holds the name of a slot is not filled again.
    shown = {slot: fact.replace(BETWEEN, "; ").replace("\t", " ") for slot, fact in told.items()}
    return re.sub(r"\{(\w+)\}", lambda slot: shown[slot[1]], text)


class Writer:
    """A causal LM that writes sentences, without drawing: the same facts give the same words.

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

    def grammar(self, told: Facts) -> Grammar:
        """What may be written about some facts."""
        read: Any = self._tokenizer
        return Grammar(
            [
                [[read(option, add_special_tokens=False)["input_ids"] for option in slot] for slot in pattern]
                for pattern in patterns(told)
            ]
        )

    def __call__(self, told: Sequence[Facts]) -> list[str]:
        """A sentence for each set of facts, of plain words and these facts."""
        import torch

        tokenizer, prompts = self._tokenizer, [prompt_of(one) for one in told]
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
        begun, grammars = read["input_ids"].shape[1], [self.grammar(one) for one in told]
        end = tokenizer.eos_token_id

        def allowed(row: int, tokens: torch.Tensor) -> list[int]:
            return grammars[row].next(tokens[begun:].tolist()) or [end]

        with torch.inference_mode():
            written = self._model.generate(
                **read,
                max_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                prefix_allowed_tokens_fn=allowed,
            )
        new = written[:, begun:]
        answers: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
        # What was cut off may end in a full stop of a title.
        whole = [
            grammar.ended([token for token in row if token not in (end, tokenizer.pad_token_id)])
            for grammar, row in zip(grammars, new.tolist(), strict=True)
        ]
        return [answer if ended else "" for answer, ended in zip(answers, whole, strict=True)]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _first_sentence(text: str) -> str:
    """Up to the first line end; a sentence that was cut off is given up."""
    line = text.strip().split("\n", 1)[0].strip().strip('"')
    end = max(line.rfind(mark) for mark in ".!")
    return line[: end + 1].strip() if end >= 0 else ""
