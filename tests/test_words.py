"""The word modes: equal to naive scoring one by one, for models of different make and tokenizer."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.adapter import fresh_adapter, read_adapter
from llmrec.card import make_card
from llmrec.errors import ConfigError, DataError, ModelError
from llmrec.families import Texts
from llmrec.prompt import Prompt
from llmrec.protocols import Query
from llmrec.score import packed
from llmrec.score.config import TrainingConfig, WordsConfig
from llmrec.score.labels import LettersScorer, YesNoScorer, yes_no_labels
from llmrec.score.likelihood import LikelihoodModel, LikelihoodScorer
from llmrec.score.line_tasks import lines_task
from llmrec.score.lines import TokenLines
from llmrec.score.loading import load_causal, shared_causal
from llmrec.score.packed import PackedReader, forward
from llmrec.score.tasks import Choice, ListwiseTask
from llmrec.score.trie import ROOT, ItemTrie, Tree
from llmrec.score.words import WISH_TOKENS, Layout, Vocabulary, WordsModel, read
from llmrec.score.wordwise import VocabularyScorer
from llmrec.sequences import Source
from llmrec.testing import tiny_lm, toy_data
from llmrec.word_model import WordLanguageModel, layout_of

TITLES = [item.title for item in toy_data(items=36)[0]] + ["Amber", "Amber Anchor", "Amber Anchor 2"]
ITEMS = len(TITLES)
COUNTS = np.random.default_rng(0).integers(0, 9, ITEMS)
MAKES = ("llama", "gpt2", "qwen")


def codes(*values):
    return np.array(values, dtype=np.int32)


@pytest.fixture(scope="module", params=MAKES)
def base(request, tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp(request.param), make=request.param, seed=3)


def words_of(base, prompt="likelihood", slot=None, window=20):
    vocabulary = Vocabulary(base)
    body, head = load_causal(base, None, torch.float32)
    lines = vocabulary.lines(TITLES, 12)
    model = WordsModel(body.eval(), head, vocabulary, Layout.of(Prompt.load(prompt), slot), lines, window)
    with torch.no_grad():
        # A random model is nearly indifferent; sharper logits show what is wrong.
        model.scale.fill_(20.0)
    return model


def likelihood(base, beam=50, **reader):
    words = words_of(base)
    model = LikelihoodModel(words, ItemTrie.of(words.lines, words.vocabulary.end, COUNTS))
    return LikelihoodScorer(model, PackedReader(words.body, **reader), beam)


QUERIES = [
    Query(codes(0, 5, 9)),
    Query(codes()),
    Query(codes(7), text="golden bridge"),
    Query(codes(*range(30))),
]


def plain_states(words, tokens):
    """Final hidden states of one sequence, read plainly."""
    with torch.inference_mode():
        return words.body(input_ids=torch.tensor([tokens])).last_hidden_state[0]


def naive_log_probs(words, query):
    """The mode's formula for every item, one prompt an item, over sets of lines instead of a trie."""
    start = words.beginning(query.history) + words.stem(query)
    paths = [(*line, words.vocabulary.end) for line in words.lines]
    result = np.zeros(len(paths))
    for code, path in enumerate(paths):
        states = plain_states(words, [*start, *path])
        for depth in range(len(path)):
            under = {}
            for other, count in zip(paths, COUNTS, strict=True):
                if other[:depth] == path[:depth]:
                    under[other[depth]] = under.get(other[depth], 0.0) + count + 1.0
            with torch.inference_mode():
                logits = words.logits(states[len(start) - 1 + depth][None], torch.tensor(list(under)))[0]
            values = logits.double() + torch.tensor(list(under.values())).double().log()
            result[code] += torch.log_softmax(values, 0)[list(under).index(path[depth])]
        same = [i for i, other in enumerate(paths) if other == path]
        result[code] += np.log((COUNTS[code] + 1.0) / (COUNTS[same] + 1.0).sum())
    return result


def test_likelihood_equals_one_prompt_an_item_and_sums_to_one(base):
    scorer = likelihood(base)
    everything = np.arange(ITEMS, dtype=np.int32)
    scores = scorer.score(QUERIES, [everything] * len(QUERIES))
    for query, found in zip(QUERIES, scores, strict=True):
        expected = naive_log_probs(scorer.model.words, query)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert np.exp(found.astype(float)).sum() == pytest.approx(1.0, abs=1e-4)
    assert np.ptp(scores[0] - scores[1]) > 0.1, "the history must matter"
    # Some candidates in another order, from what is kept by now.
    some = codes(36, 3, 38, 12)
    for query, found, whole in zip(QUERIES, scorer.score(QUERIES, [some] * 4), scores, strict=True):
        assert query.history is not None
        np.testing.assert_allclose(found, whole[some], atol=1e-4)


