"""How upstream engines are named, what they tell of themselves, and how their streams are read."""

from __future__ import annotations

import pytest

from evermini.backends.client import UpstreamClient
from evermini.backends.discover import discover
from evermini.backends.spec import UpstreamSpec, parse_upstream
from evermini.backends.sse import events
from evermini.config import Settings
from evermini.errors import ConfigError, UpstreamError, UpstreamUnavailableError
from evermini.service.loading import load_index
from evermini.service.upstream.load import connect
from tests.upstream_fakes import fake_engine, pieces

URL = "http://10.0.0.5:8000/v1"


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        (f"mini={URL}", UpstreamSpec("mini", URL)),
        (f" mini={URL}/ ", UpstreamSpec("mini", URL)),
        ("q3=HTTPS://gpu.example", UpstreamSpec("q3", "https://gpu.example")),
        (f"mini={URL}?images=yes", UpstreamSpec("mini", URL, images=True)),
        (f"mini={URL}?images=no", UpstreamSpec("mini", URL, images=False)),
        (
            f"org/q={URL}?model=Qwen/Qwen3-32B&window=32768&key=VLLM_KEY",
            UpstreamSpec("org/q", URL, "Qwen/Qwen3-32B", 32768, "VLLM_KEY"),
        ),
    ],
)
def test_engines_are_named_by_url(text, spec):
    assert parse_upstream(text) == spec


@pytest.mark.parametrize(
    "text", ["mini", "/models/x.gguf", "mini=/models/x.gguf", "models/http:/x"]
)
def test_anything_else_is_a_model_of_ours(text):
    assert parse_upstream(text) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (URL, "it has no name"),
        ("mini=http://", "no base URL"),
        ("mini=http:///v1", "no base URL"),
        ("mini=http://me:secret@host/v1", "keys do not belong"),
        (f"mini={URL}?modle=x", "no option 'modle'"),
        (f"mini={URL}?window=32k", "number of tokens"),
        (f"mini={URL}?window=0", "number of tokens"),
        (f"mini={URL}?images=maybe", "'yes' or 'no'"),
    ],
)
def test_what_is_wrong_in_a_url_is_named(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_upstream(text)


def test_a_key_that_is_not_set_and_an_index_that_an_engine_cannot_make_are_named(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        connect(UpstreamSpec("mini", URL, key_variable="NO_SUCH_KEY"), Settings())
    with pytest.raises(ConfigError, match="recall_index"):
        load_index(Settings(recall_index="own"))


async def read(*given: bytes) -> list[str]:
    return [event async for event in events(pieces(*given))]


async def test_events_are_read_whatever_the_pieces_they_come_in():
    sent = 'data: {"a": "\u2028 ü"}\r\n\r\n: comment\nevent: x\ndata:1\ndata: 2\n\n\ndata: [DONE]\n\n'.encode()
    expected = ['{"a": "\u2028 ü"}', "1\n2", "[DONE]"]
    assert await read(sent) == expected
    for size in (1, 2, 3, 7):
        assert await read(*(sent[at : at + size] for at in range(0, len(sent), size))) == expected


async def test_the_last_event_needs_no_empty_line():
    assert await read(b"data: 1\n\ndata: [DONE]") == ["1", "[DONE]"]
    assert await read(b"data: 1\n\ndata: [DONE]\n") == ["1", "[DONE]"]
    assert await read(b"") == []


SLOTS = {"default_generation_settings": {"n_ctx": 4096}}


@pytest.mark.parametrize(
    ("models", "props", "spec", "found"),
    [
        ([{"id": "a", "max_model_len": 8192}], None, {}, ("a", 8192)),
        ([{"id": "a", "max_model_len": 8192}], None, {"window": 100}, ("a", 100)),
        ([{"id": "a", "context_window": 1_047_576}], SLOTS, {}, ("a", 1_047_576)),
        ([{"id": "a", "meta": {"n_ctx_train": 32768}}], SLOTS, {}, ("a", 4096)),
        ([{"id": "a"}], None, {}, ("a", None)),
        ([{"id": "a"}, {"id": "b", "max_model_len": 7}], None, {"model": "b"}, ("b", 7)),
        ([{"id": "a"}, {"id": "mini", "max_model_len": 7}], None, {}, ("mini", 7)),
    ],
)
async def test_an_engine_tells_its_model_and_window(models, props, spec, found):
    with fake_engine() as (engine, url):
        engine.models, engine.props = models, props
        client = UpstreamClient(url, timeout=5)
        told = await discover(client, UpstreamSpec("mini", url, **spec))
    assert (told.model, told.window) == found


SEEING, BLIND = {"modalities": {"vision": True}}, {"modalities": {"vision": False, "audio": True}}
UNDERSTANDS = {"has_image_understanding": True}


@pytest.mark.parametrize(
    ("entry", "props", "told", "spec", "sees"),
    [
        ({"input_modalities": ["text", "image"]}, None, {}, {}, True),
        ({"input_modalities": ["text"]}, SEEING, {}, {}, False),
        ({"owned_by": "llamacpp"}, SEEING, {}, {}, True),
        ({"owned_by": "llamacpp", "max_model_len": 9}, BLIND, {}, {}, False),
        ({"owned_by": "sglang"}, None, {"/model_info": UNDERSTANDS}, {}, True),
        ({"owned_by": "sglang"}, None, {"/get_model_info": UNDERSTANDS}, {}, True),
        ({"owned_by": "sglang"}, None, {"/model_info": {"has_image_understanding": False}}, {}, False),
        ({"owned_by": "library"}, None, {"/api/show": {"capabilities": ["completion", "vision"]}}, {}, True),
        ({"owned_by": "library"}, None, {"/api/show": {"capabilities": ["completion"]}}, {}, False),
        ({"owned_by": "vllm", "max_model_len": 9}, None, {}, {}, None),
        ({"owned_by": "vllm", "max_model_len": 9}, None, {}, {"images": True}, True),
        ({"input_modalities": ["text", "image"]}, None, {}, {"images": False}, False),
        ({}, None, {}, {}, None),
        ({}, SLOTS, {}, {}, None),
    ],
)  # fmt: skip
async def test_an_engine_tells_whether_its_model_sees(entry, props, told, spec, sees):
    with fake_engine() as (engine, url):
        engine.models, engine.props, engine.told = [{"id": "a", **entry}], props, told
        found = await discover(UpstreamClient(url, timeout=5), UpstreamSpec("mini", url, **spec))
        asked = {path for path, _, _ in engine.asked}
    assert found.sees is sees
    if entry.get("owned_by") == "vllm":
        assert asked == {"/v1/models"}  # which tells no more, so nothing is tried


@pytest.mark.parametrize(
    ("models", "spec", "says"),
    [
        ([{"id": "a"}, {"id": "b"}], {}, "several models.*a, b.*model=NAME"),
        ([{"id": "a"}], {"model": "c"}, "no model c.*has: a"),
        ([], {}, "has no model"),
        (["a"], {}, "no OpenAI-compatible engine"),
    ],
)
async def test_an_engine_without_the_model_is_named_with_what_it_has(models, spec, says):
    with fake_engine() as (engine, url):
        engine.models = models
        with pytest.raises(UpstreamError, match=says):
            await discover(UpstreamClient(url, timeout=5), UpstreamSpec("mini", url, **spec))


async def test_an_engine_that_is_not_there_is_named_at_once():
    with fake_engine() as (_, url):
        pass
    with pytest.raises(UpstreamUnavailableError, match="cannot be reached"):
        await discover(UpstreamClient(url, timeout=5), UpstreamSpec("mini", url))
