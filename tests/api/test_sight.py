"""Vision-language checkpoints behind the API: the official client, a real server, tiny random checkpoints.

Their tokens are single bytes, so what comes with an answer's log-probabilities tells which tokens were written.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from evermini.backends.spec import UpstreamSpec
from evermini.config import Settings
from evermini.errors import ConfigError, DamagedCheckpointError
from evermini.models.checkpoint import open_checkpoint
from evermini.service.image_tokens import image_cost
from evermini.service.runtime import Runtime, load_tier
from evermini.service.upstream.load import connect
from evermini.text.tokenizer import Tokenizer
from tests.images import data_url, encoded, image_part
from tests.serving import make_client, serving
from tests.vlm_checkpoints import TinyVlm, picture, save_vlm

MODEL = "gpt-4.1-mini"
QUESTION = "What is this? Say it in a few words, please."
NUM_TOKENS = 12
PHOTO, OTHER, TALL = picture(1), picture(9), picture(2, (56, 140))

Part = str | Image.Image


def asking(*parts: Part, **options: Any) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else image_part(encoded(part))
        for part in parts
    ]
    request = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "logprobs": True,
    }
    return {**request, **options}


def messages_of(*parts: Part) -> list[dict[str, Any]]:
    """The same for `transformers`."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def written(logprobs: Any) -> list[bytes]:
    return [bytes(token.bytes) for token in logprobs.content]


@dataclass(frozen=True)
class Server:
    """A server, and the checkpoint that it serves in `transformers`."""

    oracle: TinyVlm
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return make_client(self.url)

    def ask(self, *parts: Part, **options: Any) -> Any:
        return self.client.chat.completions.create(**asking(*parts, **options))

    def inputs(self, *parts: Part, **options: Any) -> dict[str, Any]:
        images = [part for part in parts if isinstance(part, Image.Image)]
        return self.oracle.inputs(messages_of(*parts), images, **options)

    def expected(self, *parts: Part, **options: Any) -> list[bytes]:
        """What `transformers` writes, greedily; ``options``: of its image processor."""
        tokenizer = Tokenizer(open_checkpoint(self.oracle.path).tokenizer)
        tokens = self.oracle.greedy(self.inputs(*parts, **options), NUM_TOKENS)
        return [tokenizer.token_bytes(i) for i in tokens if i not in tokenizer.eos_ids]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "idefics3"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = save_vlm(request.param, folder)
    settings = Settings(precision="fp32", kv_memory=32 << 20, home=tmp_path_factory.mktemp("home"))
    served = load_tier(f"mini={folder}", settings)
    with Runtime([served]) as runtime, serving(runtime, settings) as url:
        yield Server(oracle, url)


CONVERSATIONS: list[tuple[Part, ...]] = [
    (QUESTION,),
    (QUESTION, PHOTO),
    (QUESTION, OTHER),
    (PHOTO, "and", TALL, QUESTION),
]


@pytest.mark.parametrize("parts", CONVERSATIONS)
def test_answers_are_those_of_transformers(server: Server, parts: tuple[Part, ...]) -> None:
    assert written(server.ask(*parts).choices[0].logprobs) == server.expected(*parts)


def test_another_image_gets_another_answer(server: Server) -> None:
    answers = [server.ask(QUESTION, image) for image in (PHOTO, OTHER)]
    first, second = (written(answer.choices[0].logprobs) for answer in answers)
    assert first != second
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens


def test_usage_counts_images_as_the_contract_does(server: Server) -> None:
    usage = server.ask(QUESTION, PHOTO, TALL).usage
    counted = sum(image_cost(*image.size, "auto", MODEL) for image in (PHOTO, TALL))
    text = server.oracle.rendered(messages_of(QUESTION, PHOTO, TALL))
    num_text = len(server.oracle.tokenizer(text, add_special_tokens=False)["input_ids"]) - 2
    assert usage.prompt_tokens_details.image_tokens == counted
    assert usage.prompt_tokens == num_text + counted


def test_the_same_image_is_found_computed(server: Server) -> None:
    image = picture(77)
    first = server.ask(QUESTION, image).usage
    again = server.ask(QUESTION, image).usage
    other = server.ask(QUESTION, picture(78)).usage
    assert again.prompt_tokens_details.cached_tokens > first.prompt_tokens_details.cached_tokens
    # Of the other one, what stands before the image.
    assert other.prompt_tokens_details.cached_tokens <= first.prompt_tokens_details.cached_tokens


def test_a_conversation_goes_on_from_its_images(server: Server) -> None:
    image = picture(79)
    history = asking(QUESTION, image)["messages"]
    server.ask(QUESTION, image)
    more = [*history, {"role": "assistant", "content": "x"}, {"role": "user", "content": "And?"}]
    usage = server.client.chat.completions.create(model=MODEL, messages=more, max_tokens=1).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) > usage.prompt_tokens // 2


def test_streams(server: Server) -> None:
    chunks = list(server.client.chat.completions.create(**asking(QUESTION, PHOTO, stream=True)))
    tokens = [
        token for chunk in chunks if chunk.choices and chunk.choices[0].logprobs
        for token in written(chunk.choices[0].logprobs)
    ]  # fmt: skip
    assert tokens == server.expected(QUESTION, PHOTO)


async def test_requests_with_and_without_images_share_batches(server: Server) -> None:
    wanted: list[tuple[Part, ...]] = [
        (QUESTION, PHOTO), (QUESTION,), (TALL, QUESTION), (QUESTION, OTHER), ("Hello!",),
    ]  # fmt: skip
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        answers = await asyncio.gather(
            *(client.chat.completions.create(**asking(*parts)) for parts in wanted)
        )
    for parts, answer in zip(wanted, answers, strict=True):
        assert written(answer.choices[0].logprobs) == server.expected(*parts)


