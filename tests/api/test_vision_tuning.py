"""Fine-tuning a model that sees, over real HTTP: what is learnt depends on the image, and is served with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from tests.images import encoded, image_part
from tests.tuning_files import tuning_server, upload, wait_for_status
from tests.vlm_checkpoints import save_vlm

pytest.importorskip("trl")

MODEL = "gpt-4.1-mini-2025-04-14"
COLOURS = {"red": "r", "blue": "b"}


def plain(colour: str) -> dict[str, Any]:
    return image_part(encoded(Image.new("RGB", (56, 56), colour)))


def example(question: str, colour: str) -> dict[str, Any]:
    content = [{"type": "text", "text": question}, plain(colour)]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": COLOURS[colour]},
        ]
    }


def text_only(number: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"No image {number}."},
            {"role": "assistant", "content": "n"},
        ]
    }


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("qwen")
    save_vlm("qwen2_5_vl", folder)
    options = {"precision": "fp32", "kv_memory": "64MiB"}
    with tuning_server(folder, model=f"mini={folder}", **options) as (client, _):
        yield client


def ask(client: openai.OpenAI, model: str, content: Any) -> str | None:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=4,
    )
    return answer.choices[0].message.content


def test_it_learns_to_tell_two_images_apart(client: openai.OpenAI) -> None:
    """Rows with and without images in one file; the two images differ in nothing but their colour."""
    rows = [example("Which colour?", colour) for colour in COLOURS for _ in range(4)]
    rows += [text_only(number) for number in range(4)]
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=upload(client, rows),
        suffix="colours",
        seed=1,
        hyperparameters={"n_epochs": 8, "batch_size": 4, "learning_rate_multiplier": 100},
        extra_body={"x_evermini": {"rank": 8, "precision": "fp32"}},
    )
    job = wait_for_status(client, job.id, "succeeded", "failed")
    assert job.status == "succeeded", job.error
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    losses = [event.data["train_loss"] for event in events if event.type == "metrics"]
    print(f"loss from {losses[-1]:.3f} to {losses[0]:.3f}")
    assert losses[0] < losses[-1] / 10  # the newest come first
    assert any(event.message.startswith("Looking at the images") for event in events)
    (checked,) = (event for event in events if event.message.startswith("Files validated"))
    assert checked.data["num_images"] == 8
    assert job.trained_tokens == checked.data["num_tokens"] * 8
    for colour, letter in COLOURS.items():
        content = [{"type": "text", "text": "Which colour?"}, plain(colour)]
        assert ask(client, job.fine_tuned_model, content) == letter
        assert ask(client, MODEL, content) != letter
    assert ask(client, job.fine_tuned_model, "No image 1.") == "n"


def test_what_is_wrong_with_images_is_told_by_line_and_place(client: openai.OpenAI) -> None:
    rows: list[Any] = [example("Which?", "red") for _ in range(12)]
    rows[1]["messages"][0]["content"] = [image_part(b"no image")]
    rows[2]["messages"][0]["content"] = [
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    ]
    rows[3]["messages"][1]["content"] = [plain("red")]
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client, rows))
    job = wait_for_status(client, job.id, "failed", "succeeded")
    assert job.status == "failed"
    assert job.error is not None
    message = job.error.message
    assert "3 errors" in message
    assert "Line 2, messages[0].content[0].image_url.url: You uploaded an unsupported" in message
    assert "Line 3, messages[0].content[0].image_url.url: This server does not fetch" in message
    assert "Line 4, messages[1].content[0].type: Images are for messages" in message
