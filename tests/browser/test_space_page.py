"""The Space's page in a real browser: `make test-browser`."""

import re
import shutil

import pytest
from playwright.sync_api import expect, sync_playwright
from testing_utils.space_server import serve


FLAGS = ["--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FIRST_PICTURE = "button.thumbnail-lg img"


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


def draw(page, seed, steps=3):
    """Draws, and returns the first picture's bytes."""
    set_number(page, "number input for Images of each class", 2)
    set_number(page, "Seed", seed)
    set_number(page, "number input for Steps", steps)
    page.get_by_role("button", name="Generate").click()
    status = page.get_by_label("Status")
    expect(status).to_have_value(re.compile(rf"steps: {steps}, seed: {seed}\."), timeout=60_000)
    expect(page.locator(FIRST_PICTURE)).to_have_count(2)
    source = page.locator(FIRST_PICTURE).first.get_attribute("src")
    return page.request.get(source).body()


def choose_class(page, name):
    """By the keyboard alone: type a part of the name, Enter."""
    box = page.get_by_label("Class", exact=True)
    box.click()
    box.press("Backspace")
    box.press_sequentially(name[:5])
    box.press("Enter")
    box.press("Escape")


def test_a_class_is_drawn_and_the_seed_decides(page):
    choose_class(page, "smileys")
    first = draw(page, seed=1)
    other = draw(page, seed=2)
    assert "seeded_generator(2, index)" in page.locator(".cm-content").inner_text()
    assert other != first
    assert draw(page, seed=1) == first
    assert page.locator("span.caption, .caption-label").first.inner_text() == "smileys"
    # Nothing sticks out to the side.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1400, "dark")])
def test_a_speed_preset_sets_the_controls_in_the_other_schemes(browser, address, width, scheme):
    for page in opened(browser, address, width, scheme):
        page.get_by_text("Guidance, sampler, mixing").click()
        box = page.get_by_label("Speed", exact=True)
        box.click()
        page.get_by_role("option", name="fastest").click()
        steps = page.get_by_label("number input for Steps").first
        expect(steps).to_have_value("6")
        expect(page.get_by_label("Sampler", exact=True)).to_have_value("flow_unipc")
        expect(page.get_by_label("number input for Guidance until").first).to_have_value("0.5")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / 3
        assert (brightness < 100) == (scheme == "dark"), colour
        draw(page, seed=4, steps=1)


def test_settings_come_back_from_a_picture(page):
    draw(page, seed=11, steps=2)
    set_number(page, "Seed", 5)
    page.locator(FIRST_PICTURE).first.click()
    page.get_by_role("button", name="Reuse settings").click()
    expect(page.get_by_label("Seed").first).to_have_value("11")


def test_drawing_is_cancelled(page):
    set_number(page, "number input for Images of each class", 8)
    set_number(page, "number input for Steps", 250)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_label("Status")).to_have_value(re.compile("Step"), timeout=60_000)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_label("Status")).to_have_value("Cancelled.")
    draw(page, seed=3, steps=1)


def test_a_double_click_draws_once(page):
    set_number(page, "number input for Steps", 20)
    page.get_by_role("button", name="Generate").dblclick()
    status = page.get_by_label("Status")
    expect(status).to_have_value(re.compile("steps: 20,"), timeout=60_000)
    page.wait_for_timeout(1000)
    expect(status).to_have_value(re.compile("steps: 20,"))


def test_faults_are_messages(page):
    box = page.get_by_label("Class", exact=True)
    box.click()
    box.press("Backspace")
    box.press("Escape")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("Choose at least one class.")).to_be_visible()
    assert "Traceback" not in page.content()


def test_every_control_has_a_label(page):
    page.get_by_text("Guidance, sampler, mixing").click()
    for name in ("Class", "Speed", "Seed", "Random", "Sampler", "Mix with"):
        expect(page.get_by_label(name, exact=False).first).to_be_visible()
    unnamed = page.evaluate(
        """[...document.querySelectorAll('input, textarea, select, button')]
        .filter(e => e.offsetParent && !(e.labels?.length || e.ariaLabel || e.innerText?.trim() || e.title || e.placeholder))
        .map(e => e.outerHTML.slice(0, 150))"""
    )
    assert unnamed == []
