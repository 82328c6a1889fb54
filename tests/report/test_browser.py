"""The page in a real browser: Debian's chromium, driven through its own driver's HTTP interface, without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
KEY = "element-6066-11e4-a52e-4f735466cecf"  # how WebDriver names an element
ENTER = "\ue007"


def chromium() -> tuple[str, str]:
    """The browser and its driver, from Debian's packages where they are missing and may be installed; else skip."""
    found = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in found and shutil.which("apt-get") and os.geteuid() == 0:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        packages = ["--no-install-recommends", "chromium", "chromium-driver"]
        for command in (["update", "-qq"], ["install", "-y", "-qq", *packages]):
            done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, check=False, timeout=600)
            if done.returncode:
                pytest.skip(f"chromium is missing and apt-get {command[0]} failed")
        found = [shutil.which("chromium"), shutil.which("chromedriver")]
    browser, driver = found
    if browser is None or driver is None:
        pytest.skip("chromium and chromium-driver are missing and cannot be installed here")
    return browser, driver


class Browser:
    """A WebDriver session: `js` runs a function body in the page, `logs` are what the page said and asked for."""

    def __init__(self, address: str, binary: str, profile: Path):
        self.address = address
        options = {"binary": binary, "args": [*FLAGS, f"--user-data-dir={profile}", "--window-size=1300,900"]}
        wanted = {
            "browserName": "chrome", "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }  # fmt: skip
        self.session = ""
        answer = self.call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self.session = "/" + answer["sessionId"]

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/session{self.session}{path}", data, method=method)
        request.add_header("Content-Type", "application/json")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def js(self, body: str, *arguments: Any) -> Any:
        return self.call("POST", "/execute/sync", {"script": body, "args": list(arguments)})

    def find(self, selector: str) -> str:
        return self.call("POST", "/element", {"using": "css selector", "value": selector})[KEY]

    def click(self, selector: str) -> None:
        element = self.find(selector)
        self.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", {KEY: element})
        self.call("POST", f"/element/{element}/click", {})

    def type(self, selector: str, text: str) -> None:
        self.call("POST", f"/element/{self.find(selector)}/value", {"text": text})

    def logs(self, kind: str) -> list[dict[str, Any]]:
        return self.call("POST", "/se/log", {"type": kind})


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary, driver = chromium()
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        port = next((m[1] for line in process.stdout if (m := re.search(r"successfully on port (\d+)", line))), None)
        if port is None:
            pytest.skip("chromedriver did not start")
        window = Browser(f"http://127.0.0.1:{port}", binary, tmp_path_factory.mktemp("profile"))
        yield window
        window.call("DELETE", "")
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture
def page(browser: Browser, written: Path) -> Browser:
    browser.call("POST", "/url", {"url": written.as_uri()})
    look = "performance.getEntriesByName('chart').length ? done() : setTimeout(look, 20)"
    drawn = f"const done = arguments[0]; (function look() {{ {look}; }})()"
    browser.call("POST", "/execute/async", {"script": drawn, "args": []})
    return browser


def column(page: Browser, name: str) -> list[Any]:
    """The values of a column in the order of the rows on the page."""
    return page.js(
        "return [...document.querySelectorAll('#runs tbody tr')].map(row => "
        "RUNS[arguments[0]][Number(row.dataset.run)])",
        name,
    )


def test_no_error_and_no_request(page: Browser) -> None:
    page.js("window.scrollTo(0, document.body.scrollHeight)")
    assert [entry["message"] for entry in page.logs("browser")] == []
    messages = [json.loads(entry["message"])["message"] for entry in page.logs("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    asked = [one["request"]["url"] for one in sent if one["documentURL"].startswith("file:")]  # not the empty window's
    assert asked, "the page itself is in the log"
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked
    assert len([url for url in asked if url.startswith("file:")]) == 1


def test_sorting_by_mouse_and_by_keyboard(page: Browser) -> None:
    before = column(page, "aa_acc")
    known = [v for v in before if v is not None]
    assert known == sorted(known, reverse=True)
    button = "#runs th[data-column='cost_usd'] button"
    page.click(button)
    cheapest = column(page, "cost_usd")
    assert cheapest[-1] is None, "unknown is last"
    assert cheapest[:-1] == sorted(cheapest[:-1])
    assert page.js('return document.querySelector("#runs th[aria-sort]").dataset.column') == "cost_usd"
    page.js("document.querySelector(arguments[0]).focus()", button)
    page.type(button, ENTER)
    dearest = column(page, "cost_usd")
    assert dearest[-1] is None
    assert dearest[:-1] == sorted(dearest[:-1], reverse=True)
    assert page.js("return document.querySelector(\"#runs th[aria-sort]\").getAttribute('aria-sort')") == "descending"
    assert "by cost, highest first" in page.js("return document.getElementById('run-count').textContent")
    assert len(dearest) == 30


def test_filtering(page: Browser) -> None:
    shown = "return [...document.querySelectorAll('#runs tbody tr:not([hidden])')].map(r => RUNS.slug[r.dataset.run])"
    page.type("#run-filter input[name=text]", "trades 16-4")
    assert sorted(page.js(shown)) == ["digits-wrn-16-4-trades5", "digits-wrn-16-4-trades5-syn"]
    assert "2 of 30 runs shown" in page.js("return document.getElementById('run-count').textContent")
    page.js(
        "const s = document.querySelector('#run-filter select[name=synthetic]'); s.value = 'yes';"
        "s.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert page.js(shown) == ["digits-wrn-16-4-trades5-syn"]


def drawn(page: Browser) -> dict[str, Any]:
    return page.js(
        "const c = document.getElementById('chart'); return "
        "{x: c.layout.xaxis.title.text, y: c.layout.yaxis.title.text,"
        "traces: c.data.map(t => "
        "({name: t.name, mode: t.mode, x: [...t.x], y: [...t.y], bars: t.error_y && [...t.error_y.array]}))}"
    )


def choose(page: Browser, name: str, value: str) -> None:
    page.js(
        "const s = document.querySelector(`#chart-form [name=${arguments[0]}]`); s.value = arguments[1];"
        "s.dispatchEvent(new Event('change', {bubbles: true}))",
        name, value,
    )  # fmt: skip


def test_the_chart_holds_the_runs_and_the_axis_switches(page: Browser) -> None:
    first = drawn(page)
    assert first["x"] == "Training compute (FLOP)"
    points = [t for t in first["traces"] if t["mode"] == "markers"]
    assert {t["name"] for t in points} == {"standard", "AT", "TRADES"}
    flops = page.js("return RUNS.train_flops_exact.filter((_, i) => RUNS.aa_acc[i] !== null)")
    assert sorted(x for t in points for x in t["x"]) == sorted(flops)
    assert any(t["name"] == "power law" for t in first["traces"])
    assert all(t["bars"] for t in points)
    choose(page, "x", "cost_usd")
    second = drawn(page)
    assert second["x"] == "Electricity cost ($)"
    dollars = page.js("return RUNS.cost_usd.filter((v, i) => v !== null && RUNS.aa_acc[i] !== null)")
    assert sorted(x for t in second["traces"] if t["mode"] == "markers" for x in t["x"]) == sorted(dollars)
    assert "1 not drawn" not in page.js("return document.querySelector('.chart-note').textContent")
    assert "2 not drawn" in page.js("return document.querySelector('.chart-note').textContent")
    choose(page, "colour", "steps")
    assert {t["name"] for t in drawn(page)["traces"] if t["mode"] == "markers"} == {"0", "1", "2", "5"}
    choose(page, "y", "clean_acc")
    third = drawn(page)
    assert third["y"] == "Clean accuracy (%)"
    assert not any(t["name"] == "power law" for t in third["traces"]), "the law is of another result"


def test_a_law_is_chosen_and_left_out(page: Browser) -> None:
    choose(page, "law", "saturating law")
    assert any(t["name"] == "saturating law" for t in drawn(page)["traces"])
    choose(page, "law", "")
    assert not any("law" in (t["name"] or "") for t in drawn(page)["traces"])


def test_the_planner(page: Browser) -> None:
    said = "return document.querySelector(`#plan-budget output`).textContent"
    page.js(
        "const f = document.getElementById('plan-budget'); f.elements.unit.value = 'train_flops_exact|1.0';"
        "f.elements.amount.value = '2e12'; f.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    within = page.js(said)
    assert "digits-wrn-10-1-trades5-syn" in within
    assert "wrn-16" not in within
    assert re.search(r"should reach \d+\.\d% \[", within)
    page.js(
        "const f = document.getElementById('plan-budget'); f.elements.amount.value = '1'; f.dispatchEvent(new "
        "Event('input'))"
    )
    assert "No run cost as little as" in page.js(said)
    page.js(
        "const f = document.getElementById('plan-target'); f.elements.amount.value = '99'; f.dispatchEvent(new "
        "Event('input'))"
    )
    assert "No run reached 99%" in page.js("return document.querySelector('#plan-target output').textContent")


def test_the_pages_numbers_are_written_as_the_reports(page: Browser) -> None:
    from robudget.columns import column as column_named

    columns = ("train_flops_exact", "train_energy_kwh", "cost_usd", "co2_kg", "train_seconds", "parameters", "aa_acc")
    for column_name in columns:
        for value in (None, 0.0, 3.7e-7, 0.0123, 0.9951, 1.0, 59.94, 61.0, 1234.6, 4.2e7, 9.9999e17):
            there = page.js("return write(arguments[0], arguments[1])", column_name, value)
            assert there == column_named(column_name).write(value), (column_name, value)


def test_dark_and_light(page: Browser) -> None:
    theme = "return document.documentElement.dataset.theme"
    paper = "return getComputedStyle(document.body).backgroundColor"
    before, colour = page.js(theme), page.js(paper)
    page.click(".theme")
    assert {before, page.js(theme)} == {"light", "dark"}
    assert page.js(paper) != colour


@pytest.mark.parametrize("width", [360, 768, 1300])
def test_nothing_is_wider_than_the_window(page: Browser, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
    try:
        assert page.js("return innerWidth") == width
        wide = page.js(
            "const over = e => e.getBoundingClientRect().right > innerWidth + 1;"
            "const free = e => !e.closest('.scroll, .drawing, svg, #chart, pre');"  # these scroll inside
            "return [...document.querySelectorAll('body *')].filter(e => over(e) && free(e)).map(e => e.outerHTML)"
        )
        assert wide == []
        assert page.js("return document.documentElement.scrollWidth") <= width
    finally:
        page.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.clearDeviceMetricsOverride", "params": {}})


def test_the_downloaded_table_is_the_table(page: Browser) -> None:
    page.js(
        "URL.createObjectURL = blob => { window.saved = blob; return 'blob:none'; };"
        "HTMLAnchorElement.prototype.click = function () { window.savedAs = this.download; };"
        "document.getElementById('download').click()"
    )
    text = page.call(
        "POST", "/execute/async", {"script": "window.saved.text().then(arguments[0])", "args": []}
    )  # fmt: skip
    lines = text.splitlines()
    assert page.js("return window.savedAs") == "runs.csv"
    assert len(lines) == 31
    head = lines[0].split(",")
    best = dict(zip(head, lines[1].split(","), strict=True))
    assert best["slug"] == "digits-wrn-16-4-trades5-syn"
    assert float(best["aa_acc"]) == page.js("return RUNS.aa_acc[0]")
    assert dict(zip(head, lines[-1].split(","), strict=True))["aa_acc"] == ""
