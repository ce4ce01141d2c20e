"""The page that a server shows, in Chromium, beside what the model gives in this process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dlrm
from asking import ask
from browsing import CONTRAST
from dlrm.bundles import Bundle
from dlrm.loadtest.server import Server
from dlrm.prediction import Predictor
from dlrm.serve.card import page, read_card

VIEWS = [(scheme, width) for scheme in ("light", "dark") for width in (1280, 360)]
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
READY = f"() => document.getElementById('probability').textContent !== '{DASH}'"
MISSING = {"dense": 0, "sparse": "00000000"}


@pytest.fixture(scope="module")
def predictor(small_bundle: Path) -> Predictor:
    return dlrm.load(small_bundle)


@pytest.fixture(scope="module")
def examples(small_bundle: Path) -> list[dict[str, Any]]:
    """Raw values of the example rows, by feature."""
    return [dict(row.features) for row in Bundle.open(small_bundle).examples().rows]


def opened(browser: Any, served: Server, scheme: str = "light", width: int = 1280) -> Any:
    """The page in a window, with all that was requested and said meanwhile."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(10_000)
    shown = context.new_page()
    shown.said = []
    shown.requested = []
    shown.on("console", lambda message: shown.said.append(message.text))
    shown.on("pageerror", lambda error: shown.said.append(str(error)))
    shown.on("request", lambda asked: shown.requested.append(asked.url))
    return shown


