"""The chat page: what a browser may do with it, and in Chromium, where there is one, what a person does with it."""

import base64
import hashlib
import json
import re
import shutil
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image

from smolvlm_exp.deploy.options import ServeConfig
from smolvlm_exp.deploy.server.app import Service
from smolvlm_exp.deploy.server.page import examples, page
from smolvlm_exp.deploy.session.backends import TorchModel
from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.utils.paths import PACKAGE

CAT = PACKAGE / "data" / "sources" / "photos" / "cat.jpg"
KEY = "sixteen-letters-of-a-key"
LIMITS = ServeConfig(max_images=6, max_tokens=900)
MODELS = {"tuned": "outputs/<b>a</b>/adapter", "base": "embedded"}  # a name that a page must escape
DROP = """(kind) => {
    const files = new DataTransfer();
    for (const name of ["a.png", "b.png"]) files.items.add(new File([name], name, { type: "image/png" }));
    const event = kind === "drop" ? new DragEvent(kind, { dataTransfer: files, bubbles: true, cancelable: true })
                                  : new ClipboardEvent(kind, { clipboardData: files, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
}"""


def test_only_its_own_script_and_style_may_run():
    html, headers = page()
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    for kind in ("script", "style"):
        (content,) = re.findall(rf"<{kind}[^>]*>(.*?)</{kind}>", html, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy.pop(f"{kind}-src") == f"'sha256-{digest}'"
    assert policy.pop("img-src") == "data:"
    assert policy.pop("connect-src") == "'self'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert set(policy.values()) == {"'none'"}
    assert set(policy) == {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert not re.search(r"\son\w+=|\sstyle=|https?://|innerHTML|eval\(", html)


def test_examples_are_images_that_the_model_can_know():
    drawn, photos = examples("embedded"), examples("HuggingFaceTB/SmolVLM-Instruct")
    assert len({each["image"] for each in (*drawn, *photos)}) == 4
    assert all(each["image"].startswith("data:image/png;base64,") for each in drawn)
    assert all(each["image"].startswith("data:image/jpeg;base64,") for each in photos)
    assert examples("embedded") == drawn


@pytest.fixture(scope="module")
def chromium():
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture(scope="module")
def addresses(adapted, processor, serve):
    """The same models, `free` and with a key (`locked`)."""
    sessions = [SmolVLMSession(TorchModel(adapted), processor, rows=2) for _ in range(2)]
    free, locked = (
        serve(session, LIMITS, Service(MODELS, max_new_tokens=12, api_key=key, examples=examples("embedded")))
        for session, key in zip(sessions, ("", KEY), strict=True)
    )
    return SimpleNamespace(free=free, locked=locked)


@pytest.fixture
def tab(chromium, addresses):
    """The page, in a browser of its own on a phone; what goes wrong in it fails the test."""
    context = chromium.new_context(viewport={"width": 390, "height": 844})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened, wrong = context.new_page(), []
    opened.set_default_timeout(20_000)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "console", lambda message: wrong.append(message.text)
    )  # failed requests appear there, and refused scripts
    opened.goto(addresses.free)
    opened.wait_for_selector("#examples button >> nth=1")
    opened.wrong = wrong
    yield opened
    context.close()
    assert wrong == []


def say(tab, text):
    tab.locator("#text").press_sequentially(text)
    tab.press("#text", "Enter")


def answered(tab, count=1):
    """Waits for the last turn's answers; returns their texts."""
    done = tab.locator(".turn:last-child .answer:not(.waiting)")
    done.nth(count - 1).locator(".copy").wait_for()
    return done.locator(".words").all_text_contents()


def last_request(tab, action):
    with tab.expect_request("**/v1/chat/completions") as sent:
        action()
    return json.loads(sent.value.post_data)


def test_a_conversation_with_images_that_survives_a_reload(tab):
    assert tab.text_content("#root") == "outputs/<b>a</b>/adapter on embedded"
    assert tab.title() == "tuned · smolvlm_exp"
    tab.set_input_files("#file", [CAT, CAT, CAT])
    tab.wait_for_selector(".thumb >> nth=2")
    tab.get_by_label("Remove image 2").click()
    assert tab.locator(".thumb").count() == 2
    say(tab, "Is <b>there</b> a star?")
    (first,) = answered(tab)
    assert first
    assert tab.locator(".thumb").count() == 0
    assert tab.locator(".user img").count() == 2
    assert tab.text_content(".user p") == "Is <b>there</b> a star?"
    assert "12 tokens in" in tab.text_content(".foot span")
    assert "cut at max tokens" in tab.text_content(".foot span")
    tab.click(".copy")
    tab.get_by_text("Copied").wait_for()
    assert tab.evaluate("navigator.clipboard.readText()") == first
    tab.reload()
    assert answered(tab) == [first]
    assert tab.locator(".user img").count() == 2
    sent = last_request(tab, lambda: say(tab, "And now?"))
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "user"]
    assert [part["type"] for part in sent["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    assert sent["messages"][1]["content"] == first
    answered(tab)
    tab.click("#reset")
    tab.reload()
    tab.wait_for_selector("#examples button >> nth=1")
    assert tab.locator(".turn").count() == 0


def test_a_conversation_outlives_a_server_that_is_away(tab):
    say(tab, "Why?")
    texts = answered(tab)
    tab.route("**/v1/models", lambda route: route.abort())
    tab.reload()
    tab.get_by_text("The server does not answer").wait_for()
    tab.unroute("**/v1/models")
    tab.reload()
    assert answered(tab) == texts
    tab.wrong.clear()  # the failed request


def test_dark_and_light_on_a_phone_and_a_screen(tab):
    shades = set()
    for scheme in ("dark", "light"):
        tab.emulate_media(color_scheme=scheme)
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        shades.add((scheme, sum(map(int, re.findall(r"\d+", colour))) > 380))
        for width in (390, 1400):
            tab.set_viewport_size({"width": width, "height": 844})
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            tab.get_by_text("Settings").click()
            box = tab.locator(".sheet").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            tab.get_by_text("Settings").click()
    assert shades == {("dark", False), ("light", True)}


def test_base_and_tuned_side_by_side(tab):
    tab.select_option("#models", "side by side")
    tab.click("#examples button >> nth=0")
    texts = answered(tab, 2)
    assert tab.locator(".answer h3").all_text_contents() == ["tuned", "base"]
    assert texts[0] != texts[1]
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    tab.select_option("#models", "base")
    sent = last_request(tab, lambda: say(tab, "Why?"))
    assert (sent["model"], sent["messages"][1]["content"]) == ("base", texts[1])
    answered(tab)


def test_settings_and_a_retry(tab):
    tab.get_by_text("Settings").click()
    tab.get_by_label("Temperature").fill("0.7")
    tab.get_by_label("Max tokens").fill("900")
    sent = last_request(tab, lambda: say(tab, "Why?"))
    assert (sent["temperature"], sent["max_tokens"]) == (0.7, 900)
    answered(tab)
    tab.get_by_label("Max tokens").fill("5")
    again = last_request(tab, lambda: tab.click(".retry"))
    assert again["messages"] == sent["messages"]
    assert again["seed"] != sent["seed"]
    tab.get_by_text(re.compile(r"^[1-5] tokens in")).wait_for()
    assert tab.locator(".turn").count() == 1
    tab.reload()
    answered(tab)
    assert tab.input_value("#temperature") == "0.7"


def test_a_stopped_answer_says_so(tab):
    """The request is held, so that it cannot end before the stop."""
    tab.route("**/v1/chat/completions", lambda route: None)
    say(tab, "Why?")
    tab.get_by_text("waiting for the model").wait_for()
    tab.click("#stop")
    tab.locator(".answer:not(.waiting)").get_by_text("stopped").wait_for()
    assert tab.is_visible("#send")
    tab.unroute("**/v1/chat/completions")
    tab.click(".retry")
    assert answered(tab)


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_images_are_dropped_and_pasted(tab, kind):
    """These ones are no images, which the server says; the page shows it."""
    tab.evaluate(DROP, kind)
    tab.wait_for_selector(".thumb >> nth=1")
    say(tab, "Why?")
    tab.locator(".problem:not(:empty)").wait_for()
    assert "an image cannot be decoded" in tab.text_content(".problem")
    assert [message for message in tab.wrong if "400" not in message] == []
    tab.wrong.clear()


def test_what_is_kept_for_a_reload_is_bounded(tab, tmp_path):
    """Large photos are sent smaller; of a long conversation the last turns come back."""
    Image.effect_noise((4000, 3000), 90).convert("RGB").save(tmp_path / "large.jpg", quality=95)
    tab.set_input_files("#file", tmp_path / "large.jpg")
    tab.wait_for_selector(".thumb")
    sent = last_request(tab, lambda: say(tab, "Why?"))
    url = sent["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    assert len(url) < tmp_path.joinpath("large.jpg").stat().st_size
    answered(tab)
    tab.evaluate("turns = Array.from({length: 9}, (_, i) => ({...turns[0], text: `${i}` + 'x'.repeat(9e5)})); save()")
    kept = tab.evaluate("localStorage.getItem(PLACE)")
    assert len(kept) < 4_100_000
    turns = json.loads(kept)["turns"]
    assert turns
    assert turns[-1]["text"][0] == "8"
    assert f"the last {len(turns)} of 9 turns" in tab.text_content("#status")


def test_a_server_with_a_key_is_asked_with_it(chromium, addresses):
    tab = chromium.new_page(viewport={"width": 390, "height": 844})
    tab.goto(addresses.locked)
    for key in ("another-key-of-letters", KEY):
        tab.wait_for_selector("#key[open]")
        with tab.expect_response("**/v1/models") as answer:
            tab.locator("#key_text").press_sequentially(key)
            tab.keyboard.press("Enter")
        assert answer.value.status == (200 if key == KEY else 401)
    tab.click("#examples button >> nth=0")
    assert answered(tab)
    assert tab.evaluate("JSON.stringify(localStorage)").count(KEY) == 0
    tab.close()


def test_the_pages_of_other_sites_cannot_read_or_frame_it(addresses):
    shown = httpx.get(addresses.free, headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in shown.headers
    assert "frame-ancestors 'none'" in shown.headers["content-security-policy"]
    assert shown.headers["x-content-type-options"] == "nosniff"
