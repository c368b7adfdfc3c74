"""Vision-language checkpoints on int8 kernels, tower and decoder, behind the API: what is computed, and for whom."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import torch
from PIL import Image

from evermini import kernels
from evermini.config import Settings
from evermini.errors import EngineStoppedError
from evermini.models.checkpoint import open_checkpoint
from evermini.service.runtime import Runtime, load_tier
from evermini.text.tokenizer import Tokenizer
from evermini.vision.tower import TowerInput, VisionTower
from tests.api.test_sight import OTHER, PHOTO, QUESTION, TALL, Part, Server, asking, written
from tests.images import encoded, image_part
from tests.serving import abandoned, serving, wait_for
from tests.vlm_checkpoints import picture, save_vlm

pytestmark = pytest.mark.skipif(
    kernels.load() is None, reason=f"native kernels: {kernels.unavailable_reason()}"
)

SECONDS = 30.0
"""Until a test gives up what should have happened long ago."""


@pytest.fixture(scope="module", params=["qwen2_5_vl", "smolvlm"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder, home = tmp_path_factory.mktemp(request.param), tmp_path_factory.mktemp("home")
    oracle = save_vlm(request.param, folder)
    settings = Settings(precision="int8", kv_memory=32 << 20, home=home)
    served = load_tier(f"mini={folder}", settings)
    assert [path.name for path in (home / "packed").glob("*-vision-*.safetensors")]
    with Runtime([served]) as runtime, serving(runtime, settings) as url:
        yield Server(oracle, url)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the pixels of the images that were computed, in order."""
    shapes: list[tuple[int, ...]] = []
    encode = VisionTower.encode

    def counting(self: VisionTower, image: TowerInput, *args: Any) -> torch.Tensor:
        shapes.append(tuple(image.pixels["pixel_values"].shape))
        return encode(self, image, *args)

    monkeypatch.setattr(VisionTower, "encode", counting)
    return shapes


class Stuck:
    """A tower that computes an image for as long as somebody waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.left = threading.Event(), threading.Event()
        self._let_go = threading.Event()
        self.niceness: int | None = None
        self._encode = VisionTower.encode
        monkeypatch.setattr(VisionTower, "encode", lambda *args: self._wait(*args))

    def _wait(
        self, tower: VisionTower, image: TowerInput, is_abandoned: Callable[[], bool]
    ) -> torch.Tensor:
        if hasattr(os, "getpriority"):
            self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self.begun.set()
        while not self._let_go.wait(0.01):
            if is_abandoned():
                self.left.set()
                raise EngineStoppedError("left")
        return self._encode(tower, image, is_abandoned)

    def let_go(self) -> None:
        self._let_go.set()


def top_logprobs(answer: Any) -> dict[bytes, float]:
    """The likeliest first tokens."""
    return {bytes(top.bytes): top.logprob for top in answer.choices[0].logprobs.content[0].top_logprobs}  # fmt: skip


@pytest.mark.parametrize("parts", [(QUESTION, PHOTO), (PHOTO, "and", TALL, QUESTION)])
def test_answers_are_close_to_those_of_transformers(
    server: Server, parts: tuple[Part, ...]
) -> None:
    found = top_logprobs(server.ask(*parts, max_tokens=1, top_logprobs=20))
    logits = server.oracle.logits(server.inputs(*parts))[-1]
    expected = logits.log_softmax(-1)
    tokenizer = Tokenizer(open_checkpoint(server.oracle.path).tokenizer)
    by_text = {tokenizer.token_bytes(i): expected[i].item() for i in range(len(expected))}
    off = max(abs(value - by_text[text]) for text, value in found.items())
    spread = (logits.max() - logits.min()).item()
    print(f"{server.oracle.family}: {off:.3f} of {spread:.1f}")
    assert off < 0.1 * spread


async def test_answers_do_not_depend_on_company_or_the_cache(server: Server) -> None:
    asked: list[tuple[Part, ...]] = [
        (QUESTION, PHOTO), (QUESTION,), (TALL, QUESTION), (QUESTION, OTHER),
    ]  # fmt: skip
    alone = [written(server.ask(*parts).choices[0].logprobs) for parts in asked]
    assert alone[0] != alone[3]
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        answers = await asyncio.gather(
            *(client.chat.completions.create(**asking(*parts)) for parts in asked)
        )
    assert [written(answer.choices[0].logprobs) for answer in answers] == alone


def test_an_image_is_computed_once(server: Server, computed: list[tuple[int, ...]]) -> None:
    """In other words, in another message, in another request, twice in one: by its hash it is the same."""
    image = picture(80)
    server.ask(QUESTION, image)
    assert len(computed) == 1
    server.ask("Something else entirely:", image, "and once more", image)
    history = asking(QUESTION, image)["messages"]
    more = [*history, {"role": "assistant", "content": "x"}, {"role": "user", "content": "And?"}]
    server.ask(messages=more)
    assert len(computed) == 1
    server.ask(QUESTION, picture(81))
    assert len(computed) == 2


def test_a_client_that_leaves_ends_the_computation(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = Stuck(monkeypatch)
    with abandoned(server.url, asking(QUESTION, picture(82))):
        assert stuck.begun.wait(SECONDS)
    assert stuck.left.wait(SECONDS)


def test_texts_and_known_images_do_not_wait_for_another_image(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.ask(QUESTION, PHOTO)  # known from here on
    stuck = Stuck(monkeypatch)
    answers: list[Any] = []
    asked = threading.Thread(target=lambda: answers.append(server.ask(QUESTION, picture(83))))
    asked.start()
    assert stuck.begun.wait(SECONDS)
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        assert stuck.niceness == min(19, os.getpriority(os.PRIO_PROCESS, os.getpid()) + 10)
    assert server.ask(QUESTION).usage.completion_tokens
    assert server.ask("Another question?", PHOTO).usage.completion_tokens
    with pytest.raises(openai.BadRequestError):
        server.ask(messages=[{"role": "user", "content": [image_part(b"no image")]}])
    assert not answers
    stuck.let_go()
    wait_for(lambda: bool(answers))
    asked.join()


def test_images_beyond_all_bounds_are_refused_with_counts(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="9000 x 6000 has more than 50,000,000 pixels"):
        server.ask(QUESTION, Image.new("1", (9000, 6000)))
    content = [image_part(encoded(picture(84, (600, 600))))] * 120
    with pytest.raises(openai.BadRequestError, match=r"of 600 x 600 pixels, takes \d+"):
        server.ask(messages=[{"role": "user", "content": content}])
