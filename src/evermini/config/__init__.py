"""Settings: one declaration per setting gives its default, flag, help text, environment name, TOML key and docs.

Precedence, highest first:

    flag (--port 9000)  >  EVERMINI_PORT=9000  >  port = 9000 in a TOML file  >  default

One TOML file is read: ``--config``, else ``EVERMINI_CONFIG``, else ``./evermini.toml``, else ``config.toml`` in the
home folder. A key or ``EVERMINI_*`` variable that is not a setting is an error that names the closest one: a typo must
not leave a server running with a default nobody asked for. ``evermini config`` shows each value and its origin.

settings.py   declares them; values.py reads what is written as text
load.py       puts together where the values come from, and validates them

All of it is on the path of ``evermini --help``, so it imports neither pydantic (needed only to validate) nor torch.
"""

from evermini.config.load import OTHER_ENV, LoadedSettings, load_settings
from evermini.config.settings import (
    ADAPTER_MEMORY,
    Settings,
    default_home,
    env_name,
    flag_name,
    setting_fields,
    shown_default,
)
from evermini.config.values import parse_bytes

__all__ = [
    "ADAPTER_MEMORY",
    "OTHER_ENV",
    "LoadedSettings",
    "Settings",
    "default_home",
    "env_name",
    "flag_name",
    "load_settings",
    "parse_bytes",
    "setting_fields",
    "shown_default",
]
