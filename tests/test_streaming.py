"""A log read as a stream is the log read at once, in portions."""

import datasets
import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from llmrec import Recommender, cli
from llmrec.assembly import read_log
from llmrec.catalog import Catalog
from llmrec.config import DataConfig
from llmrec.errors import ConfigError, DataError
from llmrec.evaluation.split import training_log
from llmrec.language_model import LanguageModel
from llmrec.score.config import ItemTokensConfig, TrainingConfig
from llmrec.score.tasks import ItemTokensTask
from llmrec.streaming import StreamedLog
from llmrec.testing import tiny_lm, toy_data
from llmrec.training import LoRATrainer, trainable

ITEMS, EVENTS = toy_data(users=60, items=30)
CATALOG = Catalog.load(ITEMS)
TABLE = pl.DataFrame(
    [
        {"who": e.user_id, "item_id": e.item_id, "timestamp": e.timestamp, "event": ("view", "buy")[n % 2]}
        for n, e in enumerate(EVENTS)
    ]
)
DATA = DataConfig(events_mapping={"who": "user_id"}, event_weights={"view": 0.5, "buy": 2})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("events")
    rows = TABLE.sort("who", maintain_order=True)
    for n, users in enumerate(np.array_split(rows["who"].unique().sort().to_numpy(), 3)):
        rows.filter(pl.col("who").is_in(users.tolist())).write_parquet(folder / f"{n}.parquet")
    return folder


def pairs(log):
    assert log.weights is not None
    return sorted((h.tolist(), w.tolist()) for h, w in zip(log.histories, log.weights, strict=True) if len(h))


@pytest.mark.parametrize("portion", [1, 40, 10**6])
def test_portions_hold_the_histories_of_the_whole_log(files, portion):
    whole = training_log(read_log(TABLE, CATALOG, DATA))
    stream = StreamedLog(str(files / "*.parquet"), CATALOG, DATA, portion=portion)
    logs = list(stream.logs(np.random.default_rng(0)))
    assert sorted(pair for log in logs for pair in pairs(log)) == pairs(whole)
    assert len(logs) == {1: 60, 40: len(logs), 10**6: 3}[portion]
    np.testing.assert_allclose(stream.counts(len(CATALOG)), whole.counts(len(CATALOG)))
    assert (stream.users, stream.events) == (whole.users, whole.events)
    drawn = [w for part in stream.portions(np.random.default_rng(1), 4) for w in part]
    assert sum(map(len, drawn)) == whole.events and max(map(len, drawn)) == 4


def test_users_who_judge_are_not_in_it(files):
    kept = StreamedLog(files, CATALOG, DATA, without=["u3", "u40"])
    whole = read_log(TABLE, CATALOG, DATA)
    gone = sum(len(whole.history(whole.users.index(user))) for user in ("u3", "u40"))
    assert kept.users == 58 and kept.events == len(whole) - gone


def test_an_iterable_dataset_is_a_stream_too(files):
    loaded = datasets.load_dataset(
        "parquet", data_files=str(files / "*.parquet"), split="train", streaming=True
    )
    from_files = StreamedLog(files, CATALOG, DATA)
    assert StreamedLog(loaded, CATALOG, DATA).events == from_files.events


def test_ids_are_those_of_the_log_and_users_without_any_row_left_are_none(tmp_path):
    numbered = TABLE.with_columns(who=pl.col("who").str.slice(1).cast(pl.Float64)).sort("who")
    # Of the first two users and of the last one nothing is left.
    ratings = pl.when(pl.col("who").is_in([0.0, 1.0, 59.0])).then(1).otherwise(5)
    numbered.with_columns(rating=ratings).write_parquet(tmp_path / "a.parquet")
    data = DATA.model_copy(update={"rating_threshold": 3.0})
    stream = StreamedLog(tmp_path, CATALOG, data, without=["7"], portion=5)
    whole = read_log(pl.read_parquet(tmp_path / "a.parquet"), CATALOG, data)
    assert stream.users == whole.n_users - 1 == 56
    assert stream.events == len(whole) - len(whole.history(whole.users.index("7")))
    assert stream.until == int(whole.timestamp.max())


