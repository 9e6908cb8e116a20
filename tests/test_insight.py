"""What the report adds to the means, and that its page says what was measured."""

import html
import re

import numpy as np
import pytest

from llmrec.evaluation.insight import Example, ceiling, differences, order_bias
from llmrec.evaluation.report import render
from llmrec.metrics import compare, per_user
from llmrec.protocols import Query


def test_the_ceiling_is_the_share_of_targets_among_the_first():
    ranks = np.array([1, 20, 21, 50, 99, 0, 100, 3])
    expected = {"10": 2 / 8, "20": 3 / 8, "50": 5 / 8, "100": 7 / 8}
    assert ceiling(ranks) == pytest.approx(expected)


def test_segment_differences_are_means_over_their_users_and_agree_with_the_whole():
    rng = np.random.default_rng(0)
    ranks = {name: rng.integers(0, 30, 400) for name in "ab"}
    first = rng.random(400) < 0.3
    found = differences(ranks, {"all": np.ones(400, bool), "first": first, "rest": ~first}, "a", "b")
    whole = compare(ranks, "a", "b")
    assert found["all"]["difference"] == pytest.approx(whole.difference)
    assert found["all"]["ci95"] == pytest.approx([whole.low, whole.high], abs=0.005)
    values = per_user(ranks["a"], "ndcg@10") - per_user(ranks["b"], "ndcg@10")
    assert found["first"]["difference"] == pytest.approx(values[first].mean())
    assert found["first"]["users"] + found["rest"]["users"] == 400
    few = np.arange(400) < 9
    assert differences(ranks, {"few": few}, "a", "b") == {}, "resampling nine users says nothing"
    alike = {"a": ranks["a"], "b": ranks["a"]}
    assert differences(alike, {"all": np.ones(400, bool)}, "a", "b") == {}, "nor does who has the same"


class ByItem:
    """Scores an item by itself."""

    def score(self, queries, candidates):
        return [np.sin(items.astype(np.float32)) for items in candidates]


class ByPlace:
    """Prefers what is given first."""

    def score(self, queries, candidates):
        return [-np.arange(len(items), dtype=np.float32) for items in candidates]


def test_order_bias_is_none_for_what_sees_items_alone_and_whole_for_what_sees_places_alone():
    rng = np.random.default_rng(1)
    queries = [Query() for _ in range(40)]
    candidates = [rng.permutation(100)[:8].astype(np.int32) for _ in queries]
    fair = order_bias(ByItem(), queries, candidates)
    assert fair["largest_change"] == fair["top_changes"] == 0
    assert np.mean(fair["mean_rank_by_position"]) == pytest.approx(4.5, abs=1e-3)
    assert np.ptp(fair["mean_rank_by_position"]) < 1.5
    unfair = order_bias(ByPlace(), queries, candidates)
    assert unfair["mean_rank_by_position"] == list(range(1, 9))
    # One time in eight the first one stays first.
    assert unfair["top_changes"] == pytest.approx(7 / 8, abs=0.08)
    assert order_bias(ByItem(), [], [])["users"] == 0


def result(weight, difference, low, high, typed=0.0):
    measures = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr@10", "recall@20")
    values = {"ease": 0.0711, "merge": 0.0812, "lm": 0.0613, "default": 0.0812 + difference}
    systems = {name: dict.fromkeys(measures, value) for name, value in values.items()}
    compared = {
        "a": "default",
        "b": "merge",
        "metric": "ndcg@10",
        "difference": difference,
        "ci95": [low, high],
        "shown": low > 0 or high < 0,
        "verdict": "" if low > 0 or high < 0 else ": no difference shown",
    }
    timed = {"single_seconds": 0.0123, "repeated_seconds": 0.001, "batch32_seconds_per_request": 0.0045}
    return {
        "dataset": {"users": 1234, "items": 99, "events": 5678},
        "protocol": {
            "part": "test",
            "split": "leave-last",
            "ranking": "full catalogue",
            "users": 1234,
            "seen_items": "excluded",
        },
        "leaks": {"checked": ["split"], "unchecked": []},
        "systems": systems,
        "comparisons": [compared],
        "recipe": {
            "history": {"retrievers": {"ease": 1.0}, "lm": weight},
            "query": {"retrievers": {"bm25": 1.0}, "lm": typed},
        },
        "search": {
            "known_item": {
                "systems": {"merge": {"ndcg@10": 0.55}, "default": {"ndcg@10": 0.57}},
                "comparisons": [{"difference": 0.02, "ci95": [0.01, 0.03], "verdict": ""}],
            },
            "attribute": {"systems": {"merge": {"ndcg@10": 0.98}, "default": {"ndcg@10": 0.91}}},
        },
        "training": {"seconds": 600, "events_per_second": 1000},
        "latency": {"merge": timed, "blend": timed},
        "environment": {"machine": "a machine"},
        "peak_memory_mb": 100,
        "segments": {"history 1-4": {"users": 1234, "systems": systems}},
        "beyond": {"merge": {"coverage@10": 0.5}},
        "probabilities": {},
        "reliability": {},
        "seconds": {},
        "config": {},
    }