def test_likelihood_over_the_vocabulary_equals_one_prompt_an_item(base):
    words = words_of(base)
    scorer = VocabularyScorer(words, PackedReader(words.body))
    everything = np.arange(ITEMS, dtype=np.int32)
    for query, found in zip(QUERIES, scorer.score(QUERIES, [everything] * len(QUERIES)), strict=True):
        start = words.beginning(query.history) + words.stem(query)
        for code, line in enumerate(words.lines):
            tokens = [*line, words.vocabulary.end]
            states = plain_states(words, [*start, *tokens])[len(start) - 1 : -1]
            with torch.inference_mode():
                values = torch.log_softmax(states.double() @ words.head.double().T, dim=-1)
            expected = float(values[range(len(tokens)), tokens].sum())
            assert found[code] == pytest.approx(expected, abs=1e-4)


def test_a_beam_as_wide_as_the_catalogue_is_the_full_ranking(base):
    scorer = likelihood(base, beam=10 * ITEMS)
    everything = np.arange(ITEMS, dtype=np.int32)
    mask = np.random.default_rng(1).random(ITEMS) < 0.6
    for query in [*QUERIES, Query(codes(4, 2), mask=mask), Query(codes(4), "piano", mask)]:
        full = scorer.score([query], [everything])[0]
        allowed = everything if query.mask is None else np.flatnonzero(query.mask)
        expected = allowed[np.lexsort((allowed, -full[allowed]))]
        hits = scorer.retrieve([query], ITEMS)[0]
        np.testing.assert_array_equal(hits.items, expected)
        np.testing.assert_allclose(hits.scores, full[expected], atol=1e-4)


def test_a_narrow_beam_finds_what_a_naive_beam_finds_and_breaks_no_rule(base):
    scorer = likelihood(base, beam=3)
    mask = np.ones(ITEMS, bool)
    mask[::2] = False
    queries = [Query(codes(i, i + 3), mask=mask) for i in range(5)]
    for query, hits in zip(queries, scorer.retrieve(queries, 9), strict=True):
        assert mask[hits.items].all() and 1 <= len(hits.items) <= 4
        full = scorer.score([query], [hits.items])[0]
        np.testing.assert_allclose(hits.scores, full, atol=1e-4)
    assert not len(scorer.retrieve([Query(mask=np.zeros(ITEMS, bool))], 5)[0].items)


def test_yes_no_equals_one_prompt_a_candidate_in_any_order(base):
    words = words_of(base, "yes_no", "candidate")
    scorer = YesNoScorer(words, PackedReader(words.body))
    asked = codes(3, 38, 36, 17, 37)
    yes, no = yes_no_labels(words.vocabulary)
    for query, found in zip(QUERIES, scorer.score(QUERIES, [asked] * 4), strict=True):
        for code, score in zip(asked, found, strict=True):
            tokens = words.beginning(query.history) + words.stem(query) + words.lines[code]
            tokens += [words.vocabulary.end, *words.vocabulary.tokens("Answer:")]
            state = plain_states(words, tokens)[-1]
            expected = 20.0 * (words.head[yes] - words.head[no]) @ state
            assert score == pytest.approx(float(expected), abs=1e-3)
        turned = scorer.score([query], [asked[::-1]])[0][::-1]
        np.testing.assert_allclose(turned, found, atol=1e-3)
    texts = scorer.score_texts(QUERIES[0], [TITLES[3], "Something that is no item"], 12)
    assert texts[0] == pytest.approx(float(scorer.score([QUERIES[0]], [asked])[0][0]), abs=1e-3)


