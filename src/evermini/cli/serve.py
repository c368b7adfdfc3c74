"""``evermini serve``: the OpenAI-compatible server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evermini.cli.options import with_settings
from evermini.config import LoadedSettings, Settings
from evermini.errors import ConfigError

if TYPE_CHECKING:
    import socket


@with_settings()
def serve(loaded: LoadedSettings) -> None:
    """Serve the OpenAI-compatible API until told to stop.

    Weights that are not on disk yet are fetched first. Ctrl-C or SIGTERM stops it gracefully: new requests are
    refused with 503, and the running ones get --drain-timeout seconds; a second Ctrl-C stops it at once.
    """
    import time
    from contextlib import ExitStack

    settings = loaded.settings
    from evermini import __version__
    from evermini.cli.logs import configure_logging
    from evermini.cli.pull import download_bar
    from evermini.cli.server import run_server
    from evermini.service import tracing
    from evermini.service.runtime import Runtime, load
    from evermini.storage.database import Database
    from evermini.storage.keys import KeyStore

    configure_logging(settings.log_level, settings.log_format, settings.api_keys)
    with Database.open(settings) as database, ExitStack() as stack:
        has_keys = bool(settings.api_keys) or KeyStore(database).any_valid(time.time())
        # Before the weights: a taken port is known at once.
        listener = stack.enter_context(_listen(settings, has_keys=has_keys))
        models = []
        for name in settings.models:
            print(f"Loading {name} ...", flush=True)
            with download_bar(name) as progress:
                models.append(load(name, settings, progress=progress))
            stack.callback(models[-1].close, timeout=0)
        if (stop_tracing := tracing.start(__version__)) is not None:
            stack.callback(stop_tracing)
        runtime = Runtime(models, answers_to_any_name=settings.conformance_fixtures)
        run_server(runtime, database, settings, listener)


def _listen(settings: Settings, *, has_keys: bool) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: The address cannot be used, or others could reach it and no key protects the server.
    """
    import ipaddress
    import socket

    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"host = {host!r} is no address of this machine: {error.strerror}. Give an address such as 127.0.0.1.",
            param="host",
        ) from error
    family, *_, address = min(found, key=lambda item: item[0] != socket.AF_INET)
    is_local = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
    if not is_local and not has_keys and not settings.allow_unauthenticated:
        raise ConfigError(
            f"Not listening on {host}: other machines can reach that address, and without an API key anyone there "
            "could use this server. Create a key (`evermini keys create NAME`), set EVERMINI_API_KEY, listen on "
            "127.0.0.1, or, on a network where everyone may, say --allow-unauthenticated.",
            param="host",
        )
    try:
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host} port {port}: {error.strerror}. Choose another port with --port (0 picks a free "
            "one), or stop the program that uses it.",
            param="port",
        ) from error
