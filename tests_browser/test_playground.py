"""The playground in headless Chromium: `make test-browser`. Skipped where there is no Chromium.

$SCREENSHOTS is a folder for pictures of the page, at each width and in each colour scheme; without it none are taken.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright
from served import starting
from tiny import make_tokenizer
from zoo import make_model

import foreword
from foreword.initialization import random_prefix
from foreword.keys import KeyFile

CURVE = [{"step": step, "loss": 2.0 - step / 20, "held_out_loss": 2.0 / (1 + step)} for step in range(0, 20, 2)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, or another one on the path, or Playwright's own."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=path)
        except Error as error:
            pytest.skip(f"no Chromium (apt-get install chromium): {error.message.splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_model("llama").float().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("files"), dict[str, Path]()
    for i, name in enumerate(("owl", "fox", "elk")):
        prefix = random_prefix(make_model("llama").float(), 3 + i, seed=i)
        prefix.metadata["template"] = make_tokenizer().chat_template
        prefix.metadata["training"] = {"rows": 120, "held_out_loss": 0.105, "curve": CURVE}
        prefix.metadata["evaluation"] = {"metrics": {"prefix": {"exact_match": 67.5}}}
        found[name] = foreword.save(prefix, folder / f"{name}.safetensors")
    return found


class Served:
    """A server with two prefixes and three keys."""

    def __init__(self, start: Any, model: Path, files: dict[str, Path], store: Path) -> None:
        self.store = store
        store.mkdir()
        for name in ("owl", "fox"):
            shutil.copy(files[name], store)
        keys = KeyFile(store / ".keys.json")
        self.manage = keys.add("boss", ("infer", "manage"))
        self.infer = keys.add("acme", prefixes=["owl"])
        self.url = start("--model", model, "--store", store, "--name", "tiny", "--precision", "float32").url

    def answer(self, model: str, text: str, tokens: int) -> str:
        """What the API says."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
        headers = {"Authorization": f"Bearer {self.manage}"}
        response = httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        return response.json()["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def served(model_folder: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One for all tests; each leaves the store as it was."""
    with starting() as start:
        yield Served(start, model_folder, files, tmp_path_factory.mktemp("served") / "store")


class Visit:
    """A page, and what went wrong on it."""

    def __init__(self, browser: Browser, served: Served, **options: Any) -> None:
        self.page: Page = browser.new_page(**options)
        self.errors, self.hosts = list[str](), set[str]()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/v1")[0].rstrip("/")))
        self.page.goto(served.url)

    def give_key(self, key: str) -> None:
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_label("API key").press("Enter")
        expect(self.page.get_by_role("status").first).to_contain_text("tiny, ")


def test_the_keyboard_alone_asks_three_models_side_by_side(browser, served):
    visit = Visit(browser, served)
    page = visit.page
    expect(page.get_by_role("status").first).to_contain_text("API key")  # it says what is missing
    page.keyboard.press("Tab")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(served.manage)
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").first).to_have_text("tiny, 2 prefixes")
    for name in ("tiny, no prefix", "fox", "owl"):  # all chosen to begin with
        page.keyboard.press("Tab")
        expect(page.get_by_label(name, exact=True)).to_be_focused()
        expect(page.get_by_label(name, exact=True)).to_be_checked()
    page.keyboard.press("Tab")
    page.keyboard.type("say owl")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("24")  # what a field holds is chosen when the Tab key leads to it
    page.keyboard.press("Enter")
    answers = page.get_by_role("article")
    expect(answers).to_have_count(3)
    for i, name in enumerate(("tiny", "fox", "owl")):
        expect(answers.nth(i).locator("small")).to_contain_text("first after")
        shown = answers.nth(i).locator("p").evaluate("e => e.textContent")
        assert shown == served.answer(name, "say owl", 24)
    assert (visit.errors, visit.hosts) == ([], {served.url})


def test_answers_grow_while_they_are_made_and_stop_when_told(browser, served):
    visit = Visit(browser, served)
    page = visit.page
    visit.give_key(served.manage)
    page.get_by_label("Most tokens").fill("1000")
    page.get_by_label("Prompt").fill("say fox")
    page.get_by_label("Prompt").press("Control+Enter")
    text = page.get_by_role("article").first.locator("p")
    expect(text).not_to_be_empty()
    before = text.evaluate("e => e.textContent")
    page.wait_for_function(
        "n => document.querySelector('article p').textContent.length > n", arg=len(before)
    )  # it has grown, and is not whole
    page.get_by_role("button", name="Stop").click()
    for answer in page.get_by_role("article").all():
        expect(answer.locator("small")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def test_a_manage_key_uploads_and_deletes(browser, served, files):
    visit = Visit(browser, served)
    page, rows = visit.page, visit.page.locator(".prefix")
    visit.give_key(served.infer)
    expect(rows).to_have_count(1)  # a customer's key shows the customer's prefix
    page.get_by_label("Prefix file").set_input_files(files["elk"])
    expect(page.get_by_label("Name")).to_have_value("elk")
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#told")).to_contain_text("has not the scope 'manage'")

    visit.give_key(served.manage)
    expect(rows).to_have_count(2)
    page.get_by_label("Prefix file").set_input_files(
        {"name": "broken.safetensors", "mimeType": "application/octet-stream", "buffer": b"broken"}
    )
    page.get_by_label("Name").fill("broken")
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#told")).to_contain_text("broken.safetensors")
    page.get_by_label("Prefix file").set_input_files(files["elk"])
    page.get_by_label("Name").fill("elk")
    page.get_by_role("button", name="Upload").press("Enter")
    expect(page.locator("#told")).to_have_text("elk is served.")
    expect(rows).to_have_count(3)
    expect(rows.first).to_contain_text("5 virtual tokens")
    expect(rows.first).to_contain_text("held-out loss 0.105 · exact match 67.5")
    expect(rows.first.get_by_role("img")).to_have_attribute(
        "aria-label", "Training curve: loss 2.00 at step 0, lowest 0.105"
    )
    assert rows.first.locator("polyline").bounding_box()["width"] > 50
    expect(page.get_by_label("elk", exact=True)).to_be_visible()

    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Delete elk").press("Enter")
    expect(rows).to_have_count(3)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete elk").press("Enter")
    expect(page.locator("#told")).to_have_text("elk is deleted.")
    expect(rows).to_have_count(2)
    expect(page.get_by_role("button", name="Delete fox")).to_be_focused()  # the next one, for who has no mouse
    assert visit.errors == []


@pytest.fixture
def forty(served: Served, files: dict[str, Path]) -> Iterator[None]:
    """Forty more prefixes."""
    copies = [served.store / f"owl-{i}.safetensors" for i in range(40)]
    for copy in copies:
        shutil.copy(files["owl"], copy)
    yield
    for copy in copies:
        copy.unlink()


@pytest.mark.usefixtures("forty")
def test_many_prefixes_are_found_by_a_part_of_their_name(browser, served):
    visit = Visit(browser, served)
    page, rows = visit.page, visit.page.locator(".prefix:visible")
    visit.give_key(served.manage)
    expect(rows).to_have_count(42)
    page.get_by_label("owl", exact=True).check()
    page.get_by_label("Find").fill("L-3")
    expect(rows).to_have_count(11)
    expect(page.get_by_label("owl-35", exact=True)).to_be_visible()
    expect(page.get_by_label("owl", exact=True)).to_be_visible()  # chosen, so it stays in sight
    expect(page.get_by_label("owl-20", exact=True)).to_be_hidden()


CONTRAST = """
() => {
  const numbers = c => { const d = document.createElement("canvas").getContext("2d"); d.fillStyle = c; d.fillRect(0, 0, 1, 1); return d.getImageData(0, 0, 1, 1).data; };
  const light = c => [...numbers(c)].slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (numbers(c)[3]) return c; } return "white"; };
  const low = [];
  for (const e of document.querySelectorAll("body *")) {
    const shown = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || ["INPUT", "TEXTAREA"].includes(e.tagName);
    if (!shown || !e.checkVisibility() || e.disabled || ["SCRIPT", "STYLE"].includes(e.tagName)) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) low.push(`${e.tagName} ${e.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return low;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_it_fits_and_can_be_read(browser, served, width, height, scheme):
    visit = Visit(
        browser, served, viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=width < 500
    )
    page = visit.page
    visit.give_key(served.manage)
    page.get_by_label("Most tokens").fill("16")
    page.get_by_label("Prompt").fill("say owl")
    page.get_by_role("button", name="Answer").click()
    expect(page.get_by_text("first after")).to_have_count(3)
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{width}-{scheme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for control in page.locator("input:visible, textarea:visible, button:visible").all():
        box = control.bounding_box()
        assert max(-box["x"], box["x"] + box["width"] - width) <= 0, control
    for button in page.locator("button:visible, .chip:visible").all():
        assert button.bounding_box()["height"] >= 36, button  # large enough for a finger
    assert page.evaluate(CONTRAST) == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
    assert dark == (scheme == "dark")