def test_letters_are_the_labels_of_one_prompt_and_orders_average(base):
    words = words_of(base, "letters", "candidates")
    scorer = LettersScorer(words, PackedReader(words.body))
    asked = codes(3, 38, 36)
    labels = [words.vocabulary.label(f" {letter}", letter) for letter in "ABC"]
    for query, found in zip(QUERIES, scorer.score(QUERIES, [asked] * 4), strict=True):
        wish = [f"This person now asks for: {query.text}"] if query.text else []
        tokens = words.beginning(query.history)
        for line in (*wish, "One of the following was chosen next:"):
            tokens += [*words.vocabulary.tokens(line), words.vocabulary.end]
        for letter, code in zip("ABC", asked, strict=True):
            tokens += [*words.vocabulary.tokens(f"{letter}: "), *words.lines[code], words.vocabulary.end]
        state = plain_states(words, tokens + words.vocabulary.tokens("The letter of the chosen one:"))[-1]
        expected = torch.log_softmax(20.0 * words.head[labels] @ state, 0)
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-3)

    orders = [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    mean = np.mean([scorer.score([QUERIES[0]], [asked[o]])[0][np.argsort(o)] for o in orders], axis=0)
    turned = LettersScorer(words, scorer.reader, orders=3)
    np.testing.assert_allclose(turned.score([QUERIES[0]], [asked])[0], mean, atol=1e-3)
    other = turned.score([QUERIES[0]], [asked[[2, 0, 1]]])[0][np.argsort([2, 0, 1])]
    np.testing.assert_allclose(other, mean, atol=1e-3)
    # More than a window: every candidate is placed once.
    long = scorer.score([QUERIES[0]], [np.arange(35, dtype=np.int32)])[0]
    assert sorted(long.tolist()) == [float(-rank) for rank in range(35, 0, -1)]


def test_what_is_kept_and_extended_and_read_in_pieces_changes_nothing(base):
    everything = np.arange(ITEMS, dtype=np.int32)
    long = [Query(codes(*range(n))) for n in range(1, 33)]
    fresh = likelihood(base, memory=0)
    kept, narrow = likelihood(base), likelihood(base, tokens=25)
    for query in long:
        expected = fresh.score([query], [everything])[0]
        np.testing.assert_allclose(kept.score([query], [everything])[0], expected, atol=1e-4)
    assert kept.reader._size > 0 and not fresh.reader._kept
    together = narrow.score(long, [everything] * len(long))
    for query, found in zip(long, together, strict=True):
        np.testing.assert_allclose(found, kept.score([query], [everything])[0], atol=1e-4)
    assert kept.reader._size == sum(past.size for past in kept.reader._kept.values())
    kept.forget()
    assert kept.reader._size == 0 and not kept.reader._kept


@pytest.mark.parametrize("mode", [YesNoScorer, LettersScorer])
def test_labels_are_the_same_from_what_is_kept_and_extended(base, mode):
    words = words_of(base, *(("yes_no", "candidate") if mode is YesNoScorer else ("letters", "candidates")))
    kept, fresh = mode(words, PackedReader(words.body)), mode(words, PackedReader(words.body, memory=0))
    asked = codes(3, 38, 36, 17)
    for query in (Query(codes(*range(n)), text=text) for n in range(1, 25, 3) for text in ("", "red boat")):
        for _ in range(2):
            (found,), (expected,) = (one.score([query], [asked]) for one in (kept, fresh))
            # Logits are sharpened by 20.
            np.testing.assert_allclose(found, expected, atol=1e-3)
    assert kept.reader._kept and not fresh.reader._kept


def tuned_words(base, mode, seed):
    """A model of some mode on weights that others share, with LoRA matrices of its own."""
    config = WordsConfig(mode=mode, base=str(base), precision="float32", rank=4)
    body, head = shared_causal(base, None, torch.float32)
    vocabulary = Vocabulary(base)
    body = fresh_adapter(body, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    lines = vocabulary.lines(TITLES, 12)
    words = WordsModel(body.eval(), head, vocabulary, layout_of(config), lines, config.window)
    return WordLanguageModel(words, config, TITLES, COUNTS)


@pytest.mark.parametrize("mode", ["likelihood", "yes_no", "letters"])
def test_models_of_several_tenants_answer_many_threads_as_they_answer_one(base, mode):
    models = [tuned_words(base, mode, seed) for seed in (1, 2)]
    asked = codes(3, 38, 36, 17)
    tasks = [(model, query) for model in models for query in QUERIES for _ in range(4)]

    def answer(task):
        return task[0].scorer.score([task[1]], [asked])[0]

    expected = [model.fresh().scorer.score([query], [asked])[0] for model, query in tasks]
    with ThreadPoolExecutor(8) as threads:
        for found, wanted in zip(threads.map(answer, tasks), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-4)
    half = len(tasks) // 2
    assert np.abs(np.stack(expected[:half]) - np.stack(expected[half:])).max() > 1e-3


@pytest.mark.parametrize("mode", ["likelihood", "yes_no", "letters"])
def test_a_catalogue_that_changed_is_read_anew(base, mode):
    old = tuned_words(base, mode, 1)
    asked = codes(3, 38, 36, 17)
    (before,) = old.scorer.score([QUERIES[0]], [asked])
    lines = list(TITLES)
    lines[0], lines[36] = "Quite Another Thing", "Velvet Zeppelin"  # of the history, of the candidates
    changed = old.grown(Texts(lines, np.zeros((ITEMS, 0), np.float32), None, None))
    (after,) = changed.scorer.score([QUERIES[0]], [asked])
    new = WordsModel(
        old.words.body,
        old.words.head,
        old.words.vocabulary,
        old.words.layout,
        old.words.vocabulary.lines(lines, old.config.line_tokens),
        old.words.window,
    )
    (expected,) = WordLanguageModel(new, old.config, lines, COUNTS).scorer.score([QUERIES[0]], [asked])
    np.testing.assert_allclose(after, expected, atol=1e-4)
    assert np.abs(after - before).max() > 1e-4
    np.testing.assert_allclose(old.scorer.score([QUERIES[0]], [asked])[0], before, atol=1e-5)


def test_letters_average_as_many_orders_as_are_set(base):
    one = tuned_words(base, "letters", 1)
    config = one.config.model_copy(update={"orders": 4})
    four = WordLanguageModel(one.words, config, TITLES, COUNTS)
    asked, query = codes(3, 38, 36, 17), QUERIES[0]
    turns = [np.roll(np.arange(4), -n) for n in range(4)]
    alone = [one.scorer.score([query], [asked[turn]])[0][np.argsort(turn)] for turn in turns]
    (mean,) = four.scorer.score([query], [asked])
    np.testing.assert_allclose(mean, np.mean(alone, axis=0), atol=1e-4)
    assert np.ptp(alone, axis=0).max() > 1e-3, "the order must matter to one"
    for turn in turns:
        (turned,) = four.scorer.score([query], [asked[turn]])
        np.testing.assert_allclose(turned[np.argsort(turn)], mean, atol=1e-4)


def test_a_history_is_read_from_steps_of_ten():
    starts = [read(np.arange(n, dtype=np.int32), 20)[:1].tolist() for n in range(60)]
    assert (
        starts[:21] == [[], *[[0]] * 20] and starts[21] == [10] and starts[30] == [10] and starts[31] == [20]
    )
    assert all(11 <= len(read(np.arange(n, dtype=np.int32), 20)) <= 20 for n in range(11, 60))
    # A short window keeps at least half of what it may read.
    for window in range(1, 12):
        lengths = [len(read(np.arange(n, dtype=np.int32), window)) for n in range(window, 40)]
        assert max(lengths) == window and min(lengths) >= window - window // 2


def test_memory_is_bounded_and_what_a_longer_history_replaces_goes_first(base):
    words = words_of(base)
    reader = PackedReader(words.body, memory=60_000)
    for start in range(30):
        reader.past(words.beginning(codes(start, start + 1)))
        assert reader._size <= 60_000
    assert 0 < len(reader._kept) < 30
    last = [words.beginning(codes(*range(n))) for n in range(1, 9)]
    reader = PackedReader(words.body, memory=3 * reader.past(last[-1]).size)
    for beginning in last:
        reader.past(beginning)
    lengths = [past.length for past in reader._kept.values()]
    assert len(last[-1]) in lengths and 1 < len(lengths) < 8
    reader.past(words.beginning(codes(30, 31, 32)))
    assert len(last[-1]) in [past.length for past in reader._kept.values()]


def test_no_forward_reads_more_than_it_may_and_what_requests_share_is_read_once(base, monkeypatch):
    words = words_of(base)
    seen = []

    def counted(body, rows, keep=True):
        seen.append([len(row.tokens) for row in rows])
        return forward(body, rows, keep)

    monkeypatch.setattr(packed, "forward", counted)
    beginning, (tree, _) = words.beginning(codes(*range(8))), Tree.of([[5, 6], [5, 7]])
    whole = PackedReader(words.body, memory=0).read([beginning], [tree])[0]
    assert seen == [[len(beginning) + len(tree)]]
    seen.clear()
    pieces = PackedReader(words.body, tokens=10, memory=0).read([beginning], [tree])[0]
    torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=0)
    assert len(seen) > 2 and max(map(sum, seen)) <= 10
    seen.clear()
    for found in PackedReader(words.body, memory=0).read([beginning] * 3, [tree] * 3):
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=0)
    assert seen == [[len(beginning)], [len(tree)] * 3]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=25), st.integers(0, 9))
