"""Images for a model that looks at them behind another engine: what is sent, and what comes of a refusal."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.images import bomb, data_url, encoded, image_part
from tests.serving import assert_error, make_client
from tests.upstream_fakes import (
    NAME,
    FakeEngine,
    behind,
    fake_engine,
    json_response,
    refused,
    whole,
)
from tests.vlm_checkpoints import picture

PHOTO = picture(1)
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[FakeEngine, str]]:
    with fake_engine() as (engine, base_url):
        spec = {"images": True}
        with behind(base_url, spec=spec) as (url, _):
            yield engine, url


@pytest.fixture
def engine(running: tuple[FakeEngine, str]) -> FakeEngine:
    running[0].__dict__.update(FakeEngine().__dict__)
    running[0].answer = lambda body: json_response(whole(content="Seen."))
    return running[0]


@pytest.fixture
def url(running: tuple[FakeEngine, str]) -> str:
    return running[1]


def ask(url: str, *parts: Any, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": list(parts)}]
    body = {"model": NAME, "messages": messages, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def sent(engine: FakeEngine) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = engine.asked[-1][2]["messages"][-1]["content"]
    return content


def opened(part: dict[str, Any]) -> Image.Image:
    head, _, body = part["image_url"]["url"].partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    assert head == f"data:image/{(image.format or '').lower()};base64"
    return image


def test_an_image_is_passed_on_where_it_stood(engine: FakeEngine, url: str) -> None:
    first, second = encoded(PHOTO), encoded(picture(2), "JPEG")
    response = ask(
        url,
        text("Compare "),
        image_part(first),
        text(" with "),
        {"type": "image_url", "image_url": {"url": data_url(second), "detail": "high"}},
        text("."),
    )
    assert response.json()["choices"][0]["message"]["content"] == "Seen."
    assert sent(engine) == [
        text("Compare "),
        {"type": "image_url", "image_url": {"url": data_url(first)}},
        text(" with "),
        {"type": "image_url", "image_url": {"url": data_url(second, "image/jpeg"), "detail": "high"}},
        text("."),
    ]  # fmt: skip
    usage = response.json()["usage"]
    assert usage["prompt_tokens"] == 5  # the engine's count


def test_what_engines_would_not_heed_is_done_here(engine: FakeEngine, url: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = encoded(picture(3, (120, 60)), "JPEG", exif=exif)
    large = encoded(picture(4, (1200, 900)))
    clear = encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    parts = [
        image_part(turned),
        image_part(large, detail="low"),
        image_part(encoded(picture(5, (3000, 3000)))),
        image_part(encoded(PHOTO, "GIF")),
        image_part(clear, detail="original"),
    ]
    assert ask(url, *parts).status_code == 200
    upright, low, shrunk, still, white = (opened(part) for part in sent(engine))
    assert upright.size == (60, 120)
    assert low.size == (512, 384)
    assert shrunk.width * shrunk.height <= 1536 * 32 * 32
    assert still.format == "PNG"
    assert white.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    details = [part["image_url"].get("detail") for part in sent(engine)]
    assert details == [None, "low", None, None, "high"]


def test_uploaded_images_and_those_of_responses(engine: FakeEngine, url: str) -> None:
    with make_client(url) as client:
        file = client.files.create(file=("a.png", encoded(PHOTO)), purpose="vision")
        content: Any = [
            {"type": "input_text", "text": "What is this?"},
            {"type": "input_image", "file_id": file.id, "detail": "low"},
        ]
        answer = client.responses.create(model=NAME, input=[{"role": "user", "content": content}])
        assert answer.output_text == "Seen."
        assert opened(sent(engine)[1]).size == PHOTO.size
        image: Any = {"type": "file", "file": {"file_data": data_url(encoded(PHOTO))}}
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": [image]}])
    assert opened(sent(engine)[0]).size == PHOTO.size


def test_bad_images_and_addresses_never_reach_the_engine(engine: FakeEngine, url: str) -> None:
    address = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    for part in (image_part(b"?"), image_part(bomb(60_000, 60_000)), address):
        error = assert_error(ask(url, part), 400)
        assert error["param"] == "messages[0].content[0].image_url.url"
    assert not any(path.endswith("completions") for path, _, _ in engine.asked)


def test_without_what_opens_images_it_is_said_what_to_install(
    engine: FakeEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermini.service.upstream.forward.find_spec", lambda name: None)
    error = assert_error(ask(url, image_part(encoded(PHOTO))), 400)
    assert "evermini[vision]" in error["message"]
    assert error["param"] == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize(
    ("status", "message", "says"),
    [
        (400, "theirs is not a multimodal model", "?images=no"),
        (500, "image input is not supported - hint: you may need to provide the mmproj", "--mmproj"),
        (400, "At most 1 image(s) may be provided in one prompt.", "At most 1 image"),
    ],
)  # fmt: skip
def test_a_refusal_is_told_and_nothing_else_is_tried(
    engine: FakeEngine, url: str, status: int, message: str, says: str
) -> None:
    engine.answer = refused(status, message=message)
    for stream in (False, True):
        error = assert_error(ask(url, image_part(encoded(PHOTO)), stream=stream), 400)
        assert says in error["message"]
        assert message.split(" - ")[0] in error["message"]
    asked = [path for path, _, _ in engine.asked if path.endswith("completions")]
    assert len(asked) == 2


def test_a_conversation_with_images_is_sent_whole(engine: FakeEngine, url: str) -> None:
    engine.answer = refused(400, message="too long", code="context_length_exceeded")
    response = ask(url, text("word " * 20_000), image_part(encoded(PHOTO)))
    assert assert_error(response, 400)["code"] == "context_length_exceeded"
    (body,) = [body for path, _, body in engine.asked if path.endswith("completions")]
    assert body["messages"][0]["content"][0]["text"].startswith("word word")
    asked = {"x_evermini": {"reading": "recall"}}
    error = assert_error(ask(url, image_part(encoded(PHOTO)), **asked), 400)
    assert error["param"] == "x_evermini.reading"


def test_models_say_whether_they_see(engine: FakeEngine, url: str) -> None:
    ask(url, text("Hello!"))
    (model,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert model["input_modalities"] == ["text", "image"]
