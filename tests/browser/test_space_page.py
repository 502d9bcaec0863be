"""The Space's page in a real browser: `make test-browser`."""

import re
import shutil

import pytest
from conftest import tiny_transformer
from playwright.sync_api import expect, sync_playwright
from testing_utils.space_server import serve

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.seeds import drawn_classes


FLAGS = ["--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FIRST_PICTURE = "button.thumbnail-lg img"
SNIPPET = ".cm-content"
# Name of the element that has the focus, as a screen reader has it.
FOCUSED = """() => {
    const e = document.activeElement;
    return e.ariaLabel || [...(e.labels ?? [])].map(l => l.innerText).join(' ').trim() || e.innerText.trim();
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), chromium_sandbox=False, args=FLAGS
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with serve("emoji64", tmp_path_factory.mktemp("temporary")) as address:
        yield address


@pytest.fixture(params=[(1400, "light"), (400, "dark")], ids=["wide", "phone"])
def page(browser, address, request):
    yield from opened(browser, address, *request.param)


def opened(browser, address, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(address)
    expect(page.get_by_role("button", name="Generate")).to_be_visible(timeout=60_000)
    yield page
    context.close()


def set_number(page, name, value):
    page.get_by_label(name, exact=False).first.fill(str(value))
    page.keyboard.press("Tab")


def status(page):
    """The line that a screen reader reads out."""
    return page.locator("#status").get_by_role("status")


def generate(page, seed, steps=3):
    """Generates, and returns the bytes of the first image."""
    set_number(page, "number input for Images of each class", 2)
    set_number(page, "Seed", seed)
    set_number(page, "number input for Steps", steps)
    page.get_by_role("button", name="Generate").click()
    expect(status(page)).to_contain_text(f"steps: {steps}, seed: {seed}.", timeout=60_000)
    expect(page.locator(FIRST_PICTURE)).to_have_count(2)
    source = page.locator(FIRST_PICTURE).first.get_attribute("src")
    return page.request.get(source).body()


def choose_class(page, name):
    """By the keyboard alone: type a part of the name, Enter."""
    box = page.get_by_label("Class", exact=True)
    box.click()
    box.press("Backspace")
    box.press_sequentially(name)
    box.press("Enter")
    box.press("Escape")


def test_the_page_opens_with_images(page):
    """Of twelve classes, with their names; on a phone they come before the controls."""
    expect(page.locator(FIRST_PICTURE)).to_have_count(12, timeout=60_000)
    names = DiTClassCondPipeline.from_bundled("emoji64").id2label
    drawn = [names[index].split(",")[0] for index in drawn_classes(len(names), 12)]
    assert page.locator(".caption-label").all_inner_texts() == drawn
    gallery = page.locator(FIRST_PICTURE).first.bounding_box()
    control = page.get_by_label("Class", exact=True).bounding_box()
    if page.viewport_size["width"] < 600:
        assert gallery["y"] < control["y"] and gallery["y"] < 450
    else:
        assert gallery["x"] > control["x"] and abs(gallery["y"] - control["y"]) < 300
    page.get_by_role("button", name="Reuse settings").click()
    expect(page.locator(SNIPPET)).to_contain_text("for index in range(12)")


def test_a_class_is_generated_and_the_seed_decides(page):
    choose_class(page, "sloth")
    first = generate(page, seed=1)
    other = generate(page, seed=2)
    expect(page.locator(SNIPPET)).to_contain_text("seeded_generator(2, index)")
    assert other != first
    assert generate(page, seed=1) == first
    assert page.locator("span.caption, .caption-label").first.inner_text() == "sloth"
    # Nothing sticks out to the side.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1400, "dark")])
def test_a_speed_preset_sets_the_controls_in_the_other_schemes(browser, address, width, scheme):
    for page in opened(browser, address, width, scheme):
        page.get_by_text("Guidance, sampler, mixing").click()
        box = page.get_by_label("Speed", exact=True)
        box.click()
        expect(page.get_by_label("number input for Guidance until").first).to_have_value("0.5")
        page.get_by_role("option", name="1 step").click()
        steps = page.get_by_label("number input for Steps").first
        expect(steps).to_have_value("1")
        expect(page.get_by_label("Sampler", exact=True)).to_have_value("flow_lcm")
        expect(page.get_by_label("number input for Guidance until").first).to_have_value("1")
        page.get_by_label("Sampler", exact=True).click()
        page.get_by_role("option", name="flow_euler").click()
        expect(steps).to_have_value("25")
        expect(page.get_by_label("number input for Guidance until").first).to_have_value("0.5")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / 3
        assert (brightness < 100) == (scheme == "dark"), colour
        generate(page, seed=4, steps=1)


def test_settings_come_back_by_one_click(page):
    reuse = page.get_by_role("button", name="Reuse settings")
    generate(page, seed=11, steps=2)
    for chosen in (False, True):
        set_number(page, "Seed", 5)
        page.get_by_label("Speed", exact=True).click()
        page.get_by_role("option", name="1 step").click()
        expect(page.locator(SNIPPET)).to_contain_text("make_scheduler('flow_lcm'")
        if chosen:
            page.locator(FIRST_PICTURE).first.click()
        reuse.click()
        expect(page.get_by_label("Seed").first).to_have_value("11")
        expect(page.get_by_label("number input for Steps").first).to_have_value("2")
        expect(page.get_by_label("Speed", exact=True)).to_have_value("as set below")
        expect(page.locator(SNIPPET)).to_contain_text("seeded_generator(11, index) for index in range(2)")
        expect(page.locator(SNIPPET)).not_to_contain_text("make_scheduler")


def test_the_snippet_is_that_of_the_controls(page):
    snippet = page.locator(SNIPPET)
    steps = DiTClassCondPipeline.from_bundled("emoji64").resolve_call()["num_inference_steps"]
    expect(snippet).to_contain_text(f"num_inference_steps={steps}")
    set_number(page, "number input for Steps", 7)
    expect(snippet).to_contain_text("num_inference_steps=7")
    box = page.get_by_label("Class", exact=True)
    box.press("Backspace")
    box.press("Escape")
    expect(snippet).to_have_text("# Choose at least one class.")
    choose_class(page, "sloth")
    page.get_by_label("Random").check()
    page.get_by_role("button", name="Generate").click()
    expect(status(page)).to_contain_text("steps: 7, seed:", timeout=60_000)
    seed = re.search(r"seed: (\d+)", status(page).inner_text())[1]
    expect(page.get_by_label("Seed").first).to_have_value(seed)
    expect(snippet).to_contain_text(f"seeded_generator({seed}, index)")


def test_drawing_is_cancelled(page):
    set_number(page, "number input for Images of each class", 8)
    set_number(page, "number input for Steps", 250)
    page.get_by_role("button", name="Cancel").click()
    expect(status(page)).to_contain_text("Nothing is being generated.")
    page.get_by_role("button", name="Generate").click()
    expect(status(page)).to_contain_text("Step", timeout=60_000)
    expect(page.locator(".caption-label")).to_have_count(8)  # previews too say what they are
    page.get_by_role("button", name="Cancel").click()
    expect(status(page)).to_contain_text("Cancelled.")
    generate(page, seed=3, steps=1)


def test_a_waiting_set_is_cancelled(browser, address):
    """What waits is taken from the queue: it is not generated when its turn would come."""
    for first in opened(browser, address, 1400, "light"):
        set_number(first, "number input for Images of each class", 8)
        set_number(first, "number input for Steps", 250)
        first.get_by_role("button", name="Generate").click()
        expect(status(first)).to_contain_text("Step", timeout=60_000)
        for second in opened(browser, address, 1400, "light"):
            second.get_by_role("button", name="Generate").click()
            expect(status(second)).to_contain_text("Waiting: 1 before this one")
            second.get_by_role("button", name="Cancel").click()
            expect(status(second)).to_contain_text("Cancelled.")
            first.get_by_role("button", name="Cancel").click()
            expect(status(first)).to_contain_text("Cancelled.")
            second.wait_for_timeout(1000)
            expect(status(second)).to_contain_text("Cancelled.")
            generate(second, seed=2, steps=1)


def test_a_double_click_draws_once(page):
    set_number(page, "number input for Steps", 20)
    page.get_by_role("button", name="Generate").dblclick()
    expect(status(page)).to_contain_text("steps: 20,", timeout=60_000)
    page.wait_for_timeout(1000)
    expect(status(page)).to_contain_text("steps: 20,")


def test_faults_are_messages(page):
    box = page.get_by_label("Class", exact=True)
    box.click()
    box.press("Backspace")
    box.press("Escape")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("Choose at least one class.")  # the snippet has it too
    expect(status(page)).to_contain_text("Not generated.")
    assert "Traceback" not in page.content()


def test_every_control_has_a_label(page):
    page.get_by_text("Guidance, sampler, mixing").click()
    for name in ("Class", "Speed", "Seed", "Random", "Sampler", "Mix with"):
        expect(page.get_by_label(name, exact=False).first).to_be_visible()
    unnamed = page.evaluate(
        """[...document.querySelectorAll('input, textarea, select, button')]
        .filter(e => e.offsetParent && !(e.labels?.length || e.ariaLabel || e.innerText?.trim()))
        .map(e => e.outerHTML.slice(0, 150))"""
    )
    assert unnamed == []


def tab_to(page, name):
    """Moves the focus as a keyboard does, forwards only."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate(FOCUSED).startswith(name):
            return
    raise AssertionError(f"Tab does not reach {name!r}.")


def test_the_keyboard_is_enough(page):
    press, write = page.keyboard.press, page.keyboard.type
    tab_to(page, "Class")
    press("Backspace")
    write("sloth")
    press("Enter")
    tab_to(page, "Speed")
    press("Control+a")
    write("1 step")
    press("Enter")
    expect(page.get_by_label("number input for Steps").first).to_have_value("1")
    tab_to(page, "Random")
    press("Space")
    tab_to(page, "range slider for Steps")
    press("ArrowRight")
    tab_to(page, "Generate")
    press("Enter")
    expect(status(page)).to_contain_text("Images: 4, steps: 2, seed:", timeout=60_000)
    seed = re.search(r"seed: (\d+)", status(page).inner_text())[1]
    tab_to(page, "Reuse settings")
    press("Enter")
    expect(page.get_by_label("Random")).not_to_be_checked()
    expect(page.get_by_label("Seed").first).to_have_value(seed)
    expect(page.locator(SNIPPET)).to_contain_text("# sloth")


def test_one_of_a_thousand_classes_is_found(browser, tmp_path):
    names = {index: f"thing number {index}" for index in range(1000)} | {617: "haystack, needle"}
    transformer = tiny_transformer(num_classes=1000, learn_sigma=False, in_channels=3)
    DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), None, names).save_pretrained(tmp_path / "model")
    (tmp_path / "temporary").mkdir()
    with serve(tmp_path / "model", tmp_path / "temporary") as address:
        for page in opened(browser, address, 1400, "light"):
            choose_class(page, "needle")
            expect(page.locator(SNIPPET)).to_contain_text("[617],  # haystack")