def test_the_trie_holds_every_line_its_items_and_their_mass(lines, seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, len(lines))
    trie = ItemTrie.of(lines, 9, counts)
    under = {(): set()}
    for code, line in enumerate(lines):
        for n in range(len(line) + 2):
            under.setdefault((*line, 9)[:n], set()).add(code)
    nodes = {tuple(trie.tokens[trie.path(node)].tolist()): node for node in range(len(trie))}
    assert set(nodes) == set(under)
    mask = rng.random(len(lines)) < 0.5
    for path, node in nodes.items():
        items = trie.items[trie.low[node] : trie.high[node]].tolist()
        assert set(items) == under[path] and trie.mass(np.array([node]))[0] == pytest.approx(
            counts[items].sum() + len(items)
        )
        children = {other for other in under if len(other) == len(path) + 1 and other[: len(path)] == path}
        assert {(*path, token) for token in trie.tokens[trie.children(node)].tolist()} == children
        assert trie.allowed(mask)(node) == mask[items].any()
    for code, line in enumerate(lines):
        assert trie.leaf[code] == nodes[(*line, 9)]
        same = under[(*line, 9)]
        assert trie.share(codes(code))[0] == pytest.approx(
            (counts[code] + 1) / (counts[list(same)] + 1).sum()
        )
    wanted = trie.to_score(np.arange(len(lines), dtype=np.int32))
    forks = {n for n in range(len(trie)) if len(trie.children(n)) > 1} - {ROOT}
    assert forks <= set(wanted.tolist())
    assert all(set(trie.path(node)) <= set(wanted.tolist()) for node in wanted)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=12), st.integers(0, 3), st.integers(0, 99))
