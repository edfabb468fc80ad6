"""The page in a real browser: what moves, what sorts, how it looks, and that it asks nobody.

Needs a Chromium on PATH, which Playwright drives; MIMA_REQUIRE_CHROMIUM=1 makes a missing one a
failure. Screenshots are kept in the folder that MIMA_TEST_ARTEFACTS names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from support.evaluations import STEPS, write_evaluation

from mima.report import write_report

playwright = pytest.importorskip("playwright.sync_api")

ATTACKS = (
    "<script>window.broken=1</script>",
    "<img src=x onerror=window.broken=1>",
    "<svg onload=window.broken=1>",
    "<svg><script>window.broken=1</script></svg>",
    "<svg><a xlink:href='javascript:window.broken=1'><text>x</text></a></svg>",
    "<math><mi href='javascript:window.broken=1'>x</mi></math>",
    "<iframe srcdoc='<script>parent.broken=1</script>'></iframe>",
    "<body onload=window.broken=1>",
    "<details open ontoggle=window.broken=1>",
    "<input autofocus onfocus=window.broken=1>",
    "<video><source onerror=window.broken=1></video>",
    "<a href='javascript:window.broken=1'>x</a>",
    "<style>*{background:url(//a.example/x)}</style>",
    "<link rel=stylesheet href=//a.example/x.css>",
    "<base href=//a.example/>",
    "<meta http-equiv=refresh content='0;url=//a.example/'>",
    "<object data='javascript:window.broken=1'></object>",
    "<form action=//a.example/><button autofocus>x</button></form>",
    "<template><script>window.broken=1</script></template>",
    "{{ window.broken=1 }}{% raw %}",
)
FRAMES = (
    *("*", '">*', "'>*", "</script>*", "</style>*", "</title>*", "</textarea>*", "</svg>*"),
    *("<!--*", "-->*", "]]>*", "<![CDATA[*", "</template>*", "</noscript>*", "javascript:*"),
    *('" onmouseover="window.broken=1" x="*', "' autofocus onfocus='window.broken=1' x='*"),
    *("`${*}", "\\u003c*", "&lt;*", "&#x3c;*", "%3C*", "\u202e*", "\u2028*", "\ufeff*\u200b"),
)
"""Where a name may stand: text, attribute, script, style, SVG, comment; and how to get out."""

# contrast of every text with what is behind it, after WCAG 2: (L1 + 0.05) / (L2 + 0.05)
CONTRASTS = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((c) => c / 255).map(
      (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest("script, style")) continue;
    const style = getComputedStyle(element);
    const ink = element.closest("svg") ? style.fill : style.color;
    let behind = element;
    while (behind && channels(getComputedStyle(behind).backgroundColor)[3] === 0)
      behind = behind.parentElement;
    const paper = channels(getComputedStyle(behind ?? document.body).backgroundColor);
    const [light, dark] = [luminance(channels(ink)), luminance(paper)].sort((a, b) => b - a);
    found.push([(light + 0.05) / (dark + 0.05), walker.currentNode.data.trim()]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        if os.environ.get("MIMA_REQUIRE_CHROMIUM") == "1":
            pytest.fail("MIMA_REQUIRE_CHROMIUM=1, but there is no chromium on PATH")
        pytest.skip("no chromium on PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, timeout=120_000)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    folder = write_evaluation(tmp_path_factory.mktemp("run") / "run", seeds=(0, 1))
    return write_report([folder])


@pytest.fixture
def open_page(chromium):
    """Opens a page, and fails if it complained or asked anything of anybody."""
    contexts, complaints, requests = [], [], []

    def open_(path: Path, **options):
        context = chromium.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(60_000)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        context.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        requests.remove(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == []


@pytest.fixture(scope="module")
def keep(tmp_path_factory):
    """Keeps a screenshot for people to look at."""
    folder = Path(os.environ.get("MIMA_TEST_ARTEFACTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)

    def keep_(page, name: str) -> Path:
        file = folder / f"report-{name}.png"
        page.screenshot(path=str(file), full_page=True)
        return file

    return keep_


def colour(locator) -> tuple[int, int, int]:
    """Of a picture's middle, as it is on the screen."""
    image = Image.open(BytesIO(locator.screenshot())).convert("RGB")
    return image.getpixel((image.width // 2, image.height // 2))


def visible(page, alt: str) -> list[str]:
    """Alternative texts of the pictures of a card that are on the screen."""
    card = page.locator(".card").first
    return [
        image.get_attribute("alt")
        for image in card.get_by_alt_text(alt).all()
        if image.is_visible()
    ]


def test_the_slider_moves_the_pictures(open_page, path):
    page = open_page(path)
    card = page.locator(".card").first
    slider = card.get_by_role("slider", name="Adaptation step")
    # the last step first: what the attack came to
    for place in (3, 0, 1, 2):
        slider.fill(str(place))
        step = STEPS[place]
        assert card.locator("output").inner_text() == str(step)
        assert slider.get_attribute("aria-valuetext") == f"step {step}"
        shown = visible(page, "picture 1")
        assert shown == [f"{side}, step {step}, picture 1" for side in ("Original", "Immunized")]
        for side, green in (("Original", 200), ("Immunized", 60)):
            picture = card.get_by_alt_text(f"{side}, step {step}, picture 1")
            assert colour(picture) == pytest.approx((2 * step, green, 0), abs=4)
    # by mouse: the left end is the first step
    box = slider.bounding_box()
    page.mouse.click(box["x"] + 3, box["y"] + box["height"] / 2)
    assert visible(page, "picture 1")[0] == "Original, step 0, picture 1"


def test_everything_works_without_a_mouse(open_page, path):
    page = open_page(path)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "(({tagName, type}) => [tagName, type ?? ''].join(' ').trim())"
                "(document.activeElement)"
            )
        )
        if reached[-1] == "INPUT range":
            break
    assert reached[:6] == ["A"] * 6
    assert "INPUT radio" in reached
    page.keyboard.press("ArrowLeft")
    assert visible(page, "picture 1")[0] == "Original, step 50, picture 1"
    page.keyboard.press("Home")
    assert visible(page, "picture 1")[0] == "Original, step 0, picture 1"
    button = page.get_by_role("button", name="Seconds")
    button.focus()
    page.keyboard.press("Enter")
    header = page.locator("th", has=button)
    assert header.get_attribute("aria-sort") == "ascending"


