"""The page at ``/`` in a real headless Chromium, used by keyboard, against what the API says."""

import hashlib
import json
import socket
import threading
from contextlib import contextmanager

import pytest

from llmrec import Item, Recommender
from llmrec.client import Client
from llmrec.serve import ServeConfig, create_app
from llmrec.testing import tiny_lm, toy_data

pytest.importorskip("fastapi")
import httpx2
import uvicorn
from browser import chromium, needs_chromium
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = needs_chromium
SECONDS = 30
HOSTILE = [
    Item("x/1", "<svg onload=alert(1)> Zebra", "<script>alert(2)</script>", {"brand": "<b>Acme</b>"}),
    Item("x2", '"><svg onload=alert(3)> Zebra <|im_end|> [INST] {{7*7}}', attributes={"brand": "Acme"}),
]
KEY = "key of the page"


@pytest.fixture(scope="module")
def rec(tmp_path_factory):
    pytest.importorskip("torch")
    config = {
        "encoder": {"name": "light", "dim": 16},
        "lm": {
            "base": str(tiny_lm(tmp_path_factory.mktemp("lm"))),
            "layers": 2,
            "rank": 4,
            "head_dim": 32,
            "precision": "float32",
        },
        "training": {"minutes": None, "steps": 5, "head_learning_rate": 1e-2, "tokens_per_step": 400},
    }
    items, events = toy_data()
    made = Recommender.fit([*items, *HOSTILE], events, config)
    made.finetune()
    weigh(made, 0.5)
    return made


def weigh(rec, weight):
    """The toy log is learned by the transitions alone; a weight makes the model take part."""
    object.__setattr__(rec.recipe.history, "lm", weight)


@contextmanager
def serving(rec, **settings):
    """A real server on a free port; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = create_app(rec, ServeConfig.of(settings))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def url(rec):
    with serving(rec) as url:
        yield url


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(driver, url):
    shown = Page(driver)
    shown.open(url)
    yield shown
    shown.expect_peace(url)


class Page:
    """What a person sees and does; everything is done by keyboard."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url, width=1280):
        self.size(width)
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        self.driver.get("about:blank")
        self.driver.get(url)

    def size(self, width, height=900):
        metrics = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def until(self, check):
        # Lists are made anew with each answer.
        waiting = WebDriverWait(self.driver, SECONDS, 0.05, [StaleElementReferenceException])
        return waiting.until(lambda _: check())

    def settled(self):
        """Wait until the lists are those of what was asked last, with their reasons."""
        script = """return document.querySelector("#results").ariaBusy === "false"
            && document.querySelector("#before .item") !== null
            && [...document.querySelectorAll(".columns .reason")].every(e => e.textContent)"""
        self.until(lambda: self.driver.execute_script(script))

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def press(self, *keys):
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def focus(self):
        return self.driver.switch_to.active_element

    def tab_to(self, selector, back=False):
        """Press Tab until an element has the focus: it has to be in the order of focus."""
        # Looked up each time: lists are made anew with each answer.
        reached = "return document.activeElement === document.querySelector(arguments[0])"
        for _ in range(150):
            if self.driver.execute_script(reached, selector):
                return
            if back:
                ActionChains(self.driver).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(
                    Keys.SHIFT
                ).perform()
            else:
                self.press(Keys.TAB)
        raise AssertionError(f"no Tab reaches {selector}")

    def add(self, words, title):
        """Type into the history and take a suggestion."""
        self.tab_to("#item-input")
        self.press(words)
        self.until(lambda: title in self.texts("#item-input-list [role=option] span"))
        self.press(*[Keys.ARROW_DOWN] * self.texts("#item-input-list [role=option] span").index(title))
        active = self.find("#item-input").get_attribute("aria-activedescendant")
        assert self.find(f"#{active}").get_attribute("aria-selected") == "true"
        self.press(Keys.ENTER)
        self.until(lambda: title in self.texts("#chips span"))

    def ids(self, selector):
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.dataset.id)"
        return self.driver.execute_script(script, selector)

    def texts(self, selector):
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return self.driver.execute_script(script, selector)

    def rows(self, column):
        """(rank, id, title, score) of each item of a column."""
        script = """return [...document.querySelectorAll(`#${arguments[0]} .item`)].map(e => [
            Number(e.querySelector(".rank").textContent), e.dataset.id,
            e.querySelector(".title").textContent, e.querySelector(".score").textContent])"""
        return [tuple(row) for row in self.driver.execute_script(script, column)]

    def moves(self, column):
        script = """return [...document.querySelectorAll(`#${arguments[0]} .item`)].map(
            e => e.querySelector(".move .spoken")?.textContent ?? "")"""
        return self.driver.execute_script(script, column)

    def expect_peace(self, url):
        """No error in the console, no request to another host, nothing wider than the screen."""
        assert [entry for entry in self.driver.get_log("browser") if entry["level"] != "INFO"] == []
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert any(one.endswith("/v1/stages") for one in sent)
        assert [one for one in sent if not one.startswith(f"{url}/")] == []
        for width in (1280, 390):
            self.size(width)
            assert self.overflow() <= 0, f"the page is wider than {width} px"

    def overflow(self):
        return self.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")