def test_packed_lines_are_the_lines_before_and_after_a_change(lines, more, seed):
    rng = np.random.default_rng(seed)
    packed = TokenLines.of(lines)
    assert list(packed) == lines and packed[1:] == lines[1:]
    assert packed.lengths().tolist() == list(map(len, lines))
    total = len(lines) + more
    wanted = {*rng.permutation(len(lines))[:3].tolist(), *range(len(lines), total)}
    fresh = {code: rng.integers(0, 9, rng.integers(0, 4)).tolist() for code in sorted(wanted)}
    expected = [fresh[code] if code in fresh else lines[code] for code in range(total)]
    assert list(packed.changed(list(fresh), fresh.values(), total)) == expected
    with pytest.raises(IndexError):
        packed[len(lines)]


def test_a_tree_joins_common_beginnings():
    tree, ends = Tree.of([[1, 2], [1, 3, 4], [1, 2], [5]])
    assert len(tree) == 5 and ends.tolist() == [1, 3, 1, 4]
    moved = tree.after([8, 9])
    assert moved.tokens.tolist() == [8, 9, 1, 2, 3, 4, 5] and moved.depths().tolist() == [0, 1, 2, 3, 3, 4, 2]
    assert np.flatnonzero(moved.sees()[5]).tolist() == [0, 1, 2, 4, 5]


def test_control_tokens_in_texts_are_words(base):
    vocabulary = Vocabulary(base)
    assert len(vocabulary.tokens("<eos>")) > 1 and vocabulary.tokens("") == []
    assert vocabulary.end not in vocabulary.lines(["two\nlines"], 20)[0]
    assert len(vocabulary.lines(["word " * 500], 12)[0]) <= 12


def test_prompts_that_a_mode_cannot_use_are_errors(tmp_path):
    path = tmp_path / "mine.md"
    unread = ("For {wish}:\n{history}", "Before:\n{history}\nThe next one is:")
    for text in ("{history}", "Before:\n{history}\n{other}", "Words {history}", "Only words", *unread):
        path.write_text(text)
        with pytest.raises(ConfigError, match="history"):
            Layout.of(Prompt.load(str(path)), None)
    path.write_text("Before:\n{history}\n{candidate}\nAsked for: {wish}")
    with pytest.raises(ConfigError, match=r"between \{history\} and \{candidate\}"):
        Layout.of(Prompt.load(str(path)), "candidate")
    with pytest.raises(ConfigError, match="candidate"):
        Layout.of(Prompt.load("likelihood"), "candidate")