def test_one_of_many_thousand_classes_is_searched_for(browser, tmp_path):
    """A page can't hold 20,000 names; those that were found are kept when others are."""
    names = {index: f"thing number {index}" for index in range(20_000)}
    transformer = tiny_transformer(num_classes=20_000, learn_sigma=False, in_channels=3)
    DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), None, names).save_pretrained(tmp_path / "model")
    (tmp_path / "temporary").mkdir()
    with serve(tmp_path / "model", tmp_path / "temporary") as address:
        for page in opened(browser, address, 1400, "light"):
            assert len(page.request.get(address).body()) < 300_000
            for row, name in ((1, "number 19876"), (2, "number 12345")):  # after "none", and what is chosen
                box = page.get_by_label("Find a class", exact=True)
                box.click()
                box.press("Control+a")
                box.press_sequentially(name, delay=80)  # as people type
                # Gradio's list keeps a few stale rows below the first ones, which are those that were found.
                expect(page.get_by_role("option").nth(row)).to_contain_text(name)
                page.get_by_role("option").nth(row).click()
                expect(page.locator(SNIPPET)).to_contain_text(name)
            expect(page.locator(SNIPPET)).to_contain_text(f"[{drawn_classes(20_000, 1)[0]}, 19876, 12345],")
            set_number(page, "number input for Images of each class", 1)
            page.get_by_role("button", name="Generate").click()
            expect(status(page)).to_contain_text("Images: 3", timeout=60_000)
            page.get_by_role("button", name="Reuse settings").click()
            expect(page.locator(SNIPPET)).to_contain_text(f"[{drawn_classes(20_000, 1)[0]}, 19876, 12345],")