def cells(page, column: int) -> list[str]:
    rows = page.locator("table.sortable tbody tr").all()
    return [row.locator("th, td").nth(column).inner_text() for row in rows if row.is_visible()]


def test_the_table_sorts(open_page, path):
    page = open_page(path)
    assert len(cells(page, 0)) == 8
    gaps = [float(text.replace("−", "-")) for text in cells(page, 3)]
    assert gaps == sorted(gaps)
    page.get_by_role("button", name="SGR mean").click()
    assert [float(text.replace("−", "-")) for text in cells(page, 3)] == sorted(gaps, reverse=True)
    page.get_by_role("button", name="Method").click()
    assert cells(page, 1) == ["LoRA"] * 4 + ["Textual Inversion"] * 4
    page.get_by_role("button", name="Method").click()
    assert cells(page, 1) == ["Textual Inversion"] * 4 + ["LoRA"] * 4
    headers = page.locator("table.sortable th[aria-sort]")
    assert headers.count() == 1
    assert headers.first.inner_text().strip() == "Method"
    # what was not measured comes last, whichever way
    for sign in (1, -1):
        page.get_by_role("button", name="Nearest, immunized").click()
        found = cells(page, 17)
        assert found[4:] == ["–"] * 4
        distances = [sign * float(text) for text in found[:4]]
        assert distances == sorted(distances)


def test_one_similarity_is_shown_at_a_time(open_page, path):
    page = open_page(path)
    titles = page.locator(".panels svg")
    assert [t.get_attribute("aria-label")[:4] for t in titles.all() if t.is_visible()] == [
        "clip"
    ] * 4
    page.get_by_text("dino", exact=True).first.click()
    assert {t.get_attribute("aria-label")[:4] for t in titles.all() if t.is_visible()} == {"dino"}
    assert len(cells(page, 0)) == 8


def test_without_scripts_every_step_is_there(open_page, path):
    page = open_page(path, java_script_enabled=False)
    card = page.locator(".card").first
    assert card.get_by_role("slider").count() == 0
    shown = [image for image in card.get_by_alt_text("picture 1").all() if image.is_visible()]
    assert len(shown) == 2 * len(STEPS)
    assert page.get_by_text("after 25 steps").first.is_visible()
    assert len(cells(page, 0)) == 8
    assert page.get_by_role("button").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(scheme, open_page, path, keep):
    page = open_page(path, color_scheme=scheme, viewport={"width": 1280, "height": 900})
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (min(map(int, paper[4:-1].split(","))) > 200) == (scheme == "light")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 200
    assert [text for contrast, text in found if contrast < 4.5] == []
    keep(page, scheme)


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_is_wider_than_a_small_screen(width, open_page, path, keep):
    phone = {"viewport": {"width": width, "height": 800}, "is_mobile": True, "has_touch": True}
    page = open_page(path, **phone)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # what is too wide scrolls in a box of its own, and can be reached with the keyboard
    boxes = page.locator("table.sortable").locator("xpath=..")
    assert boxes.get_attribute("tabindex") == "0"
    assert page.get_by_text("scrolls sideways").first.is_visible()
    first, second = (
        page.locator(".card").first.get_by_alt_text(f"{side}, step 100, picture 1").bounding_box()
        for side in ("Original", "Immunized")
    )
    assert first["y"] == second["y"]
    assert 0 <= first["x"] < second["x"] < width - 40
    keep(page, f"phone-{width}")


