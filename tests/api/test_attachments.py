"""Files in messages: by id, as base64, in Responses; the text the model is shown, and what is refused."""

from __future__ import annotations

import base64
import io
import zipfile
from typing import Any

import httpx
import openai
import pytest

from evermini.service.parts import wrap_document
from tests.pdf_files import make_pdf
from tests.serving import assert_error

MODEL = "gpt-4.1-nano"
QUESTION = {"type": "text", "text": "What is the code?"}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def file_part(data: bytes, name: str, mime: str = "application/octet-stream") -> dict[str, Any]:
    return {
        "type": "file",
        "file": {"file_data": f"data:{mime};base64,{b64(data)}", "filename": name},
    }


def make_docx(body: str, **parts: str) -> bytes:
    namespace = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "word/document.xml",
            f'<w:document xmlns:w="{namespace}"><w:body>{body}</w:body></w:document>',
        )
        for name, content in parts.items():
            archive.writestr(f"word/{name}.xml", content)
    return data.getvalue()


def prompt_tokens(client: openai.OpenAI, content: Any) -> int:
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}], max_tokens=1
    )
    assert answer.usage
    return answer.usage.prompt_tokens


@pytest.mark.parametrize(
    ("data", "name", "text"),
    [
        (b"The code is 4711.\n", "notes.txt", "The code is 4711."),
        (
            make_pdf(["The code is 4711.", "Page two."]),
            "two.pdf",
            "[page 1]\nThe code is 4711.\n\n[page 2]\nPage two.",
        ),
        (
            b"<!doctype html><head><title>T</title><style>p{}</style></head><body><p>The <b>code</b>:<p>4711",
            "page.html",
            "T\n\nThe code:\n4711",
        ),
        (make_docx("<w:p><w:r><w:t>Code 4711</w:t></w:r></w:p>"), "a.docx", "Code 4711"),
    ],
)
def test_a_file_reads_like_a_document_in_the_text(
    client: openai.OpenAI, data: bytes, name: str, text: str
):
    expected = prompt_tokens(
        client, [{"type": "text", "text": wrap_document(name, text)}, QUESTION]
    )
    uploaded = client.files.create(file=(name, data), purpose="user_data")
    by_id = {"type": "file", "file": {"file_id": uploaded.id}}
    plain = {"type": "file", "file": {"file_data": b64(data), "filename": name}}
    for part in (file_part(data, name), plain, by_id):
        assert prompt_tokens(client, [part, QUESTION]) == expected


def test_responses_take_files_and_count_them(client: openai.OpenAI):
    data = make_pdf(["The code is 4711."])
    uploaded = client.files.create(file=("a.pdf", data), purpose="user_data")
    url = f"data:application/pdf;base64,{b64(data)}"
    counts = set()
    for part in (
        {"type": "input_file", "file_id": uploaded.id},
        {"type": "input_file", "file_data": url, "filename": "a.pdf"},
    ):
        content = [part, {"type": "input_text", "text": "What is the code?"}]
        sent = [{"role": "user", "content": content}]
        answer = client.responses.create(model=MODEL, input=sent, max_output_tokens=16)
        assert answer.usage
        counts.add(answer.usage.input_tokens)
        counts.add(client.responses.input_tokens.count(model=MODEL, input=sent).input_tokens)
        listed = client.responses.input_items.list(answer.id)
        assert listed.data[0].content[0].type == "input_file"
    expected = prompt_tokens(
        client,
        [
            {"type": "text", "text": wrap_document("a.pdf", "[page 1]\nThe code is 4711.")},
            QUESTION,
        ],
    )
    assert counts == {expected}


def test_a_file_in_a_tools_output_is_read(client: openai.OpenAI):
    output = [{"type": "input_file", "file_data": b64(b"It is 31 degrees."), "filename": "w.txt"}]
    answer = client.responses.create(
        model=MODEL,
        max_output_tokens=16,
        input=[
            {"role": "user", "content": "How warm is it?"},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": output},
        ],
    )
    assert answer.usage
    assert answer.usage.input_tokens > 30


def test_a_long_pdf_goes_through_recall_with_its_pages(client: openai.OpenAI):
    filler = "The committee met on Monday and talked about the budget of the year before."
    pages = ["\n".join([filler] * 40) for _ in range(20)]
    pages[12] = f"{filler}\nThe secret code of the vault is 4711.\n{filler}"
    part = file_part(make_pdf(pages), "minutes.pdf", "application/pdf")
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is the secret code of the vault?"},
                    part,  # the question is the text, wherever it stands
                ],
            }
        ],
        max_tokens=16,
        extra_body={"x_evermini": {"why": True, "regex": "It is 4711\\."}},
    )
    why = answer.to_dict()["x_evermini"]
    found = [span for span in why["recall"]["spans"] if span["included"]]
    assert {span["source"] for span in found} == {"minutes.pdf"}
    assert any(span["pages"][0] <= 13 <= span["pages"][1] for span in found)
    (cited,) = why["citations"]
    assert (cited["quote"], cited["pages"], cited["answer"]) == ("4711", [13, 13], [6, 10])

    uploaded = client.files.create(file=("minutes.pdf", make_pdf(pages)), purpose="user_data")
    request = {
        "model": MODEL,
        "max_output_tokens": 16,
        "input": [
            {
                "role": "user",
                "content": [
                    {"type": "input_file", "file_id": uploaded.id},
                    {"type": "input_text", "text": "What is the secret code of the vault?"},
                ],
            }
        ],
        "extra_body": {"x_evermini": {"why": True, "regex": "It is 4711\\."}},
    }
    with client.responses.stream(**request) as stream:
        events = list(stream)
        response = stream.get_final_response()
    part = response.output[0].content[0]
    (annotation,) = part.annotations
    assert (annotation.type, annotation.file_id) == ("file_citation", uploaded.id)
    assert (annotation.filename, annotation.index) == ("minutes.pdf", len("It is 4711"))
    assert annotation.to_dict()["x_evermini"]["pages"] == [13, 13]
    added = [e for e in events if e.type == "response.output_text.annotation.added"]
    assert [event.annotation.type for event in added] == ["file_citation"]


