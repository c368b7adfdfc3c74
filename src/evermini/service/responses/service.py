"""What the routes of the Responses API call."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from evermini.errors import InvalidRequestError
from evermini.service.caller import current_caller
from evermini.service.directory import Directory
from evermini.service.documents import Documents
from evermini.service.image_tokens import count_images
from evermini.service.jobs import JobRunner
from evermini.service.metrics import Metrics
from evermini.service.prompting import count_tokens
from evermini.service.reading import OnProgress
from evermini.service.responses.background import Background
from evermini.service.responses.context import Contexts, no_response
from evermini.service.responses.items import Json
from evermini.service.responses.run import (
    ResponseRun,
    as_chat,
    new_body,
    new_writer,
    start_chat,
)
from evermini.service.responses.schemas import ContextRequest, ResponseRequest, located
from evermini.service.seen import Seen
from evermini.storage.conversations import ConversationStore
from evermini.storage.database import Database
from evermini.storage.responses import Addition, ResponseStore, StoredResponse


class Responses:
    """The responses of one server.

    Args:
        directory: The models.
        metrics: Where latencies are reported.
        database: Where responses are kept.
        documents: Reads images and files.
        jobs: What works on those that nobody waits for.
    """

    def __init__(
        self,
        directory: Directory,
        metrics: Metrics,
        database: Database,
        documents: Documents,
        jobs: JobRunner,
    ) -> None:
        self._directory = directory
        self._metrics = metrics
        self._documents = documents
        self._database = database
        self._seen = Seen(database, ResponseStore, no_response)
        self.contexts = Contexts(database)
        self.background = Background(directory, metrics, database, self.contexts, documents, jobs)

    async def start(
        self, request: ResponseRequest, arrived: float, *, progress: OnProgress | None = None
    ) -> ResponseRun:
        """Begin a response that its client waits for.

        Args:
            request: What is wanted.
            arrived: ``time.perf_counter()`` when it came in.
            progress: Told, from any thread, how reading a long text goes.

        Raises:
            RequestError: The request cannot be served.
            EngineStoppedError: The engine is stopped.
        """
        project = current_caller.get().project
        served = await self._directory.resolve(request.model)
        items = await self.contexts.items(request)
        context = [*await self.contexts.history(request), *items]
        body = new_body(request, served.info.id, "in_progress")
        running = await start_chat(
            served,
            request,
            context,
            body,
            documents=self._documents,
            metrics=self._metrics,
            arrived=arrived,
            progress=progress,
        )

        async def save(body: Json, last: Json, error: Exception | None) -> None:
            addition = None
            if request.conversation is not None and error is None:
                addition = Addition(request.conversation.id, [*items, *body["output"]])
            if request.is_stored:
                given = request.model_dump(by_alias=True, exclude_unset=True)
                stored = StoredResponse(dict(body), items, given, project=project)
                store = ResponseStore(self._database)
                await self._database.run(store.add, stored, addition=addition)
            elif addition is not None:
                conversations = ConversationStore(self._database)
                await self._database.run(
                    conversations.append, addition.conversation_id, addition.items
                )

        return ResponseRun(new_writer(body, request), running, save)

    async def submit(self, request: ResponseRequest) -> Json:
        """Begin a background response and return its object; both survive this process.

        Raises:
            RequestError: The request cannot be served.
        """
        served = await self._directory.resolve(request.model)
        items = await self.contexts.items(request)
        # What is wrong with the request is said now, not in a response that has failed.
        await as_chat(request, [*await self.contexts.history(request), *items])
        body = new_body(request, served.info.id, "queued")
        queued = dict(body)
        await self.background.submit(request, items, body)
        return queued

    async def count_tokens(self, request: ContextRequest) -> int:
        """Return how many tokens the model would be sent.

        Raises:
            RequestError: The request cannot be served.
        """
        served = await self._directory.resolve(request.model)
        items = await self.contexts.items(request)
        context = [*await self.contexts.history(request), *items]
        wanted = await as_chat(request, context)
        try:
            wanted = await self._documents.read(wanted, served.eyes)
        except InvalidRequestError as error:
            raise located(error, request, context) from None
        images = await count_images(wanted, served.info.id, served.count_tokens)
        return await count_tokens(served, wanted) - images.read + images.counted

    async def get(self, response_id: str) -> StoredResponse:
        """Return a stored response.

        Raises:
            NotFoundError: There is none of that id.
        """
        return await self._seen.find(response_id, ResponseStore.get)

    async def follow(self, response_id: str, after: int) -> AsyncGenerator[Json, None]:
        """Return the events of a background stream that come after a sequence number.

        Raises:
            NotFoundError: There is no response of that id.
            InvalidRequestError: It was not made as a background stream.
        """
        stored = await self.get(response_id)
        for field in ("background", "stream"):
            if not stored.request.get(field):
                raise InvalidRequestError(
                    f"This response cannot be streamed because it was not created with {field}=true.",
                    param="stream",
                )
        return self.background.follow(response_id, after)

    async def delete(self, response_id: str) -> None:
        """Delete a response; one that is unfinished ends.

        Raises:
            NotFoundError: There is none of that id.
        """
        await self.get(response_id)
        if not await self.background.delete(response_id):
            raise no_response(response_id)

    async def cancel(self, response_id: str) -> Json:
        """End a background response and return its object; one that is finished stays as it is.

        Raises:
            NotFoundError: There is none of that id.
            InvalidRequestError: It is no background response.
        """
        stored = await self.get(response_id)
        if not stored.body["background"]:
            raise InvalidRequestError(
                "Cannot cancel a synchronous response. Close the connection to end one.",
                param="response_id",
            )
        cancelled = await self.background.cancel(response_id)
        if cancelled is None:
            raise no_response(response_id)
        return cancelled.body