@pytest.mark.parametrize(
    ("weight", "difference", "low", "high", "words"),
    [
        (2.0, 0.0041, 0.0012, 0.0070, "Yes."),
        (2.0, 0.0008, -0.0013, 0.0029, "Not shown."),
        (2.0, -0.0050, -0.0080, -0.0020, "No."),
        (0.0, 0.0, 0.0, 0.0, "No, not after 10 minutes of training."),
        # One of several comparisons, which such an interval would not survive, whatever its sign.
        (2.0, 0.0040, 0.0002, 0.0078, "Not shown."),
        (2.0, -0.0040, -0.0078, -0.0002, "Not shown."),
    ],
)
def test_the_verdict_follows_from_the_interval(weight, difference, low, high, words):
    measured = result(weight, difference, low, high)
    if min(abs(low), abs(high)) == 0.0002:
        measured["comparisons"][0]["verdict"] = ": not shown among all comparisons of this run"
    page = render(measured)
    answer = re.search(r'id="answer">(.*?)</p>', page).group(1)
    assert answer.startswith(f"<b>{words}</b>")
    if weight:
        assert f"{difference:+.4f} [{low:+.4f}, {high:+.4f}]" in answer


def test_what_was_chosen_on_the_reported_events_gets_no_verdict():
    measured = result(2.0, 0.0041, 0.0012, 0.0070)
    measured["protocol"]["part"] = "validation"
    page = render(measured)
    answer = re.search(r'id="answer">(.*?)</p>', page).group(1)
    assert answer.startswith("<b>Not judged.</b>") and "upper estimate" in answer
    assert "what was checked has not seen" not in page and "what was checked has not seen" in render(
        result(2.0, 0.0041, 0.0012, 0.0070)
    )


def test_the_time_of_all_models_counts_and_no_order_is_judged_where_there_was_none():
    measured = result(0.0, 0.0, 0.0, 0.0)
    measured["training"]["beside"] = [{"mode": "yes_no", "seconds": 300}]
    measured["order_bias"] = {"users": 0, "largest_change": 0.0}
    page = render(measured)
    assert "not after 15 minutes of training" in page and "Training took 15.0 minutes, yes_no beside" in page
    assert "order bias" not in page.lower()


def test_a_model_that_only_pays_where_words_are_typed_is_not_said_to_be_left_out_everywhere():
    page = render(result(0.0, 0.0, 0.0, 0.0, typed=0.3))
    answer = re.search(r'id="answer">(.*?)</p>', page).group(1)
    assert "for lists by history" in answer
    assert "0.5700, and at 0.5500 without it (+0.0200 [+0.0100, +0.0300])" in answer
    assert "0.9100, and at 0.9800 without it" in answer, "what it costs where an attribute is typed"
    page = render(result(0.0, 0.0, 0.0, 0.0))
    assert "takes part" not in page and "What is served less retrieval: (+0.0200" in page


def test_the_page_says_the_numbers_loads_nothing_and_keeps_titles_text():
    hostile = '<img src=x onerror="alert(1)">'
    example = Example([hostile, "Alien"], "Aliens", {"merge": [hostile, "Aliens"]}, {"merge": 2})
    page = render(result(2.0, 0.0041, 0.0012, 0.0070), [example], "llmrec evaluate --items 'a&b'")
    assert "<script" not in page
    assert not re.search(r"(src|href)\s*=|https?://|url\(", page.replace(html.escape(hostile), ""))
    assert hostile not in page
    assert page.count(html.escape(hostile)) == 2
    for number in ("0.0711", "0.0812", "0.0613", "0.0853", "12.3", "4.5", "12 s / 4 s", "1,234 users"):
        assert number in page, number
    assert "<mark>Aliens</mark>" in page
    assert html.escape("--items 'a&b'") in page
    cells = re.findall(r"<t[dh]", page)
    assert len(cells) == len(re.findall(r"</t[dh]>", page))