def test_a_tokenizer_without_labels_is_an_error(base):
    vocabulary = Vocabulary(base)
    vocabulary.tokens = lambda words: [1, 2]
    with pytest.raises(ModelError, match="single tokens"):
        yes_no_labels(vocabulary)


HISTORIES = [codes(0, 5, 9), codes(7), codes(*range(12, 36)), codes(36, 37, 38, 36)]
ONES = [np.ones(len(history), np.float32) for history in HISTORIES]


@pytest.mark.parametrize("normalise", ["trie", "vocabulary"])
def test_the_loss_of_likelihood_is_the_mean_nats_of_its_scores(base, normalise):
    scorer = likelihood(base)
    if normalise == "vocabulary":
        scorer = VocabularyScorer(scorer.model.words, scorer.reader)
    rng = np.random.default_rng(2)
    weights = [rng.uniform(0.1, 3, len(h)).astype(np.float32) for h in HISTORIES]
    config = TrainingConfig(tokens_per_step=10**6)
    task = lines_task(scorer, Source(HISTORIES, weights), config)
    (batch,) = task.epoch(rng)
    assert task.events(batch) == sum(map(len, HISTORIES))
    nats = []
    for window in batch:
        queries = [Query(window.items[:n]) for n in range(len(window))]
        found = scorer.score(queries, [window.items[n : n + 1] for n in range(len(window))])
        nats += [-float(score[0]) for score in found]
    counted = np.concatenate([window.weights for window in batch])
    assert float(task.loss(batch).detach()) == pytest.approx(np.average(nats, weights=counted), abs=1e-3)


@pytest.mark.parametrize("normalise", ["trie", "vocabulary"])
def test_the_last_item_of_a_window_with_a_wish_costs_what_it_is_scored_at_behind_the_wish(base, normalise):
    scorer = likelihood(base)
    words = scorer.model.words
    if normalise == "vocabulary":
        scorer = VocabularyScorer(words, scorer.reader)
    wished = {9: "golden bridge", 7: "amber", 36: "anchor 2"}

    def typed(item, rng):
        return words.stem(Query(codes(), wished[item])) if item in wished else ()

    task = lines_task(scorer, Source(HISTORIES, ONES), TrainingConfig(tokens_per_step=10**6), typed, 1.0)
    (batch,) = task.epoch(np.random.default_rng(0))
    nats = []
    for window in batch:
        queries = [Query(window.items[:n]) for n in range(len(window))]
        queries[-1] = Query(window.items[:-1], wished.get(int(window.items[-1]), ""))
        found = scorer.score(queries, [window.items[n : n + 1] for n in range(len(window))])
        nats += [-float(score[0]) for score in found]
    assert float(task.loss(batch).detach()) == pytest.approx(np.mean(nats), abs=1e-3)
    assert sum(bool(len(window.typed)) for window in batch) == 3


@pytest.mark.parametrize("mode", [YesNoScorer, LettersScorer])
def test_the_listwise_loss_is_that_of_the_scores(base, mode):
    prompt, slot = ("yes_no", "candidate") if mode is YesNoScorer else ("letters", "candidates")
    words = words_of(base, prompt, slot)
    scorer = mode(words, PackedReader(words.body))
    choices = [Choice(query, codes(3, 38, 36, 17), truth) for truth, query in enumerate(QUERIES)]
    task = ListwiseTask(scorer, choices, TrainingConfig(tokens_per_step=10**6))
    (batch,) = task.epoch(np.random.default_rng(0))
    assert {int(choice.candidates[choice.truth]) for choice in batch} == {3, 38, 36, 17}
    found = scorer.score([c.query for c in batch], [c.candidates for c in batch])
    nats = [-torch.log_softmax(torch.tensor(s), 0)[c.truth] for s, c in zip(found, batch, strict=True)]
    assert float(task.loss(batch).detach()) == pytest.approx(float(torch.stack(nats).mean()), abs=1e-3)


def test_windows_that_the_letters_cannot_name_are_errors(base):
    words = words_of(base, "letters", "candidates")
    for window in (0, 1, 27):
        with pytest.raises(ConfigError, match="2 to 26"):
            LettersScorer(words, PackedReader(words.body), window=window)
    with pytest.raises(ConfigError, match="26 candidates"):
        LettersScorer(words, PackedReader(words.body)).asks(QUERIES[0], np.arange(27, dtype=np.int32))


