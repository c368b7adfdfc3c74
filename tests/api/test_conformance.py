"""The world of OpenAI's own client tests, which `scripts/conformance` runs in full."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from evermini.config import Settings
from evermini.service.runtime import Runtime, ServedModel
from tests.serving import make_client, serving

RESPONSE = "resp_677efb5139a88190b512bc3fef8e535d"


@pytest.fixture(scope="module")
def mock(nano: ServedModel) -> Iterator[openai.OpenAI]:
    runtime = Runtime([nano], answers_to_any_name=True)
    with serving(runtime, Settings(conformance_fixtures=True)) as url:
        yield make_client(url)


def test_any_model_and_no_input(mock: openai.OpenAI) -> None:
    assert mock.responses.create().status in ("completed", "incomplete")
    assert mock.models.retrieve("gpt-6-astra").id == "gpt-6-astra"
    assert mock.responses.input_tokens.count().input_tokens > 0


def test_the_tests_ids_exist_and_exist_again(mock: openai.OpenAI) -> None:
    for _ in range(2):
        assert mock.responses.retrieve(RESPONSE).output_text == "string"
        kinds = [event.type for event in mock.responses.retrieve(RESPONSE, stream=True)]
        assert kinds[-1] == "response.completed"
        mock.responses.delete(RESPONSE)
        assert mock.chat.completions.retrieve("completion_id").choices
        mock.chat.completions.delete("completion_id")
        item = mock.conversations.items.retrieve("msg_abc", conversation_id="conv_123")
        assert item.id == "msg_abc"
        mock.conversations.delete("conv_123")


def test_files_uploads_and_batches_exist_in_any_order(mock: openai.OpenAI) -> None:
    for _ in range(2):
        assert mock.files.content("file_id").read() == b"Example data"
        mock.files.delete("file_id")
        mock.uploads.parts.create("upload_abc123", data=b"Example data")
        assert mock.uploads.complete("upload_abc123", part_ids=["string"]).status == "completed"
        assert mock.uploads.cancel("upload_abc123").status == "cancelled"
        assert mock.batches.cancel("batch_id").status == "cancelled"
    announced = mock.uploads.create(
        bytes=0, filename="a.txt", mime_type="text/plain", purpose="assistants"
    )
    assert announced.bytes == 1


def test_pages_of_no_length(mock: openai.OpenAI) -> None:
    assert mock.chat.completions.list(limit=0, after="after").data is not None
    assert mock.conversations.items.list("conv_123", limit=0, after="after").data is not None
    assert mock.responses.input_items.list("response_id", limit=0, after="after").data is not None


def test_what_is_not_supported_is_refused_as_ever(mock: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="web_search"):
        mock.responses.create(tools=[{"type": "web_search"}])


def test_fine_tuning_jobs_exist_whatever_was_done_to_them(mock: openai.OpenAI) -> None:
    job_id = "ft-AF1WoRqd3aJAHsqc9NY7iL8F"
    for _ in range(2):
        assert mock.fine_tuning.jobs.pause(job_id).status == "queued"
        assert mock.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    assert mock.fine_tuning.jobs.list_events(job_id, after="after").data == []
    assert mock.fine_tuning.jobs.checkpoints.list(job_id, after="after", limit=0).data == []
    created = mock.fine_tuning.jobs.create(model="gpt-4o-mini", training_file="file-abc123")
    assert created.status == "validating_files"
