"""Opening images, their cost, the order of text on a page, the classifier, scanned pages, results that are kept."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from evermini.config import default_home
from evermini.documents import read_document
from evermini.errors import DocumentError, InvalidRequestError
from evermini.service.image_tokens import image_cost
from evermini.vision.cache import Cache
from evermini.vision.classify import Classifier
from evermini.vision.colours import main_colours
from evermini.vision.images import open_image
from evermini.vision.layout import lay_out
from evermini.vision.perception import Perception, describe
from evermini.vision.reading import Lie, Line, TextReader, needed_turn
from tests.conftest import data_file
from tests.images import bomb, encoded, text_image
from tests.pdf_files import make_pdf

MINI, NANO, FULL = (f"gpt-4.1{tier}-2025-04-14" for tier in ("-mini", "-nano", ""))


@pytest.fixture(scope="module")
def reader() -> TextReader:
    return TextReader(1)


@pytest.mark.parametrize(
    ("width", "height", "detail", "model", "tokens"),
    [
        (1024, 1024, "auto", MINI, 1659),  # 1,024 patches x 1.62
        (1800, 2400, "high", MINI, 2353),  # 1,452 patches, as in OpenAI's own example
        (1, 1, "auto", MINI, 2),
        (1800, 2400, "auto", NANO, 3572),
        (2048, 2048, "low", MINI, 415),  # 256 patches
        (1024, 1024, "high", FULL, 765),  # OpenAI's examples
        (2048, 4096, "high", FULL, 1105),
        (4096, 8192, "low", FULL, 85),
        (1800, 2400, "auto", FULL, 765),
        (100_000, 10, "auto", MINI, 2489),  # never more than 1,536 patches
        (1024, 1024, "auto", "some/checkpoint", 1659),
        (1024, 1024, "auto", f"ft:{FULL}:org:name:1", 765),
        (1024, 1024, "auto", f"ft:{MINI}:org:name:1", 1659),
    ],
)
def test_images_cost_what_openai_asks(width, height, detail, model, tokens):
    assert image_cost(width, height, detail, model) == tokens


def test_exif_turns_an_image_upright():
    image = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(image, "JPEG", exif=exif)).size == (20, 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_mode_becomes_rgb_and_transparency_white(mode):
    opened = open_image(encoded(Image.new(mode, (8, 8)))).image
    assert opened.mode == "RGB"
    expected = (255, 255, 255) if mode in ("LA", "RGBA") else (0, 0, 0)
    assert opened.getpixel((0, 0)) == expected


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = io.BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data.getvalue()).image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("data", [b"", b"x", bomb(40_000, 40_000), bomb(8_000, 8_000)])
def test_what_is_no_image_or_too_large_is_refused(data):
    with pytest.raises(InvalidRequestError):
        open_image(data)


def line(text: str, left: float, top: float, width: float, score: float = 1.0) -> Line:
    return Line(text, score, left, top, left + width, top + 20)


def test_rows_of_a_table_stay_rows():
    lines = [
        line("12.50", 400, 52, 60),
        line("Coffee", 10, 50, 70),
        line("Tea", 10, 80, 40),
        line("3.10", 400, 79, 50),
        line("Shop", 100, 10, 80),
        line("Thanks", 10, 160, 60, score=0.4),
    ]
    assert lay_out(lines) == "Shop\nCoffee | 12.50\nTea | 3.10\n\nThanks (?)"


def test_columns_of_prose_are_read_one_after_the_other():
    left = [line(f"left {n}", 10, 100 + 30 * n, 280) for n in range(6)]
    right = [line(f"right {n}", 320, 101 + 30 * n, 280) for n in range(6)]
    title = line("title", 100, 20, 400)
    mixed = [found for pair in zip(right, left, strict=True) for found in pair]
    text = lay_out([*mixed, title])
    assert text.split() == [
        "title",
        *" ".join(f"left {n}" for n in range(6)).split(),
        *" ".join(f"right {n}" for n in range(6)).split(),
    ]


def test_nothing_is_laid_out_as_nothing():
    assert lay_out([]) == ""


def test_text_is_recognised_with_its_columns(reader):
    text = lay_out(reader.read(text_image(["Corner Shop", "Coffee\t3.20", "TOTAL\t17.45"])))
    assert text.splitlines() == ["Corner Shop", "Coffee | 3.20", "TOTAL | 17.45"]


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_page_on_its_side_or_head_is_read_upright(reader, turn):
    lines = ["Corner Shop in Oslo", "Coffee and a cake\t3.20", "TOTAL of it all\t17.45"]
    turned = text_image(lines).rotate(turn, expand=True)
    assert lay_out(reader.read(turned)).splitlines() == [x.replace("\t", " | ") for x in lines]


def test_what_lies_otherwise_on_an_upright_page_turns_nothing():
    flat, side, head = Lie(0, 400), Lie(90, 500), Lie(180, 300)
    assert needed_turn([flat, side, flat]) == 0
    assert needed_turn([head, flat, head, head]) == 180
    assert needed_turn([side, side]) == 0  # a sign or two, and no page
    assert needed_turn([]) == 0


def test_a_long_strip_is_read_in_full(reader):
    strip = text_image([f"line number {n}" for n in range(60)], size=(420, 44 * 60 + 30))
    words = lay_out(reader.read(strip)).split()
    assert {str(n) for n in range(60)} <= set(words)


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (2, 3000)])
def test_images_of_odd_shapes_are_read_too(reader, size):
    assert reader.read(Image.new("RGB", size, "white")) == []


def test_the_classifier_knows_photos():
    classifier = Classifier(default_home())
    for path in sorted(data_file("imagenet100").glob("*.JPEG"))[::5]:
        label = path.stem.partition("_")[2].replace("_", " ").lower()
        names = [n.lower() for n, _ in classifier.classify(open_image(path.read_bytes()).image)]
        assert any(label in name.split(", ") for name in names), (label, names)


def test_a_description_says_what_is_not_known(tmp_path: Path):
    perception = Perception(default_home(), threads=1)
    text, size = perception.describe(encoded(Image.new("RGB", (64, 48), (20, 20, 200))), "auto")
    assert size == (64, 48)
    assert "64 x 48 pixels, mostly blue" in text
    assert "No text was found on it." in text
    assert "More than this is not known" in text


def test_guesses_give_way_to_text_but_not_to_specks_of_it():
    picture = open_image(encoded(Image.new("RGB", (64, 48))))
    unsure, sure = [("pill bottle", 0.2)], [("espresso", 0.9)]
    speck, sentence = line("S", 1, 1, 9), line("Let us first determine the markers", 1, 30, 60)
    assert "pill bottle" in describe(picture, [speck], unsure)
    assert "pill bottle" not in describe(picture, [speck, sentence], unsure)
    assert "espresso" in describe(picture, [speck, sentence], sure)


def test_an_image_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = encoded(text_image(["ORDER 4711"] * 4))
    classified = []
    for _ in range(2):  # two processes
        perception = Perception(tmp_path, threads=1)
        monkeypatch.setattr(
            perception._classifier, "classify", lambda image: classified.append(1) or [("x", 0.1)]
        )
        text, size = perception.describe(data, "auto")
        assert "ORDER 4711" in text
        assert size == (480, 220)
    assert len(classified) == 1


def test_the_cache_forgets_the_oldest(tmp_path: Path):
    cache = Cache(tmp_path, max_bytes=2000)
    for number in range(40):
        cache.put(str(number), {"text": "x" * 100})
    kept = [number for number in range(40) if cache.get(str(number)) is not None]
    assert 5 < len(kept) < 20
    assert 39 in kept


def test_a_scanned_page_is_read_by_text_recognition(reader):
    data = io.BytesIO()
    pages = [text_image(["Invoice 4711", "Total 17.45 EUR"]), Image.new("RGB", (480, 220), "white")]
    pages[0].save(data, "PDF", save_all=True, append_images=pages[1:])
    seen = []

    def read_page(image: Image.Image, number: int) -> str:
        seen.append(number)
        return lay_out(reader.read(image))

    document = read_document(data.getvalue(), "scan.pdf", read_page=read_page)
    first, second = document.text.split("\n\n[page 2]\n")
    assert first.replace(" ", "") == "[page1]\nInvoice4711\nTotal17.45EUR"
    assert second.startswith("(This page has no text")
    assert document.blank_pages == (2,)
    assert seen == [1, 2]


@pytest.mark.parametrize(("lies", "rotate"), [(0, 90), (90, 90), (90, 0)])
def test_a_scan_is_read_however_it_lies_and_its_page_says_it_is_turned(reader, lies, rotate):
    """A page that says it is turned is turned first, rightly (90, 90) or not, then as its text says."""
    data = io.BytesIO()
    lines = ["Corner Shop in Oslo", "Coffee and a cake 3.20", "TOTAL of it all 17.45"]
    text_image(lines).rotate(lies, expand=True).save(data, "PDF")
    pdf = data.getvalue().replace(b"/Type /Page\n", b"/Type /Page /Rotate %d\n" % rotate)
    assert b"/Rotate" in pdf
    document = read_document(
        pdf, "scan.pdf", read_page=lambda image, number: lay_out(reader.read(image))
    )
    assert document.text.split() == ["[page", "1]", *" ".join(lines).split()]


def test_scans_are_bounded_and_empty_pages_are_none(monkeypatch: pytest.MonkeyPatch):
    data = io.BytesIO()
    page = text_image(["Invoice 4711"])
    page.save(data, "PDF", save_all=True, append_images=[page, page])
    monkeypatch.setattr("evermini.documents.read.MAX_SCANS", 2)
    with pytest.raises(DocumentError, match="Split it"):
        read_document(data.getvalue(), "scan.pdf", read_page=lambda image, number: "x")
    seen: list[int] = []
    pdf = make_pdf(["Text " * 40, "", ""])
    read_document(pdf, "a.pdf", read_page=lambda image, number: seen.append(number) or "x")
    assert seen == []


def test_colours_have_names():
    image = Image.new("RGB", (10, 10), "white")
    image.paste((0, 110, 0), (0, 0, 3, 10))
    assert [name for name, _ in main_colours(image)] == ["white", "dark green"]