def test_what_is_read_whole_is_cited_too_and_only_if_asked_why(client: openai.OpenAI):
    part = file_part(make_pdf(["Hello there.", "The mate is called Gherkin."]), "crew.pdf")
    asked = {
        "model": MODEL,
        "messages": [
            {"role": "user", "content": [part, {"type": "text", "text": "Who is the mate?"}]}
        ],
        "max_tokens": 16,
    }
    form = {"regex": "It is Gherkin\\."}
    chunks = list(
        client.chat.completions.create(
            **asked, stream=True, extra_body={"x_evermini": {**form, "why": True}}
        )
    )
    last = next(c for c in chunks if c.choices and c.choices[0].finish_reason)
    why = last.to_dict()["x_evermini"]
    (cited,) = why["citations"]
    assert why["reading"] == "dense"
    assert (cited["source"], cited["pages"], cited["quote"]) == ("crew.pdf", [2, 2], "Gherkin")
    plain = client.chat.completions.create(**asked, extra_body={"x_evermini": form})
    assert "x_evermini" not in plain.to_dict()


@pytest.mark.parametrize(
    ("part", "param", "says"),
    [
        ({"type": "file"}, "file", "Missing required parameter"),
        ({"type": "file", "file": {}}, "file.file_id", "Missing required parameter"),
        (
            {"type": "file", "file": {"file_id": "file-1", "file_data": "aGk="}},
            "file.file_data",
            "Mutually exclusive",
        ),
        ({"type": "file", "file": {"file_id": "file-none"}}, "file.file_id", "No such File"),
        ({"type": "file", "file": {"file_data": "%%%"}}, "file.file_data", "Invalid base64"),
        ({"type": "file", "file": {"file_data": "data:,x"}}, "file.file_data", "Invalid data URL"),
        (file_part(b"\x00\x01\x02", "x.bin"), "file.file_data", "binary file"),
        (file_part(b"%PDF-1.4 broken", "x.pdf"), "file.file_data", "damaged PDF"),
        (file_part(b"PK\x03\x04broken", "x.docx"), "file.file_data", "an archive"),
        ({"type": "file", "file": {"file_url": "ftp://x/y"}}, "file.file_url", "https://"),
        (
            {"type": "file", "file": {"file_url": "https://example.com/a.pdf"}},
            "file.file_url",
            "--allow-remote-images",
        ),
        ({"type": "image_url", "image_url": {}}, "image_url.url", "Missing required parameter"),
    ],
)
def test_what_cannot_be_read_is_a_400_with_its_place(
    base_url: str, part: dict[str, Any], param: str, says: str
):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [QUESTION, part]}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 1}
    error = assert_error(httpx.post(f"{base_url}/v1/chat/completions", json=body), 400)
    assert error["param"] == f"messages[1].content[1].{param}"
    assert says in error["message"]


@pytest.mark.parametrize("path", ["responses", "responses/input_tokens"])
def test_responses_name_the_item_and_the_part(base_url: str, path: str):
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    bad = {"type": "input_file", "file_id": "file-none"}
    output = {"type": "function_call_output", "call_id": "c1"}
    text = {"type": "input_text", "text": "What is it?"}
    image = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    for items, param in (
        ([{"role": "user", "content": [text, bad]}], "input[0].content[1].file_id"),
        ([{"role": "user", "content": [image]}], "input[0].content[0].image_url"),
        (
            [{"role": "user", "content": "Hi"}, call, {**output, "output": [text, bad]}],
            "input[2].output[1].file_id",
        ),
        ([{"role": "user", "content": [{"type": "input_file"}]}], "input[0].content[0].file_id"),
        (
            [{"role": "user", "content": [{**text, "file_id": "x"}]}],
            "input[0].content[0].file_id",
        ),
    ):
        body = {"model": MODEL, "input": items, "instructions": "Be brief."}
        error = assert_error(httpx.post(f"{base_url}/v1/{path}", json=body), 400)
        assert error["param"] == param


def test_only_users_and_tools_send_files(base_url: str):
    for role in ("system", "assistant"):
        content = [file_part(b"hi", "a.txt")]
        body = {"model": MODEL, "messages": [{"role": role, "content": content}]}
        error = assert_error(httpx.post(f"{base_url}/v1/chat/completions", json=body), 400)
        assert error["param"] == "messages[0].content[0].type"


def test_a_zip_bomb_is_refused(base_url: str):
    bomb = make_docx("<w:p><w:r><w:t>" + "a" * (70 << 20) + "</w:t></w:r></w:p>")
    assert len(bomb) < 1 << 20
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": [file_part(bomb, "bomb.docx")]}],
    }
    error = assert_error(httpx.post(f"{base_url}/v1/chat/completions", json=body, timeout=60), 400)
    assert "unpacks to more than" in error["message"]


def test_xml_that_declares_entities_is_refused(base_url: str):
    evil = make_docx("", footnotes='<!DOCTYPE x [<!ENTITY a "b">]><x>&a;</x>')
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": [file_part(evil, "evil.docx")]}],
    }
    error = assert_error(httpx.post(f"{base_url}/v1/chat/completions", json=body), 400)
    assert "declares entities" in error["message"]
