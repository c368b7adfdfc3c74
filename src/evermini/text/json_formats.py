"""The formats of JSON Schema as patterns.

Each accepts only what the RFCs accept, and nothing that common libraries stumble over: years from 0001, no leap
seconds, no 29 February where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping

ENFORCED_FORMATS = frozenset({"duration", "email", "ipv4", "ipv6", "uuid"})
"""Those whose patterns llguidance has itself."""

REFUSED_FORMATS = frozenset({"regex", "uri-template", "idn-email"})
"""Those of JSON Schema that cannot be enforced; formats outside its list are annotations."""

_HIGH = "(?:[2468][048]|[13579][26]|0[48])"
_LEAP_YEAR = f"(?:[0-9]{{2}}{_HIGH}|{_HIGH}00)"
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_PCHAR = r"(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})"
_TAIL = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_AUTHORITY = r"(?:[a-zA-Z0-9._~!$&'()*+,;=-]|%[0-9a-fA-F]{2})*(?::[0-9]*)?"
_URI = rf"[a-zA-Z][a-zA-Z0-9+.-]*:(?://{_AUTHORITY}(?:/{_PCHAR}*)*|/?(?:{_PCHAR}+(?:/{_PCHAR}*)*)?){_TAIL}"
_RELATIVE = rf"(?:/{_PCHAR}*)*|[a-zA-Z0-9._~!$&'()*+,;=@-]+(?:/{_PCHAR}*)*"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"


def _whole(pattern: str) -> str:
    return f"^(?:{pattern})$"


FORMAT_PATTERNS: Mapping[str, str] = {
    "date": _whole(_DATE),
    "date-time": _whole(f"{_DATE}T{_TIME}"),
    "time": _whole(_TIME),
    "hostname": _whole(rf"{_LABEL}(?:\.{_LABEL}){{0,3}}"),
    "idn-hostname": _whole(rf"{_LABEL}(?:\.{_LABEL}){{0,3}}"),
    "uri": _whole(_URI),
    "iri": _whole(_URI),
    "uri-reference": _whole(f"(?:{_URI}|(?:{_RELATIVE}){_TAIL})"),
    "iri-reference": _whole(f"(?:{_URI}|(?:{_RELATIVE}){_TAIL})"),
    "json-pointer": _whole(_POINTER),
    "relative-json-pointer": _whole(f"(?:0|[1-9][0-9]*)(?:#|{_POINTER})"),
}
"""For those that llguidance has no pattern for, or one that is wider than the format."""
