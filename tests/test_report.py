"""The report of an evaluation as a person opens it: in a real Chromium, desktop and phone, both themes."""

import json

import pytest

from llmrec.offline import evaluate
from llmrec.testing import tiny_lm, toy_data

pytest.importorskip("torch")
from browser import chromium, needs_chromium
from selenium.webdriver.common.by import By

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page, and the results that lie beside it."""
    folder = tmp_path_factory.mktemp("report")
    base = tiny_lm(tmp_path_factory.mktemp("lm"))
    config = {
        "encoder": {"name": "light", "dim": 16},
        "lm": {"base": str(base), "layers": 2, "rank": 4, "head_dim": 16, "precision": "float32"},
        "training": {"minutes": None, "steps": 8, "tokens_per_step": 300},
    }
    page = evaluate(*toy_data(users=80), config).report(folder, "llmrec evaluate ...")
    return page, json.loads((folder / "result.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def wear(driver, width, theme):
    """Take the width of a screen, and its theme."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    features = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def luminance(colour):
    """Of ``rgb(r, g, b)``, from 0 to 1, as WCAG 2 has it."""
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_page_shows_what_was_measured_and_loads_nothing(driver, report):
    page, result = report
    driver.get_log("performance")
    driver.get(page.as_uri())
    headings = [h.text for h in driver.find_elements(By.TAG_NAME, "h2")]
    assert headings.index("Every stage, full list") < headings.index("What is the ceiling?")
    measures = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr@10", "recall@20")
    tables = [
        [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")] for row in rows]
        for table in driver.find_elements(By.TAG_NAME, "table")
        if (rows := table.find_elements(By.TAG_NAME, "tr"))
    ]
    stages = next(table for table in tables if "NDCG@10" in "".join(table[0]).upper() and len(table) > 4)
    columns = [name.lower() for name in stages[0]]
    for row in stages[1:]:
        shown = {m: row[columns.index(m)] for m in measures if m in columns}
        assert len(shown) >= 4
        matching = [
            name
            for name, measured in result["systems"].items()
            if all(f"{measured[m]:.4f}" == value for m, value in shown.items())
        ]
        assert matching, row
    assert len(stages) - 1 == len(result["systems"])
    answer = driver.find_element(By.ID, "answer").text
    served = next(
        c for c in result["comparisons"] if (c["a"], c["b"], c["metric"]) == ("default", "merge", "ndcg@10")
    )
    assert answer.startswith(("Yes", "No"))
    if "within noise:" in answer or answer.startswith("Yes"):
        assert f"{served['difference']:+.4f}" in answer
    assert f"{result['dataset']['users']:,} users" in driver.find_element(By.TAG_NAME, "body").text
    asked = [
        json.loads(entry["message"])["message"]["params"]["request"]["url"]
        for entry in driver.get_log("performance")
        if '"Network.requestWillBeSent"' in entry["message"]
    ]
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_screen_and_can_be_read_in_both_themes(driver, report, width, theme):
    page, _ = report
    wear(driver, width, theme)
    driver.get(page.as_uri())
    across = driver.execute_script("return document.documentElement.scrollWidth")
    assert across <= width, "nothing sticks out to the side"
    script = "const s = getComputedStyle(arguments[0]); return [s.color, s.backgroundColor]"
    ground = driver.execute_script(script, driver.find_element(By.TAG_NAME, "body"))[1]
    assert (luminance(ground) < 0.2) == (theme == "dark")
    for element in driver.find_elements(By.CSS_SELECTOR, "h2, p, td")[:40]:
        ink = driver.execute_script(script, element)[0]
        light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, element.text
