"""The web page in a real browser, against a real server with tiny models."""

import io
import json
import shutil
import string
import time

import pytest
import torch

from blip2.search.indexing import index
from blip2.search.library import Library
from blip2.serve.app import create_app
from conftest import draw
from fixtures.library import draw_photos
from fixtures.service import build_writer, serve

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")

KEY = "a-key-of-some-length"
FIRST, SECOND = "what is it", "and where"
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
DROP = """([target, bytes, name]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
    for (const type of ["dragenter", "dragover", "drop"])
        target.dispatchEvent(new DragEvent(type, { bubbles: true, cancelable: true, dataTransfer: transfer }));
}"""
COMPARE = """images => {
    document.querySelector("nav a[href='#compare']").click();
    for (const bytes of images) {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], "image.png", { type: "image/png" }));
        document.dispatchEvent(new ClipboardEvent("paste", { bubbles: true, clipboardData: transfer }));
    }
}"""
"""Opens the view of two images and pastes them, before the browser tells the page that its address has changed."""


def answers(writer, image):
    """The answers to two questions, and to the second one alone."""
    first = writer.chat(image).ask(FIRST).strip()
    turns = [{"role": "user", "content": FIRST}, {"role": "assistant", "content": first}]
    return [first, writer.chat(image, turns).ask(SECOND).strip(), writer.chat(image).ask(SECOND).strip()]


@pytest.fixture(scope="module")
def models(parts, pipeline):
    """A model that writes letters and spaces, and one that compares."""
    writer = build_writer(parts)
    tokens = [writer.tokenizer.decode([token]) for token in range(len(writer.tokenizer))]
    head = writer.model.language.network.get_output_embeddings().weight
    images = [draw(shape, color, 0) for shape, color in (("disc", "red"), ("square", "blue"))]
    with torch.no_grad():
        head[[token not in string.ascii_letters + "  " for token in tokens]] = 0
        for seed in range(200):  # the end and the space come soon, and captions have several words
            generator = torch.Generator().manual_seed(seed)
            head[[256, tokens.index(" ")]] = 0.5 * torch.randn(2, head.shape[1], generator=generator)
            captions = writer.caption(images, decoding=greedy())
            if all(len(text.split()) > 1 for text in captions) and all(answers(writer, images[1])):
                return {"writer": writer, "matcher": pipeline}
    raise AssertionError("no captions of several words")