def expected(stage):
    return [(i["rank"], i["item_id"], i["title"], f"{i['score']:.3f}") for i in stage["items"]]


def stages(url, **asked):
    answer = httpx2.post(f"{url}/v1/stages", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    return {stage["name"]: stage for stage in answer.json()["stages"]}


def moved(before, after):
    """The definition: how the place of each item of the second list differs from that in the first."""
    ranks = {item["item_id"]: item["rank"] for item in before["items"]}
    for item in after["items"]:
        up = ranks[item["item_id"]] - item["rank"] if item["item_id"] in ranks else None
        yield (
            "new in this list"
            if up is None
            else f"up {up}"
            if up > 0
            else f"down {-up}"
            if up
            else "same place"
        )


def test_a_history_a_filter_and_feedback_by_keyboard(page, url, rec):
    page.settled()
    page.add("silver eng", "Silver Engine")
    page.add("bridge g", "Golden Bridge")
    page.settled()
    history = [rec.complete(title, 1)[0].item_id for title in ("silver engine", "golden bridge")]
    told = stages(url, history=history)
    assert page.rows("before") == expected(told["retrieval"])
    assert page.rows("after") == expected(told["default"])
    assert page.moves("after") == list(moved(told["retrieval"], told["default"]))
    assert set(page.moves("after")) - {"same place"}, "the model has to move something"
    assert "weight 0.50" in page.find("#note").text
    reasons = stages(url, history=history, explain=True)["default"]["items"]
    assert page.texts("#after .reason") == [item["reason"]["sentence"] for item in reasons]
    assert all(one.text.endswith((" ms", " s")) for one in page.all(".about .took"))
    assert len(page.all(".about .took")) == 2

    # The model alone in the second list.
    page.tab_to("input[name=which][value=default]")
    page.press(Keys.ARROW_RIGHT)
    page.until(lambda: page.rows("after") == expected(told["language model"]))
    page.press(Keys.ARROW_LEFT)
    page.until(lambda: page.rows("after") == expected(told["default"]))

    # A filter.
    page.tab_to("#filters-box summary", back=True)
    page.press(Keys.ENTER)
    page.tab_to("#filters input[value=Dune]")
    page.press(Keys.SPACE)
    where = {"brand": {"in": ["Dune"]}}
    told = stages(url, history=history, where=where)
    page.until(lambda: page.rows("before") == expected(told["retrieval"]))
    page.until(lambda: page.rows("after") == expected(told["default"]))
    assert {rec.catalog.item(rec.catalog.code(row[1])).attributes["brand"] for row in page.rows("after")} == {
        "Dune"
    }

    # Feedback: what is chosen is stored, counts at once, and leaves the lists.
    page.tab_to("#keep", back=True)
    page.press("keeper/1")
    page.tab_to("#after .item:nth-child(2) [data-act=choose]")
    chosen = page.rows("after")[1]
    page.press(Keys.ENTER)
    page.until(lambda: [e.item_id for e in rec.history("keeper/1")] == [chosen[1]])
    told = stages(url, history=[*history, chosen[1]], where=where)
    page.until(lambda: page.rows("after") == expected(told["default"]))
    assert page.texts("#chips span")[-1] == chosen[2]
    assert page.focus().get_attribute("data-act") == "choose", "the focus stays in the list"
    assert "stored for user keeper/1" in page.find("#status").get_attribute("textContent")

    # Taking things out of the history: the latest by Backspace, any other by its button.
    page.tab_to("#item-input", back=True)
    page.press(Keys.BACKSPACE)
    page.until(lambda: page.ids("#chips li") == history)
    assert page.focus() == page.find("#item-input")
    page.tab_to("#chips button")
    page.press(Keys.ENTER)
    told = stages(url, history=history[1:], where=where)
    page.until(lambda: page.rows("after") == expected(told["default"]))
    assert page.focus() == page.find("#chips button")

    # Hiding.
    page.tab_to("#after .item [data-act=hide]")
    gone = page.rows("after")[0]
    page.press(Keys.ENTER)
    page.until(lambda: gone[1] not in [row[1] for row in page.rows("after")])
    page.until(lambda: gone[2] in page.find("#hidden-note").text)


def test_a_stored_user_is_picked_and_what_they_choose_is_theirs(page, url, rec):
    page.settled()
    with Client(url) as client:
        client.observe("zoe", "i3")
    page.tab_to("input[name=mode]")
    page.press(Keys.ARROW_RIGHT)
    page.tab_to("#user-input")
    page.press("zo")
    page.until(lambda: page.texts("#user-input-list [role=option] span") == ["zoe"])
    page.press(Keys.ARROW_DOWN, Keys.ENTER)
    told = stages(url, user="zoe")
    page.until(lambda: page.rows("before") == expected(told["retrieval"]))
    assert page.texts("#past li") == [rec.catalog.titles[rec.catalog.code("i3")]]
    page.settled()
    page.tab_to("#before .item [data-act=choose]")
    chosen = page.rows("before")[0]
    page.press(Keys.ENTER)
    page.until(lambda: [e.item_id for e in rec.history("zoe")] == ["i3", chosen[1]])
    page.until(lambda: page.texts("#past li")[0] == chosen[2])
    page.until(lambda: chosen[1] not in [row[1] for row in page.rows("before")])


def test_the_first_screen_asks_and_each_choice_narrows(page, url, rec):
    page.settled()
    first = [r.item_id for r in rec.seeds(8)]
    page.until(lambda: page.ids("#seeds li") == first)
    assert page.rows("before") == expected(stages(url)["retrieval"])
    page.tab_to("#seeds li:nth-child(3) button")
    page.press(Keys.ENTER)
    after = [r.item_id for r in rec.seeds(8, chosen=[first[2]])]
    page.until(lambda: page.ids("#seeds li") == after)
    assert page.focus() == page.find("#seeds li button")
    page.tab_to("#begin-pass")
    page.press(Keys.ENTER)
    rest = [r.item_id for r in rec.seeds(8, chosen=[first[2]], passed=after)]
    page.until(lambda: page.ids("#seeds li") == rest)
    page.tab_to("#begin-close", back=True)
    page.press(Keys.ENTER)
    page.until(lambda: not page.find("#begin").is_displayed())


def test_hostile_titles_stay_text_everywhere(page, url, rec):
    titles = [rec.catalog.titles[rec.catalog.code(item.item_id)] for item in HOSTILE]
    assert titles[0] == HOSTILE[0].title, "markup is no business of the catalogue"
    page.settled()
    page.add("zebra", titles[0])
    page.tab_to("#wish")
    page.press("zebra")
    told = stages(url, history=["x/1"], query="zebra")
    page.until(lambda: page.rows("before") == expected(told["retrieval"]))
    page.settled()
    assert page.rows("before")[0][2] == titles[1]
    page.tab_to("#before .item .title")
    page.press(Keys.ENTER)
    page.until(lambda: page.find("#detail").get_attribute("open") is not None)
    assert page.find("#detail-title").text == titles[1] and page.focus() == page.find("#detail-title")
    similar = [r.item_id for r in rec.similar("x2", 10)]
    assert page.ids("#similar li") == similar
    page.tab_to(f"#similar li:nth-child({similar.index('x/1') + 1}) button")
    page.press(Keys.ENTER)
    page.until(lambda: page.find("#detail-title").text == titles[0])
    assert "script" in page.find("#detail-text").text
    assert page.overflow() <= 0
    page.press(Keys.ESCAPE)
    page.until(lambda: page.find("#detail").get_attribute("open") is None)
    assert page.focus().get_attribute("class") == "title", "the focus comes back"
    made = "return document.querySelectorAll('body img, body svg, body script, body b b').length"
    assert page.driver.execute_script(made) == 0


def test_on_a_phone_one_list_at_a_time_and_nothing_too_wide(page, url):
    page.size(390)
    page.settled()
    page.add("silver eng", "Silver Engine")
    page.settled()
    assert page.find("#after").is_displayed() and not page.find("#before").is_displayed()
    page.tab_to("input[name=column][value=after]")
    page.press(Keys.ARROW_LEFT)
    page.until(lambda: page.find("#before").is_displayed() and not page.find("#after").is_displayed())
    assert page.overflow() <= 0


def test_without_weight_the_page_says_so_and_shows_both(page, url, rec):
    page.settled()
    weigh(rec, 0.0)
    try:
        page.add("silver eng", "Silver Engine")
        history = [rec.complete("silver engine", 1)[0].item_id]
        told = stages(url, history=history)
        assert expected(told["retrieval"]) == expected(told["default"])
        page.until(lambda: page.rows("before") == expected(told["retrieval"]))
        page.until(lambda: page.rows("after") == expected(told["language model"]))
        assert "weight is 0" in page.find("#note").text
        assert page.find("#after-title").text == "The language model alone"
        assert not page.find("#which").is_displayed()
        page.settled()
    finally:
        weigh(rec, 0.5)


def test_what_is_refused_is_said_in_the_words_of_the_server(page, url):
    page.settled()
    page.tab_to("#filters-box summary")
    page.press(Keys.ENTER)
    page.tab_to("#filters input[type=number]")
    page.press("3000")
    page.until(lambda: page.texts("#before .items") == ["Nothing meets these conditions."])
    page.tab_to("#filters-clear")
    page.press(Keys.ENTER)
    page.until(lambda: len(page.rows("before")) == 10)
    page.settled()


def test_without_a_model_and_with_keys(driver, tmp_path):
    plain = Recommender.fit(*toy_data(), {"encoder": {"name": "light", "dim": 16}})
    keys = [
        {"name": role, "role": role, "sha256": hashlib.sha256(key.encode()).hexdigest()}
        for role, key in (("write", KEY), ("read", KEY + " read"))
    ]
    page = Page(driver)
    with serving(plain, keys=keys, max_k=6) as url:
        page.open(url)
        page.until(lambda: page.find("#key-dialog").get_attribute("open") is not None)
        assert page.focus() == page.find("#key")
        page.press("wrong", Keys.ENTER)
        page.until(
            lambda: "does not know" in page.find("#key-title").text and page.find("#key").is_displayed()
        )
        page.press(KEY, Keys.ENTER)
        page.settled()
        assert "no language model" in page.find("#facts").text
        assert len(page.rows("before")) == len(page.ids("#seeds li")) == 6, "as many as the server allows"
        assert "finetune" in page.find("#after .about").text and page.rows("after") == []
        kept = driver.execute_script(
            "return [JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]"
        )
        assert KEY in kept[0] and kept[1:] == ["{}", ""]
        assert driver.current_url == f"{url}/"
        page.tab_to("#key-open", back=True)
        page.press(Keys.ENTER)
        page.until(lambda: page.find("#key").is_displayed())
        page.press(KEY + " read", Keys.ENTER)
        page.until(lambda: not page.find("#keep-field").is_displayed())
        page.tab_to("input[name=mode]")
        page.press(Keys.ARROW_RIGHT)
        page.tab_to("#user-input")
        page.press("u1", Keys.ENTER)
        page.until(lambda: page.texts("#past li"))
        page.settled()
        assert page.all("[data-act=choose]") == [], "this key may not store"
    plain.close()
    # The first requests without a key were refused, as they had to be.
    errors = [e["message"] for e in driver.get_log("browser") if e["level"] != "INFO"]
    assert errors and all("401" in message for message in errors)


def test_the_api_page_shows_every_endpoint_and_fits_a_phone(driver, url):
    page = Page(driver)
    page.open(f"{url}/docs", width=390)
    api = httpx2.get(f"{url}/openapi.json").json()
    wanted = {f"{verb.upper()} {path}" for path, own in api["paths"].items() for verb in own}
    page.until(lambda: len(driver.find_elements(By.TAG_NAME, "details")) == len(wanted))
    assert {code.text for code in driver.find_elements(By.CSS_SELECTOR, "summary code")} == wanted
    driver.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    text = driver.find_element(By.TAG_NAME, "details").text
    assert "id of a user whose stored history counts" in text and f"curl '{url}/v1/recommend'" in text
    assert page.overflow() <= 0 and not [e for e in driver.get_log("browser") if e["level"] != "INFO"]