def test_responses_see_images(server: Server) -> None:
    content = [
        {"type": "input_text", "text": QUESTION},
        {"type": "input_image", "image_url": data_url(encoded(PHOTO)), "detail": "auto"},
    ]
    items: Any = [{"role": "user", "content": content}]
    options: Any = {"include": ["message.output_text.logprobs"], "temperature": 0}
    answer = server.client.responses.create(
        model=MODEL, input=items, max_output_tokens=16, **options
    )
    part: Any = answer.output[0]
    tokens = [bytes(token.bytes) for token in part.content[0].logprobs]
    expected = server.expected(QUESTION, PHOTO)
    assert tokens[: len(expected)] == expected
    counted = server.client.responses.input_tokens.count(model=MODEL, input=items)
    assert answer.usage is not None
    assert counted.input_tokens == answer.usage.input_tokens


def test_an_image_in_a_file_part_and_at_low_detail(server: Server) -> None:
    part = {"type": "file", "file": {"file_data": data_url(encoded(PHOTO)), "filename": "a.png"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}, part]}]
    answer = server.ask(messages=messages)
    assert written(answer.choices[0].logprobs) == server.expected(QUESTION, PHOTO)
    large = picture(5, (1120, 840))
    low = image_part(encoded(large), detail="low")
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}, low]}]
    answer = server.ask(messages=messages)
    small = large.resize((512, 384))
    expected = server.expected(QUESTION, small, do_image_splitting=False)  # one tile, if tiles
    assert written(answer.choices[0].logprobs) == expected


def test_an_answer_about_an_image_follows_a_schema(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["receipt", "photo"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    answer = server.ask(QUESTION, PHOTO, response_format=form, max_tokens=60)
    assert json.loads(answer.choices[0].message.content)["kind"] in ("receipt", "photo")


def test_special_tokens_in_a_text_are_no_images(server: Server) -> None:
    name = "<|image_pad|>" if server.oracle.family == "qwen2_5_vl" else "<image>"
    answer = server.ask(f"What is {name}?", PHOTO)
    assert answer.usage.prompt_tokens > 0


def test_what_does_not_fit_is_refused_with_the_images_tokens(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask("word " * 300, PHOTO)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert "in the images" in caught.value.message


def test_too_many_images_are_refused_before_all_are_opened(server: Server) -> None:
    messages = [
        {"role": "user", "content": [*[image_part(encoded(PHOTO))] * 120, image_part(b"?")]}
    ]
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask(messages=messages)
    assert caught.value.code == "context_length_exceeded"
    assert "detail 'low'" in caught.value.message


def test_recall_is_not_for_images(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask(QUESTION, PHOTO, extra_body={"x_evermini": {"reading": "recall"}})
    assert caught.value.param == "x_evermini.reading"


def test_what_cannot_be_opened_is_refused_by_its_place(server: Server) -> None:
    messages = [{"role": "user", "content": [image_part(b"no image")]}]
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask(messages=messages)
    assert caught.value.param == "messages[0].content[0].image_url.url"
    assert caught.value.code == "invalid_image_format"
    if server.oracle.family == "qwen2_5_vl":  # its preprocessor takes no stripes
        stripe = encoded(Image.new("RGB", (500, 2)))
        with pytest.raises(openai.BadRequestError) as caught:
            server.ask(messages=[{"role": "user", "content": [image_part(stripe)]}])
        assert caught.value.code == "invalid_image_format"


def test_through_another_server_it_sees_the_same(server: Server) -> None:
    """An Evermini in front, which knows the engine behind it to see, and passes images on."""
    spec = UpstreamSpec("behind", f"{server.url}/v1", model=MODEL)
    with Runtime([connect(spec, Settings())]) as runtime, serving(runtime) as url:
        client = make_client(url)
        for parts in CONVERSATIONS:
            asked = asking(*parts, model="behind")
            answer = client.chat.completions.create(**asked)
            direct = server.ask(*parts)
            assert written(answer.choices[0].logprobs) == server.expected(*parts)
            assert answer.usage.prompt_tokens == direct.usage.prompt_tokens
            details = answer.usage.prompt_tokens_details
            assert details.image_tokens == direct.usage.prompt_tokens_details.image_tokens
        chunks = list(client.chat.completions.create(**asked, stream=True))
        tokens = [
            token for chunk in chunks if chunk.choices and chunk.choices[0].logprobs
            for token in written(chunk.choices[0].logprobs)
        ]  # fmt: skip
        assert tokens == server.expected(*CONVERSATIONS[-1])
        low = image_part(encoded(picture(5, (1120, 840))), detail="low")
        messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}, low]}]
        answer, direct = (
            one.chat.completions.create(**asking(model=name, messages=messages))
            for one, name in ((client, "behind"), (server.client, MODEL))
        )
        assert answer.usage.prompt_tokens == direct.usage.prompt_tokens
        assert written(answer.choices[0].logprobs) == written(direct.choices[0].logprobs)
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**asking("word " * 300, PHOTO, model="behind"))
        assert caught.value.code == "context_length_exceeded"


def test_without_transformers_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_vlm("qwen2_5_vl", tmp_path)
    monkeypatch.setattr("evermini.vision.tower.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"evermini\[vlm\]"):
        load_tier(tmp_path, Settings(precision="fp32", kv_memory=32 << 20, home=tmp_path / "home"))


def test_a_checkpoint_without_image_settings_is_damaged(tmp_path: Path) -> None:
    save_vlm("qwen2_5_vl", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(DamagedCheckpointError, match="preprocessor_config"):
        load_tier(tmp_path, Settings(precision="fp32", kv_memory=32 << 20, home=tmp_path / "home"))