def test_an_event_of_the_future_is_a_mistake_and_not_the_newest(tmp_path):
    late = TABLE.with_columns(
        timestamp=pl.when(pl.int_range(pl.len()) == 5).then(10**11).otherwise(pl.col("timestamp"))
    )
    late.sort("who").write_parquet(tmp_path / "a.parquet")
    known = read_log(TABLE, CATALOG, DATA).timestamp.max()
    assert StreamedLog(tmp_path, CATALOG, DATA).until == known


def test_rows_without_a_user_are_an_error_or_dropped(tmp_path):
    rows = TABLE.sort("who")
    nulls = rows.head(3).with_columns(who=pl.lit(None, pl.String))
    pl.concat([nulls, rows, nulls]).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="rows without who"):
        StreamedLog(tmp_path, CATALOG, DATA).users  # noqa: B018
    dropping = DATA.model_copy(update={"policy": "drop"})
    assert StreamedLog(tmp_path, CATALOG, dropping, portion=50).events == len(rows)


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        (TABLE, "a.parquet", "not sorted by who: sort it once"),
        (TABLE.sort("who").drop("who"), "a.parquet", "no column 'who'"),
        (TABLE.sort("who").with_columns(item_id=pl.lit("nothing")), "a.parquet", "not in the catalogue"),
        (TABLE.sort("who").head(0), "a.parquet", "no events to train on"),
        (None, "a.parquet", "cannot be read"),
        (None, "a.txt", "no .parquet or .jsonl file"),
    ],
)
def test_what_cannot_be_streamed_is_a_clear_error(tmp_path, rows, name, message):
    (tmp_path / name).write_text("no table") if rows is None else rows.write_parquet(tmp_path / name)
    with pytest.raises(DataError, match=message):
        StreamedLog(tmp_path, CATALOG, DATA).counts(len(CATALOG))
    with pytest.raises(DataError, match=r"no \.parquet or \.jsonl file"):
        StreamedLog(tmp_path / "*.csv", CATALOG, DATA)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("lm"))


def test_a_run_on_a_stream_goes_on_exactly_where_it_stopped(files, base, tmp_path):
    config = ItemTokensConfig(base=str(base), layers=2, rank=4, precision="float32", window=4)
    vectors = np.eye(len(CATALOG), dtype=np.float32)

    def run(folder, kill_at=None):
        lm = LanguageModel.new(config, base, vectors, np.ones(len(CATALOG)))
        stream = StreamedLog(files, CATALOG, DATA, portion=40)
        training = TrainingConfig(steps=20, minutes=None, tokens_per_step=60, checkpoint_seconds=0.0001)

        def step(progress, done):
            if progress.step == kill_at:
                raise KeyboardInterrupt

        trainer = LoRATrainer(ItemTokensTask(lm.model, stream, 4, training), training, folder, "f")
        report = trainer.run(None, step)
        assert trainer.progress.epoch >= 1  # it has begun again at the files
        return report, trainable(lm.model)

    _, expected = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", kill_at=7)
    report, found = run(tmp_path / "b")
    assert report.steps == 20
    for name, value in expected.items():
        np.testing.assert_array_equal(value.detach().numpy(), found[name].detach().numpy())


def test_a_recommender_learns_from_a_stream_and_says_so(files, base, tmp_path):
    config = {
        "data": DATA.model_dump(exclude_none=True),
        "encoder": {"name": "light", "dim": 8},
        "lm": {"base": str(base), "layers": 2, "rank": 4, "precision": "float32", "window": 4},
        "training": {"steps": 3},
        "retrieval": {"lm_users": 20},
    }
    rec = Recommender.fit(ITEMS, TABLE, config)
    rec.save(tmp_path / "model")
    done = CliRunner().invoke(cli.app, ["finetune", str(tmp_path / "model"), "--stream", str(files)])
    assert done.exit_code == 0 and "3 steps" in done.output
    again = Recommender.load(tmp_path / "model")
    assert len(again.recommend(user="u1", k=3)) == 3
    card = again._ready(lm=True).lm.card.training
    assert card["data"]["held_out"] == 20 and card["data"]["users"] == 40
    with pytest.raises(ConfigError, match="`since` or `stream`"):
        rec.finetune(stream=str(files), since="last")
