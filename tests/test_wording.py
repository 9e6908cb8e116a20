"""Reasons in a model's own words: kept where they name nothing but the evidence, else the template's."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec import Recommender
from llmrec.errors import RequestError
from llmrec.explain.grammar import Grammar
from llmrec.explain.wording import Writer, evidence_of, facts, grounded, patterns, prompt_of, worded
from llmrec.testing import tiny_lm, toy_data
from llmrec.types import Influence, Item, Reason, Recommendation, Shared

REASON = Reason(
    "Because you chose it.",
    (Influence("1", "Alien", 0.5), Influence("2", "Blade Runner", 0.2)),
    (Shared("genres", "Science Fiction", ("1", "2")), Shared("year", 1986, ("2",))),
    ("space",),
)
FOUND = Recommendation(Item("3", "Aliens"), 1, 1.0, (), REASON)


class Scripted:
    """Answers what it was told to, and remembers what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, told):
        self.asked += [prompt_of(one) for one in told]
        return self.answers[: len(told)]


@pytest.mark.parametrize(
    "sentence",
    [
        "Since you liked Alien, you may enjoy Aliens.",
        "Aliens is Science Fiction like Blade Runner.",
        "You asked for space, and Aliens fits.",
        "If you love science fiction, Aliens is for you.",
    ],
)
def test_a_sentence_made_of_the_evidence_is_kept(sentence):
    kept = worded([FOUND], Scripted(sentence))[0].reason
    assert (kept.sentence, kept.worded) == (sentence, True)
    assert kept.history == REASON.history


@pytest.mark.parametrize(
    "sentence",
    [
        "Since you liked Alien, you will love Ridley Scott.",  # a name nobody gave
        "Alien and Aliens won seven awards.",
        "You may like this a lot because it is for you.",  # fits anything
        "Aliens is recommended to you.",  # names the item alone
        "Since you liked Alien and Blade",  # cut off
        "Since you liked Alien, from 1979, you may like Aliens.",  # another year
        "",
        "Since you liked Alien. " * 30,
        "Alien " * 100 + ".",
    ],
)
def test_what_claims_more_or_nothing_leaves_the_template(sentence):
    assert worded([FOUND], Scripted(sentence)) == [FOUND]


def test_only_the_first_line_counts_and_the_prompt_holds_the_facts_and_no_empty_ones():
    writer = Scripted("Since you liked Alien, you may like Aliens.\nAnd Ridley Scott made it.")
    assert worded([FOUND], writer)[0].reason.worded
    (asked,) = writer.asked
    for fact in ("Aliens", "Alien; Blade Runner", "genres Science Fiction", "space"):
        assert fact in asked
    assert "1986" not in asked, "not of all that it is told of"
    without = Recommendation(FOUND.item, 1, 1.0, (), Reason("x", REASON.history))
    told = facts(without, without.reason)
    assert "asked for" not in prompt_of(told)
    assert "In common" not in prompt_of(told)


def test_a_title_that_names_a_slot_fills_nothing():
    odd = Recommendation(Item("3", "The {history} {title}"), 1, 1.0, (), REASON)
    assert "The {history} {title}" in prompt_of(facts(odd, REASON))
    assert not grounded("Since you liked Alien", {"title": "", "history": "", "shared": "", "words": ""})


def test_reasons_without_evidence_and_pins_are_not_asked_about():
    bare = Recommendation(Item("4", "Heat"), 1, 1.0, (), Reason("Popular with others."))
    pin = Recommendation(Item("5", "Ronin"), 2, 1.0, (), Reason("Pinned by the request.", REASON.history))
    writer = Scripted()
    assert worded([bare, pin], writer) == [bare, pin]
    assert not writer.asked


