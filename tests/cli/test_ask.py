"""``evermini ask``: what goes into the prompt, what comes out where, and every way to be wrong."""

import json
import re

import pytest

from evermini.cli.ask import build_prompt
from tests.images import data_url, encoded, text_image
from tests.pdf_files import make_pdf

pytestmark = pytest.mark.usefixtures("loaded_nano")


def test_answers_on_stdout_and_nothing_else(evermini):
    result = evermini("ask", "What is the capital of France?")
    assert (result.code, result.err) == (0, "")
    assert "Paris" in result.out
    assert result.out.endswith("\n")


def test_reads_files_and_piped_input_in_order(evermini, llm, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("The dog is called Bello.\n")
    (tmp_path / "b.txt").write_text("\ufeffThe cat is called Minka.\n", encoding="utf-8")
    seen = []
    real = llm.chat

    def spy(messages, **params):
        seen.append(messages)
        return real(messages, **params)

    monkeypatch.setattr(llm, "chat", spy)
    result = evermini(
        *("ask", "-f", "a.txt", "--file", "b.txt", "--system", "Be brief."),
        *("--max-tokens", "3", "--json", "What is the dog called?"),
        stdin="The bird is called Piep.\n",
    )
    assert result.code == 0, result.err
    [messages] = seen
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[1]["content"] == (
        '<document name="a.txt">\nThe dog is called Bello.\n</document>\n\n'
        '<document name="b.txt">\nThe cat is called Minka.\n</document>\n\n'
        '<document name="standard input">\nThe bird is called Piep.\n</document>\n\n'
        "What is the dog called?"
    )


def test_a_file_answers_the_question(evermini, tmp_path):
    (tmp_path / "note.txt").write_text("The secret word is banana.")
    result = evermini("ask", "-f", "note.txt", "--max-tokens", "20", "What is the secret word?")
    assert "banana" in result.out


def test_an_image_is_read_named_or_piped(evermini, llm, tmp_path, monkeypatch):
    data = encoded(text_image(["CORNER SHOP", "TOTAL\t17.45"]))
    (tmp_path / "receipt.png").write_bytes(data)
    seen = []
    real = llm.chat

    def spy(messages, **params):
        seen.append(messages[-1]["content"])
        return real(messages, **params)

    monkeypatch.setattr(llm, "chat", spy)
    asked = ("--max-tokens", "8", "--json", "What is the total?")
    results = [
        evermini("ask", "-f", "receipt.png", *asked),
        evermini("ask", *asked, stdin=data),
    ]
    for content, result in zip(seen, results, strict=True):
        assert result.code == 0, result.err
        image, text = content
        assert image["image_url"]["url"] == data_url(data, "")
        assert text["text"] == "What is the total?"


def test_a_scanned_pdf_is_read_if_it_is_named(evermini, tmp_path):
    text_image(["Invoice 4711"]).save(tmp_path / "scan.pdf", "PDF")
    result = evermini("ask", "-f", "scan.pdf", "--max-tokens", "2", "Which invoice?")
    assert result.code == 0
    assert "no text" not in result.err
    skipped = evermini("ask", "-f", ".", "Which invoice?")
    assert "PDF without text" in skipped.err


def test_piped_input_alone_is_the_question(evermini):
    assert "Paris" in evermini("ask", stdin="What is the capital of France?\n").out


def test_a_question_alone_is_the_whole_prompt():
    assert build_prompt([], "Why?") == "Why?"


def test_verbose_prints_usage_and_speed_to_stderr(evermini):
    result = evermini("ask", "-v", "--max-tokens", "4", "Count to ten.")
    for part in ("prompt tokens", "4 written", "prefill", "first token", "decode"):
        assert part in result.err
    assert "prompt tokens" not in result.out
    assert "(the answer ends early: after 4 tokens, as asked)" in result.err


def test_json_is_one_object_with_usage_and_speed(evermini):
    result = evermini("ask", "--json", "--max-tokens", "5", "Count to ten.")
    answer = json.loads(result.out)
    assert answer["model"] == "gpt-4.1-nano-2025-04-14"
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["usage"]["prompt_tokens"] > 5
    assert answer["speed"]["decode_tokens_per_second"] > 0
    assert answer["speed"]["first_token_seconds"] <= answer["speed"]["seconds"]


def test_same_question_same_answer_and_seeds_repeat(evermini):
    question = ("ask", "--max-tokens", "12", "Tell me a story.")
    assert evermini(*question).out == evermini(*question).out
    seeded = (*question, "--temperature", "1.5", "--seed")
    assert evermini(*seeded, "1").out == evermini(*seeded, "1").out
    assert evermini(*seeded, "1").out != evermini(*seeded, "2").out


def test_stop_ends_before_the_text(evermini):
    whole = evermini("ask", "--max-tokens", "30", "What is the capital of France?").out
    cut = evermini(
        "ask", "--max-tokens", "30", "--stop", "France", "What is the capital of France?"
    ).out
    assert cut.rstrip("\n") == whole.partition("France")[0]


def test_a_file_longer_than_the_window_is_answered_from_what_it_says(evermini, tmp_path):
    lines = [f"Box {i} holds {i * 37 % 1009} nails and a label in Latin." for i in range(800)]
    lines[567] = "The captain's parrot is called Biscuit."
    (tmp_path / "long.txt").write_text("\n".join(lines))
    question = (
        "ask",
        "-f",
        "long.txt",
        "--why",
        "-v",
        "--max-tokens",
        "16",
        "What is the captain's parrot called?",
    )
    result = evermini(*question)
    assert result.code == 0, result.err
    assert "Biscuit" in result.out
    places = re.findall(r"long\.txt:(\d+)-(\d+)", result.err)
    assert any(int(first) <= 568 <= int(last) for first, last in places)
    assert "tokens/s" in result.err or "tokens, " in result.err
    again = evermini(*question)
    assert again.out == result.out
    assert " cached)" in again.err


def test_a_folder_is_read_once_and_an_edited_file_again(evermini, llm, tmp_path):
    for i in range(12):
        words = " ".join(f"Shelf {i} holds crate {j * 31 % 997}." for j in range(160))
        (tmp_path / "store" / f"aisle{i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "store" / f"aisle{i % 3}" / f"shelf{i}.txt").write_text(words)
    (tmp_path / "store/aisle1/parrot.txt").write_text(
        "\n\nThe captain's parrot is called Biscuit.\n"
    )
    (tmp_path / "store/logo.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "store/.gitignore").write_text("*.log\n")
    (tmp_path / "store/noise.log").write_text("The captain's parrot is called Gherkin.")
    question = (
        "ask",
        "-f",
        "store",
        "--why",
        "-v",
        "--max-tokens",
        "12",
        "What is the captain's parrot called?",
    )
    first = evermini(*question)
    assert first.code == 0, first.err
    assert "Biscuit" in first.out
    assert "Skipped 1 of 14 files: 1 binary\n  store/logo.png: binary\n" in first.err
    assert re.search(r"store/aisle1/parrot\.txt:[13]", first.err)
    recall = llm._served.reader._recall
    passes = []
    real = recall._index_chunk
    recall._index_chunk = lambda segment, chunk: (
        passes.append(segment.digest),
        real(segment, chunk),
    )
    try:
        assert "Biscuit" in evermini(*question).out
        assert passes == []
        (tmp_path / "store/aisle1/parrot.txt").write_text(
            "The captain's parrot is called Gherkin.\n"
        )
        assert "Gherkin" in evermini(*question).out
        assert len(passes) == 1
    finally:
        del recall._index_chunk


def test_a_pdf_is_read_with_its_pages(evermini, tmp_path):
    pages = [
        "\n".join(f"Box {p}-{i} holds {i * 37 % 1009} nails." for i in range(70)) for p in range(12)
    ]
    pages[7] = pages[7].replace(
        "Box 7-40 holds", "The captain's parrot is called Biscuit. Box 7-40 holds"
    )
    pages[3] = ""
    (tmp_path / "ship.pdf").write_bytes(make_pdf(pages))
    result = evermini(
        *("ask", "-f", "ship.pdf", "--why", "--max-tokens", "12"),
        "What is the captain's parrot called?",
    )
    assert result.code == 0, result.err
    assert "Biscuit" in result.out
    assert "ship.pdf: no text on 1 of 12 pages (4); they may be scans" in result.err
    assert re.search(r"ship\.pdf:\d+(-\d+)?  page (7-)?8(-9)?\b", result.err)
    assert re.search(r"stand in what was read:\n +ship\.pdf:\d+  page 8  Biscuit", result.err)
    whole = evermini(
        *("ask", "-f", "ship.pdf", "--why", "--json", "--max-tokens", "12"),
        "What is the captain's parrot called?",
    )
    told = json.loads(whole.out)["x_evermini"]
    assert told["reading"] == "recall"
    assert any(8 in span["pages"] for span in told["recall"]["spans"])
    assert told["citations"][0]["quote"] == "Biscuit"
    assert "ship.pdf:" not in whole.err.replace("ship.pdf: no text", "")


def test_too_many_tokens_name_the_folders_before_anything_is_read(
    evermini, llm, tmp_path, monkeypatch
):
    for i in range(20):
        (tmp_path / "code" / f"part{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / f"part{i % 2}" / f"{i}.py").write_text(
            f"x{i} = 1\n" * (400 * (1 + 2 * (i % 2)))
        )
    monkeypatch.setattr(llm._served.reader, "max_prompt_tokens", 20_000)
    result = evermini("ask", "-f", "code", "What is x3?")
    assert (result.code, result.out) == (1, "")
    assert re.search(r"maximum context length is 20000 tokens.* resulted in \d+ tokens", result.err)
    assert "20 files are in it. Largest: code/part0/ (" in result.err
    assert "--exclude" in result.err


def test_why_of_what_fits(evermini):
    assert "Everything was read" in evermini("ask", "--why", "--max-tokens", "2", "Hello!").err


def test_what_does_not_fit_is_an_error_with_both_counts(evermini):
    result = evermini("ask", "--max-tokens", "8190", "Hello!")
    assert result.code == 1
    assert result.out == ""
    assert "maximum context length is 8192 tokens" in result.err
    assert "8190 in the completion" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ask"], 2, "Give a question"),
        (["ask", "-f", "absent.txt", "Why?"], 1, "absent.txt cannot be read: No such file"),
        (["ask", "-f", ".", "Why?"], 1, "No file to read in .: 1 image, 1 binary"),
        (["ask", "-f", "*.md", "Why?"], 1, "No file to read in *.md: nothing is there"),
        (["ask", "-f", "-", "Why?"], 1, "Nothing is piped in"),
        (["ask", "-f", "picture.png", "Why?"], 1, "picture.png: You uploaded an unsupported image"),
        (["ask", "-f", "zeros.bin", "Why?"], 1, "zeros.bin is a binary file"),
        (["ask", "--temperature", "3", "Why?"], 1, "temperature"),
        (["ask", "--temperature", "warm", "Why?"], 2, "--temperature"),
        (["ask", "--no-such-flag", "Why?"], 2, "--no-such-flag"),
        (["ask", "--kv-memory", "lots", "Why?"], 2, "from flag --kv-memory"),
    ],
)
def test_mistakes_end_with_a_line_and_a_code(evermini, tmp_path, arguments, code, message):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    (tmp_path / "zeros.bin").write_bytes(b"\0\0\0")
    result = evermini(*arguments)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert "Traceback" not in result.err


def test_ctrl_c_ends_with_130(evermini, llm, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(llm, "chat", interrupted)
    assert evermini("ask", "Why?").code == 130


def test_the_answer_follows_a_schema(evermini, tmp_path):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}},
        "required": ["city", "sure"],
        "additionalProperties": False,
    }
    (tmp_path / "a schema.json").write_text(json.dumps(schema))
    question = "What is the capital of France?"
    result = evermini("ask", "--schema", "a schema.json", question)
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["city"] == "Paris"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ('{"type": "array", "uniqueItems": true}', "'uniqueItems' is not supported"),
    ],
)
def test_wrong_schemas(evermini, tmp_path, text, problem):
    (tmp_path / "schema.json").write_text(text)
    result = evermini("ask", "--schema", "schema.json", "Hello")
    assert result.code != 0
    assert problem in " ".join(result.err.split())