def test_an_item_that_came_after_training_is_as_likely_as_a_middling_one(base, tmp_path):
    config = WordsConfig(mode="likelihood", base=str(base), precision="float32")
    lm = WordLanguageModel.new(config, base, TITLES, COUNTS)
    with torch.no_grad():
        # Nothing is left but what the lines count before a history is read.
        lm.words.scale.zero_()
    lm.card = make_card(config.prompt_name, base, "", "", {})
    texts = Texts([*TITLES, "A new one"], np.zeros((ITEMS + 1, 0), np.float32), None, None)
    lm.grown(texts).save(tmp_path)
    loaded = WordLanguageModel.restored(tmp_path, base, texts, *read_adapter(tmp_path))
    never, new = int(np.flatnonzero(COUNTS == 0)[0]), ITEMS
    middling = np.log1p(COUNTS[COUNTS > 0]).mean()
    for model in (lm.grown(texts), loaded):
        (scores,) = model.scorer.score(QUERIES[:1], [codes(never, new)])
        assert scores[1] - scores[0] == pytest.approx(middling, abs=1e-4)
    # Nobody chose it when it could be chosen.
    later = loaded.recounted(np.append(9 * COUNTS, 0))
    (scores,) = later.scorer.score(QUERIES[:1], [codes(never, new)])
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)


def test_of_a_long_wish_the_beginning_is_read(base):
    words = words_of(base)
    short, long = (words.stem(Query(codes(), text)) for text in ("red", "red " * 3 + "\u6f22" * 1000))
    own = len(words.vocabulary.tokens("red"))
    assert len(short) - own < len(long) <= len(short) - own + WISH_TOKENS + 2
    assert long[: len(short) - 1] == short[:-1]


def test_prompts_that_the_base_model_cannot_read_are_refused(base):
    config = WordsConfig(mode="yes_no", base=str(base), precision="float32", window=600)
    with pytest.raises(ConfigError, match=r"the base model reads 512: lower lm\.window"):
        WordLanguageModel.new(config, base, TITLES, COUNTS)
    # Items with longer titles may come later, and letters stand before candidates.
    config = config.model_copy(update={"window": 12})
    WordLanguageModel.new(config, base, ["A"] * 3, np.ones(3))
    with pytest.raises(ConfigError, match=r"lm\.listed"):
        WordLanguageModel.new(config.model_copy(update={"mode": "letters"}), base, ["A"] * 3, np.ones(3))


def test_what_is_no_base_model_is_a_clear_error(tmp_path):
    (tmp_path / "empty").mkdir()
    for content in ("{", '{"model_type": "of another time"}'):
        (tmp_path / "config.json").write_text(content)
        for folder in (tmp_path, tmp_path / "empty"):
            with pytest.raises(ModelError, match="no base model that transformers can load"):
                load_causal(folder, None, torch.float32)
            with pytest.raises(ModelError, match="no base model that transformers can load"):
                Vocabulary(folder)


def test_modules_that_the_base_lacks_are_a_clear_error(base):
    config = WordsConfig(mode="yes_no", base=str(base), precision="float32", targets=["q_prjo"])
    with pytest.raises(ConfigError, match=r"lm\.targets does not fit the base model"):
        WordLanguageModel.new(config, base, TITLES, COUNTS)


def test_adapters_of_one_base_share_its_word_head_wherever_it_goes(base):
    vocabulary, layout = Vocabulary(base), Layout.of(Prompt.load("likelihood"), None)
    lines = vocabulary.lines(TITLES, 12)
    # A dtype of its own, so that no other test has these weights; another one is as good as another device.
    made = [shared_causal(base, 1, torch.float16) for _ in range(2)]
    one, other = (WordsModel(body, head, vocabulary, layout, lines, 5) for body, head in made)
    one.to(torch.float64)
    assert other.head.dtype == torch.float64 and other.head.data_ptr() == one.head.data_ptr()


def test_where_no_word_is_a_choice_there_is_nothing_to_learn(base):
    config = WordsConfig(mode="likelihood", base=str(base), precision="float32")
    lm = WordLanguageModel.new(config, base, ["Amber"] * 3, np.ones(3))
    with pytest.raises(DataError, match="the same title"):
        lines_task(lm.scorer, Source([codes(0, 1, 2)], None), TrainingConfig(steps=1))