@pytest.fixture(scope="module", params=VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")
def view(request: pytest.FixtureRequest, chromium: Any, served: Server) -> Iterator[Any]:
    shown = opened(chromium, served, *request.param)
    shown.goto(f"http://{served.http}/")
    shown.wait_for_function(READY)
    yield shown
    shown.context.close()


@pytest.fixture
def shown(chromium: Any, served: Server) -> Iterator[Any]:
    """A page of its own, ready."""
    shown = opened(chromium, served)
    shown.goto(f"http://{served.http}/")
    shown.wait_for_function(READY)
    yield shown
    shown.context.close()


def predict(predictor: Predictor, rows: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    names = rows[0].keys()
    return predictor.predict({name: [row[name] for row in rows] for name in names})


def percent(probability: float) -> str:
    return "< 0.01%" if probability < 1e-4 else f"{100 * probability:.2f}%"


def bars(shown: Any) -> list[tuple[str, str]]:
    """Names and percentage points, as the page shows them."""
    rows = shown.query_selector_all("#effects tr")
    return [
        (
            row.query_selector("th").evaluate("e => e.firstChild.textContent"),
            row.query_selector_all("td")[1].inner_text(),
        )
        for row in rows
    ]


def effects(
    predictor: Predictor, row: dict[str, Any], baseline: dict[str, Any]
) -> dict[str, float]:
    """By how many points the probability is above that of the row with one feature as there."""
    names = [name for name in row if row[name] != baseline[name]]
    others = [{**row, name: baseline[name]} for name in names]
    own, *without = predict(predictor, [row, *others])
    return {name: 100 * (own - each) for name, each in zip(names, without, strict=True)}


def check_bars(shown: Any, expected: dict[str, float]) -> None:
    found = bars(shown)
    sizes = [abs(float(points.replace(MINUS, "-"))) for _, points in found]
    assert sizes == sorted(sizes, reverse=True)
    assert len(found) == min(10, len(expected))
    for name, points in found:
        assert float(points.replace(MINUS, "-")) == pytest.approx(expected[name], abs=0.00501)
    others = [abs(value) for name, value in expected.items() if name not in dict(found)]
    assert max(others, default=0) <= sizes[-1] + 0.01


def test_only_the_server_is_asked_and_nothing_goes_wrong(view: Any, served: Server) -> None:
    origin = f"http://{served.http}/"
    asked = [url for url in view.requested if not url.startswith("data:")]
    # The row and its variants are more rows than this server takes at a time.
    assert asked == [origin, f"{origin}card", *[f"{origin}v2/models/dlrm/infer"] * 2]
    assert view.said == []


def test_nothing_is_wider_than_the_window(view: Any) -> None:
    widths = view.evaluate("() => [document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1]
    cut = view.evaluate(
        "() => [...document.querySelectorAll('main *:not(.scroll *)')].filter(e => "
        "e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert cut == []


def test_contrast_is_enough(view: Any) -> None:
    found = view.evaluate(CONTRAST)
    assert len(found) > 100
    assert [each for each in found if each["ratio"] < each["least"]] == []


def test_fields_are_large_enough_to_touch_and_named(view: Any) -> None:
    fields = view.evaluate(
        "() => [...document.querySelectorAll('input, select, button')].map(e => "
        "[e.tagName, e.labels.length, e.getBoundingClientRect().height])"
    )
    assert len(fields) == 39 + 2 + 3
    for tag, labels, height in fields:
        assert height >= 44
        assert labels == (0 if tag == "BUTTON" else 1)


def test_the_probability_and_the_bars_are_the_models(
    shown: Any, predictor: Predictor, examples: list[dict[str, Any]]
) -> None:
    nothing = {
        name: MISSING["sparse" if name.startswith("cat") else "dense"] for name in examples[0]
    }
    for number, example in enumerate(examples[:3]):
        shown.select_option("#example", str(number))
        expected = percent(predict(predictor, [example])[0])
        shown.wait_for_function(
            "text => document.getElementById('probability').textContent === text"
            " && !document.querySelector('.busy')",
            arg=expected,
        )
        check_bars(shown, effects(predictor, example, nothing))
    with shown.expect_response("**/infer"):
        shown.select_option("#baseline", "0")
    shown.wait_for_selector("#answer:not(.busy)")
    check_bars(shown, effects(predictor, examples[2], examples[0]))
    assert "were that of example 1" in shown.inner_text("#meaning")
    assert shown.inner_text("#probability") == percent(predict(predictor, [examples[2]])[0])


def test_all_bars_are_shown_if_asked(shown: Any) -> None:
    assert len(bars(shown)) == 10
    shown.click("#more")
    assert len(bars(shown)) > 20
    assert shown.get_attribute("#more", "aria-expanded") == "true"
    shown.click("#more")
    assert len(bars(shown)) == 10


def test_a_row_is_filled_in_by_keyboard_alone(
    shown: Any, predictor: Predictor, examples: list[dict[str, Any]]
) -> None:
    changed = {**examples[0], "int_0": 7, "cat_0": "0badf00d"}
    assert [input_of(shown, name) for name in ("int_0", "cat_0")]
    for _ in range(60):
        shown.keyboard.press("Tab")
        name = shown.evaluate("() => document.activeElement.labels?.[0]?.textContent")
        if name in ("int_0", "cat_0"):
            outline = shown.evaluate("() => getComputedStyle(document.activeElement).outlineWidth")
            assert float(outline.removesuffix("px")) >= 2
            shown.keyboard.press("Control+a")
            shown.keyboard.type(str(changed[name]))
        if name == "cat_0":
            break
    with shown.expect_response("**/infer"):
        shown.keyboard.press("Enter")
    shown.wait_for_selector("#answer:not(.busy)")
    assert shown.inner_text("#probability") == percent(predict(predictor, [changed])[0])
    told = shown.inner_text("#unknown")
    assert "For 1 of the 26 categories the model has no vector" in told
    assert "another model" not in told
    shown.evaluate("() => { card.version = 'earlier' }")
    with shown.expect_response("**/infer"):
        shown.keyboard.press("Enter")
    shown.wait_for_selector("#answer:not(.busy)")
    assert "The server has another model now (version " in shown.inner_text("#unknown")


def input_of(shown: Any, name: str) -> Any:
    return shown.get_by_label(name, exact=True)


def test_a_value_that_is_none_of_its_feature_is_told_at_its_field(shown: Any) -> None:
    input_of(shown, "cat_3").fill("no hex")
    input_of(shown, "int_2").fill("1.5")
    asked = len(shown.requested)
    shown.click("button[type=submit]")
    assert "2 fields are not as expected: see int_2, cat_3" in shown.inner_text("#error")
    assert input_of(shown, "cat_3").get_attribute("aria-invalid") == "true"
    note = input_of(shown, "cat_3").get_attribute("aria-describedby")
    assert "8 hexadecimal digits" in shown.inner_text(f"#{note}")
    assert shown.evaluate("() => document.activeElement.labels[0].textContent") == "int_2"
    assert len(shown.requested) == asked
    input_of(shown, "cat_3").fill("")
    input_of(shown, "int_2").fill("-4")
    with shown.expect_response("**/infer"):
        shown.click("button[type=submit]")
    assert shown.is_hidden("#error")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"status": 503, "body": '{"error": "the server is full."}'}, "busy or being restarted"),
        ({"status": 400, "body": '{"error": "such is wrong."}'}, "(status 400): such is wrong."),
        ({"status": 502, "body": "<html>"}, "status 502, and not with JSON"),
        (None, "cannot be reached"),
    ],
)
def test_what_the_server_refuses_is_told_in_words(
    shown: Any, answer: dict[str, Any] | None, told: str
) -> None:
    shown.route(
        "**/infer", lambda route: route.abort() if answer is None else route.fulfill(**answer)
    )
    shown.click("button[type=submit]")
    shown.wait_for_selector("#error:not([hidden])")
    assert told in shown.inner_text("#error")
    assert shown.inner_text("#probability") == DASH
    shown.unroute("**/infer")
    shown.click("button[type=submit]")
    shown.wait_for_function(READY)
    assert shown.is_hidden("#error")