@pytest.fixture(scope="module")
def library(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    photos = draw_photos(folder / "photos")
    rows = [{"image": path.name, "captions": [f"a {path.stem}"], "year": 2020} for path in sorted(photos.iterdir())]
    (photos / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index(pipeline, str(photos / "table.jsonl"), folder / "library")
    return Library.open(folder / "library", pipeline)


@pytest.fixture(scope="module")
def address(models, library):
    with serve(create_app(models, library)) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens the page. At the end, nothing may have gone to another host, and the console must be empty."""
    contexts, problems = [], []

    def visit(address, expected_status=(), **options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(120_000)
        page = context.new_page()

        def check(route):
            if route.request.url.startswith((address, "data:", "blob:")):
                route.continue_()
            else:
                problems.append(f"a request to {route.request.url}")
                route.abort()

        def log(message):
            if not any(f"status of {status}" in message.text for status in expected_status):
                problems.append(f"{message.type}: {message.text}")

        context.route("**/*", check)
        page.on("console", log)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        wait(lambda: page.locator("#view-image:visible, #key-form:visible").count())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert problems == []


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def wait(condition):
    """Wait in Python: the page's own policy allows no evaluation of strings, which Playwright's waiting needs."""
    end = time.monotonic() + 120
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen within two minutes"
        time.sleep(0.02)
    return value


def drop(page, image, place="#drop"):
    page.evaluate(DROP, [page.query_selector(f"{place} .frame"), list(png(image)), "image.png"])


def words_of(page, selector):
    """The text of a place once it is complete, when its words can be pointed at."""
    wait(lambda: page.locator(f"{selector} .word").count() and not page.locator(f"{selector}.waiting").count())
    return page.locator(selector).inner_text().strip()


def ask(page, question):
    number = page.locator("#turns .turn").count() + 1
    page.fill("#question", question)
    page.press("#question", "Enter")
    return words_of(page, f"#turns .turn:nth-child({number}) .answer")


def serious(page):
    """What axe finds, as far as it keeps somebody from using the page."""
    found = axe.Axe().run(page).response["violations"]
    return [
        (each["id"], [node["target"] for node in each["nodes"]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def test_drop_an_image_read_its_caption_and_ask_twice(visit, address, models):
    page = visit(address)
    assert page.title() == "What is in an image | blip2"
    image = draw("square", "blue", 0)
    drop(page, image)
    writer = models["writer"]
    assert words_of(page, "#caption-text") == "".join(writer.stream(image)).strip() != ""
    first, second, alone = answers(writer, image)
    assert ask(page, FIRST) == first
    assert ask(page, SECOND) == second
    page.uncheck("#remember")
    assert ask(page, SECOND) == alone
    wait(lambda: page.locator("#spoken").inner_text().startswith("Answer: "))
    page.click("#ask-again")
    assert page.locator("#turns .turn").count() == 0
    assert serious(page) == []


def test_a_word_shows_its_probability_its_alternatives_and_what_it_depends_on(visit, address, models):
    page = visit(address)
    image = draw("disc", "red", 0)
    drop(page, image)
    text = words_of(page, "#caption-text")
    [generated] = models["writer"].caption(image, decoding=greedy(), details=True)
    word = page.locator("#caption-text .word").nth(1)
    assert word.inner_text() == text.split()[1]
    word.hover()
    details = page.locator("#details")
    wait(lambda: "With a blank image" in details.inner_text())
    start = generated.text.index(" ") + 1
    end = start + len(text.split()[1])
    probability = torch.tensor(generated.token_log_probs[start:end]).sum().exp().item()
    assert f"sure of “{text.split()[1]}”" in details.inner_text()
    assert percent(probability) in details.inner_text()
    assert details.locator("dl").count() == end - start and details.locator("dl").first.locator("dt").count() >= 5
    assert page.locator("#drop figcaption").inner_text() == f"For “{text.split()[1]}”"
    assert page.locator("#drop canvas").is_visible() and serious(page) == []
    page.mouse.move(1, 1)
    wait(lambda: not details.is_visible() and not page.locator("#drop canvas").is_visible())
    page.locator("#query-maps button").nth(2).click()
    assert page.locator("#drop figcaption").inner_text() == "Query 2"
    assert page.locator("#query-maps button").count() == 1 + models["writer"].config.qformer.num_query_tokens
    page.click("#drop .clear-map")
    assert page.locator("#query-maps [aria-pressed=true]").count() == 0
    word.hover()
    wait(details.is_visible)
    page.evaluate("() => { location.hash = '#compare'; }")
    wait(lambda: page.locator("#view-compare").is_visible() and not details.is_visible())


def greedy():
    from blip2.decoding.options import CAPTION_DECODING

    return CAPTION_DECODING.without_beams()


def percent(value):
    value *= 100
    return "100 %" if value >= 99.95 else "< 0.1 %" if value < 0.1 else f"{value:.{int(value < 10)}f} %"


def test_texts_are_matched_with_the_image(visit, address, pipeline):
    page = visit(address)
    image = draw("disc", "red", 0)
    drop(page, image)
    texts = ["a red disc", "a blue square", "nothing at all"]
    page.fill("#lines", "\n".join(["", *texts, "  "]))
    page.click("#match-form button")
    rows = page.locator("#match-results tbody tr")
    wait(lambda: rows.count() == 3)
    itc, itm = pipeline.similarity(image, texts)[0], pipeline.match(image, texts)[0]
    order = itm.argsort(descending=True).tolist()
    expected = [[texts[i], f"{itc[i]:.3f}", percent(float(itm[i]))] for i in order]
    assert [row.split("\t") for row in rows.all_inner_texts()] == expected


def test_two_images_are_compared_and_asked_the_same(visit, address, models, pipeline):
    page = visit(address)
    images = [draw("disc", "red", 0), draw("stripe", "green", 0)]
    page.evaluate(COMPARE, [list(png(image)) for image in images])
    value = wait(lambda: page.locator("#similarity strong").count() and page.locator("#similarity strong").inner_text())
    first, second = pipeline.embed_images(images)
    assert value == f"{float((first @ second.T).amax(dim=1).mean()):.3f}"
    page.fill("#both-question", "what is it")
    page.press("#both-question", "Enter")
    for number, image in enumerate(images):
        answer = words_of(page, f"#both-turns .answers > div:nth-child({number + 1}) .answer")
        assert answer == models["writer"].chat(image).ask("what is it").strip()
    assert serious(page) == []


def test_the_library_is_searched_with_words_and_with_an_image(visit, address, library):
    page = visit(address)
    page.click("#search-link")
    page.fill("#words", "a red disc")
    page.press("#words", "Enter")
    hits = page.locator("#hits .hit")
    wait(lambda: hits.count() == 12 and page.locator("#hits .hit-tools:visible").count() == 12)
    for shown, hit in zip(hits.all(), library.search("a red disc", k=12), strict=True):
        text = shown.inner_text()
        assert hit.captions[0] in text and f"{hit.similarity:.3f}" in text and percent(hit.match) in text
        assert str(library.uri) not in page.content()
    assert page.locator("#search-status").inner_text() == "12 images for “a red disc”, the best first."
    held = []
    page.route("**/v1/attention", lambda route: held.append(route), times=1)
    hits.first.get_by_text("Where it looked").click()
    wait(lambda: page.title() and held)
    page.click("nav a[href='#image']")
    wait(lambda: not page.locator("#view-search").is_visible())
    held[0].continue_()  # the map arrives while another view is open
    wait(hits.first.locator("canvas[data-drawn]").count)
    page.click("#search-link")
    wait(hits.first.locator("canvas[data-drawn]").is_visible)
    assert serious(page) == []
    hits.first.get_by_text("Open").click()
    words_of(page, "#caption-text")
    assert page.locator("#view-image").is_visible() and not page.locator("#view-search").is_visible()
    page.click("#search-link")
    page.click("#search-image")
    wait(lambda: "the image that is open" in page.locator("#search-status").inner_text())
    assert hits.count() == 12 and "ITM" not in hits.first.inner_text()


def test_all_of_it_works_with_the_keyboard(visit, address):
    page = visit(address)
    choosers = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))  # early: the browser learns of it later
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "skip"

    def tab_to(selector):
        for _ in range(40):
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"{selector} is not reached")

    tab_to("#drop .file")
    page.keyboard.press("Space")
    wait(lambda: page.title() and choosers)
    choosers[0].set_files({"name": "image.png", "mimeType": "image/png", "buffer": png(draw("disc", "red", 0))})
    words_of(page, "#caption-text")
    assert page.evaluate("() => document.activeElement.className").endswith("change")
    tab_to("#caption-text .word")
    page.keyboard.press("ArrowRight")
    assert page.locator("#caption-text .word").nth(1).evaluate("each => each === document.activeElement")
    assert page.locator("#details").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#details").is_visible()
    tab_to("#question")
    page.keyboard.type("what is it")
    page.keyboard.press("Enter")
    assert words_of(page, "#turns .answer")
    tab_to("#lines")
    page.keyboard.type("a disc")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait(lambda: page.locator("#match-results tbody tr").count() == 1)
    page.focus("nav a[href='#compare']")
    page.keyboard.press("Enter")
    wait(lambda: page.evaluate("() => document.activeElement.id") == "main")
    page.focus(".skip")
    page.keyboard.press("Enter")  # stays in this view
    assert page.evaluate("() => document.activeElement.id") == "main" and page.locator("#view-compare").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_in_one_column(visit, address, scheme):
    page = visit(address, color_scheme=scheme, **PHONE)
    drop(page, draw("disc", "red", 0))
    words_of(page, "#caption-text")
    word, details = page.locator("#caption-text .word").first, page.locator("#details")
    word.tap()
    wait(lambda: "With a blank image" in details.inner_text())
    assert page.locator("#drop canvas").is_visible() and not details.locator(".small-map").count()
    page.locator("#title-image").tap()
    wait(lambda: not details.is_visible())
    word.evaluate("word => word.scrollIntoView()")
    word.tap()
    wait(lambda: details.locator(".small-map").is_visible())  # the image is out of sight
    assert details.bounding_box()["y"] >= word.bounding_box()["y"] + word.bounding_box()["height"]
    assert serious(page) == []
    for view in ("image", "compare", "search"):
        page.locator(f"nav a[href='#{view}']").tap()
        wait(page.locator(f"#view-{view}").is_visible)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    top = {name: page.locator(name) for name in ("#drop", "#caption", "#ask", "#match", "#looked")}
    page.locator("nav a[href='#image']").tap()
    for each in top.values():
        each.wait_for()
    heights = [each.bounding_box()["y"] for each in top.values()]
    assert heights == sorted(heights)


def test_the_key_is_asked_for_and_kept_in_memory_only(visit, models):
    with serve(create_app(models, api_keys=[KEY])) as port:
        page = visit(f"http://127.0.0.1:{port}/", expected_status=(401,))
        wait(lambda: page.locator("#key-form").is_visible())
        assert not page.locator("#server-error").is_visible() and not page.locator("#view-image").is_visible()
        assert serious(page) == []
        page.fill("#key", "another-key-of-some-length")
        page.press("#key", "Enter")
        wait(lambda: page.locator("#server-error").is_visible())
        assert "the API key is missing or wrong" in page.locator("#server-error").inner_text()
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        wait(lambda: page.locator("#view-image").is_visible())
        assert not page.locator("#key-form").is_visible() and not page.locator("#search-link").is_visible()
        drop(page, draw("disc", "red", 0))
        words_of(page, "#caption-text")
        stored = "() => [localStorage.length, sessionStorage.length, document.cookie.length, location.href]"
        assert page.evaluate(stored) == [0, 0, 0, f"http://127.0.0.1:{port}/"]


def test_errors_are_shown_as_the_server_says_them(visit, address):
    page = visit(address, expected_status=(400,))
    page.set_input_files("#drop .file", {"name": "notes.png", "mimeType": "image/png", "buffer": b"no image"})
    error = page.locator("#drop .error")
    wait(error.is_visible)
    assert error.inner_text().startswith("“notes.png” is not an image that this browser can read")
    drop(page, draw("disc", "red", 0))
    words_of(page, "#caption-text")
    assert not error.is_visible()
    page.fill("#question", "what is <image>")
    page.press("#question", "Enter")
    wait(page.locator("#ask-error").is_visible)
    assert "<image>" in page.locator("#ask-error").inner_text()
    assert page.input_value("#question") == "what is <image>" and page.locator("#turns .turn").count() == 0
    assert not page.locator("#ask-again").is_visible()
    assert ask(page, "what is it") and not page.locator("#ask-error").is_visible()
