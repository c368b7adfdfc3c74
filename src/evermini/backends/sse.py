"""Reading server-sent events: bytes as they come from the network -> the data of each event."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

DONE = "[DONE]"
"""What the last event of a stream of completions says."""


async def events(received: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """Yield the data of each event; comments and other fields are skipped.

    Lines end with a line feed, with or without a carriage return before it. Nothing else ends one: JSON may hold
    U+2028 and its like as they are.
    """
    rest, data = b"", list[str]()
    async for piece in received:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
            elif not line and data:
                yield "\n".join(data)
                data.clear()
    if rest.startswith(b"data:"):
        data.append(rest[5:].strip().decode("utf-8", "replace"))
    if data:  # some servers leave out the empty line at the end
        yield "\n".join(data)