def test_a_model_of_prepared_rows_has_no_form(chromium: Any, served: Server) -> None:
    shown = opened(chromium, served)
    card = served.get("/card") | {"takes_raw_rows": False}
    shown.route("**/card", lambda route: route.fulfill(json=card))
    shown.goto(f"http://{served.http}/")
    shown.wait_for_selector("#card:not([hidden])")
    assert shown.is_hidden("#work")
    assert "prepared rows alone" in shown.inner_text("#error")
    shown.context.close()


def test_the_row_as_a_program_sends_it_gives_the_same(
    shown: Any, served: Server, predictor: Predictor, examples: list[dict[str, Any]]
) -> None:
    shown.click("summary")
    command = shown.inner_text("#request")
    found = re.fullmatch(r"curl (http://\S+) -d '(.*)'", command)
    assert found
    path = found[1].removeprefix(f"http://{served.http}")
    (probability,) = json.loads(ask(served, "POST", path, found[2])[2])["outputs"][0]["data"]
    assert probability == pytest.approx(predict(predictor, examples[:1])[0], abs=1e-6)


def test_the_card_tells_of_the_training(shown: Any, small_bundle: Path) -> None:
    trained = Bundle.open(small_bundle).info.trained
    facts = shown.inner_text("#facts")
    assert f"Trained on\t{trained.result['train_samples']:,} rows, 1 pass" in facts
    assert "Made from\ttrain.txt" in facts
    assert f"Rows of test\t{trained.rows['test']:,}" in facts
    metrics = shown.inner_text("#metrics")
    for split in ("validation", "test"):
        assert f"{split}\t{trained.result['metrics'][split]['auc']:.4f}" in metrics
    assert shown.inner_text("#headline").startswith("AUC ")


def test_the_browser_runs_nothing_but_the_pages_own_script(shown: Any, served: Server) -> None:
    _, headers, _ = ask(served, "GET", "/")
    assert headers["Content-Security-Policy"] == page().policy
    assert "unsafe" not in page().policy
    ran = shown.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        " document.body.append(s); return window.ran ?? 0; }"
    )
    assert ran == 0
    assert "Content Security Policy" in shown.said[-1]


def test_the_card_of_a_run_is_read_too(small_bundle: Path) -> None:
    run = small_bundle.parent / "run"
    of_run = read_card(dlrm.load(run), "m", "1", 8)
    of_bundle = read_card(dlrm.load(small_bundle), "m", "1", 8)
    assert of_run.metrics == of_bundle.metrics
    assert of_run.headline == of_bundle.headline
    assert of_run.examples == []
    assert set(of_run.facts) < set(of_bundle.facts)