def test_paper_is_white_and_shows_every_step(open_page, path, keep):
    page = open_page(path, color_scheme="dark", viewport={"width": 750, "height": 1000})
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert [text for contrast, text in page.evaluate(CONTRASTS) if contrast < 4.5] == []
    for hidden in ("nav", ".slider >> nth=0"):
        assert not page.locator(hidden).is_visible()
    assert len(visible(page, "picture 1")) == 2 * len(STEPS)
    # all similarities: a choice cannot be made on paper
    assert all(svg.is_visible() for svg in page.locator(".panels svg").all())
    # columns that A4 has no room for
    assert page.locator("th.screen").count() == 4
    assert not any(cell.is_visible() for cell in page.locator("th.screen").all())
    keep(page, "print")
    assert page.pdf(format="A4").startswith(b"%PDF")


def written(folder: Path, names: Sequence[str]) -> Path:
    """A report in which names stand in every place that an evaluation has for them."""
    left = iter(names)
    # in a row, for folders are called after them, without what is no letter
    concepts, prompts = ([next(left) for _ in range(10)] for _ in range(2))
    evaluation = write_evaluation(
        folder,
        name=next(left),
        preset=next(left),
        models={"original": next(left), "immunized": next(left)},
        similarities=(next(left),),
        concepts=list(zip(concepts, ["target", "other"] * 5, prompts, strict=True)),
        versions={next(left): next(left) for _ in range(30)},
        adaptations=("lora",),
        seeds=(0,),
        num_pictures=1,
        config={"grid": {next(left): [next(left), next(left)] for _ in range(21)}}
        | dict(zip(left, left, strict=True)),
    )
    return write_report([evaluation])


# each element and the names of its attributes, in the page's order, but for the places where the
# names of settings may break
STRUCTURE = """() => [...document.querySelectorAll("*")].filter(
  (element) => element.tagName != "WBR" || element.getAttributeNames().length).map(
  (element) => [element.tagName, ...element.getAttributeNames()].join(" "))"""
TEXTS = """() => {
  const found = [document.body.textContent];
  for (const element of document.querySelectorAll("*"))
    for (const attribute of element.attributes) found.push(attribute.value);
  return found.join("\\n");
}"""


def test_five_hundred_hostile_names_do_nothing(open_page, tmp_path):
    names = [frame.replace("*", attack) for frame in FRAMES for attack in ATTACKS]
    assert len(set(names)) == len(names) == 500
    page = open_page(written(tmp_path / "hostile", names))
    assert page.title() == f"{names[20]} · immunization report"
    shown = page.evaluate(TEXTS)
    assert [name for name in names if name not in shown] == []
    # the same elements with the same attributes as where every name is harmless
    harmless = open_page(written(tmp_path / "harmless", [f"name {n}" for n in range(500)]))
    assert page.evaluate(STRUCTURE) == harmless.evaluate(STRUCTURE)
    page.mouse.wheel(0, 100_000)
    for button in page.locator("button").all():
        button.click()
    assert page.evaluate("window.broken") is None


def test_several_runs_side_by_side(open_page, tmp_path, keep):
    folders = [
        write_evaluation(
            tmp_path / name,
            name=name,
            method=name,
            strength=strength,
            adaptations=("lora",),
            similarities=("clip",),
            seeds=(0,),
        )
        for name, strength in (("none", 0.0), ("imma", 0.2), ("mima", 0.6))
    ]
    page = open_page(
        write_report(folders, tmp_path / "page.html"), viewport={"width": 1280, "height": 900}
    )
    shown = visible(page, "step 100, picture 1")
    assert shown == [f"{who}, step 100, picture 1" for who in ("Original", "none", "imma", "mima")]
    tops = {page.locator(".card").first.get_by_alt_text(alt).bounding_box()["y"] for alt in shown}
    assert len(tops) == 1
    keep(page, "several")