def test_a_value_is_named_beside_the_titles_alone_that_have_it():
    drama, year = Shared("genres", "Drama", ("2",)), Shared("year", 1979.0, ("1",))
    told = facts(FOUND, Reason("", REASON.history, (drama, year)))
    assert (told["history"], told["shared"]) == ("Alien", "year\t1979")
    none = facts(FOUND, Reason("", REASON.history, (drama,)))
    assert (none["history"], none["shared"]) == ("Alien\nBlade Runner", "")
    assert not grounded("Because you chose Alien, you may like this, with Drama in common.", none)


def test_a_recommender_phrases_with_a_real_model_and_keeps_what_is_true(tmp_path):
    base = tiny_lm(tmp_path / "lm")
    items, events = toy_data()
    rec = Recommender.fit(items, events, {"encoder": {"name": "light"}, "lm": {"base": str(base)}})
    plain = rec.recommend(user=events[0].user_id, k=4)
    with pytest.raises(RequestError, match="explain=True"):
        rec.phrase(plain)
    found = rec.recommend(user=events[0].user_id, k=4, explain=True)
    # A random model writes nothing that it was not told.
    phrased, told = rec.phrase(found), [facts(one, one.reason) for one in found]
    for before, after, known in zip(found, phrased, told, strict=True):
        assert after == before or (after.reason.worded and grounded(after.reason.sentence, known))
    writer = Writer(base)
    assert writer(told[1:2]) == writer(told)[1:2], "the same, whatever else is asked"


def test_a_sentence_that_is_cut_off_inside_a_title_is_given_up(tmp_path, monkeypatch):
    writer = Writer(tiny_lm(tmp_path / "lm"))
    long = "Cream 1.7 fl. oz. " + "very long " * 30
    told = {"title": long, "history": long, "shared": "", "words": ""}
    monkeypatch.setattr("llmrec.explain.wording.TOKENS", 40)
    assert writer([told]) == [""]
    short = {"title": "Heat", "history": "Ronin", "shared": "", "words": ""}
    monkeypatch.setattr("llmrec.explain.wording.TOKENS", 400)
    (sentence,) = writer([short])
    assert sentence.endswith(".") and grounded(sentence, short)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_drawn_from_the_grammar_is_a_sentence_of_it_and_all_can_be_drawn(data):
    token = st.integers(0, 2)
    option = st.lists(token, max_size=3).map(tuple)
    slot = st.lists(option, min_size=1, max_size=3)
    patterns = data.draw(st.lists(st.lists(slot, min_size=1, max_size=3), min_size=1, max_size=2))
    grammar = Grammar(patterns)
    # Naively: all sentences, written out.
    sentences = {
        tuple(itertools.chain(*chosen))
        for pattern in patterns
        for chosen in itertools.product(*pattern)
        if len({c for c in chosen if c}) == sum(bool(c) for c in chosen)
    }
    reached, begun = set(), [()]
    while begun:
        written = begun.pop()
        if grammar.ended(written):
            reached.add(written)
        begun += [(*written, following) for following in grammar.next(written)]
    assert reached == sentences


def test_every_way_to_say_it_is_grounded_and_reads_as_a_sentence():
    told = facts(FOUND, REASON)
    for pattern in patterns(told):
        for chosen in itertools.product(*pattern):
            sentence = "".join(chosen)
            assert grounded(sentence, told), sentence
            assert sentence[0].isupper() and sentence.endswith(".") and "  " not in sentence
    assert patterns({"title": "A", "history": "", "shared": "", "words": ""}) == []


def test_a_title_with_a_semicolon_is_one_title():
    whole = "Dr. Strangelove; or, How I Learned to Stop Worrying"
    told = facts(
        FOUND, Reason("", (Influence("1", whole, 1.0),), (Shared("release year", "A; B", ("1",)),), ())
    )
    assert evidence_of(told) == [whole, "A; B"]
    assert not grounded("Because you chose Dr. Strangelove, you may like this.", told)
    assert "release year A; B" in prompt_of(told) and whole in prompt_of(told)
