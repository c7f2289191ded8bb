"""Which names a model may have. An alias becomes a part of URL paths: `/v1/models/{alias}/status`."""

import re

RESERVED = frozenset({"status", "failed", "eject", "load", "reset"})
"""What stands in an alias's place in paths of the router's own."""
OWN_ENDINGS = ("/status", "/reset", "/load", "/logs", "/footprint")
"""What may follow an alias in a path, so that no alias may end in it."""
LONGEST = 200

_SHAPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*")


def alias_problem(alias: str) -> str | None:
    """Why `alias` cannot be one, or None when it can."""
    segments = alias.split("/")
    rules = (
        (len(alias) > LONGEST, f"an alias has at most {LONGEST} characters, this one {len(alias)}"),
        (
            not _SHAPE.fullmatch(alias),
            "an alias starts with an ASCII letter or digit; then letters, digits and . _ : / - may follow",
        ),
        (
            alias in RESERVED or alias.startswith("status/"),
            f"reserved: paths under /v1/models/ use {', '.join(sorted(RESERVED))} themselves",
        ),
        (
            alias.endswith(OWN_ENDINGS),
            f"an alias does not end in {', '.join(OWN_ENDINGS)}: paths under /v1/models/ would be ambiguous",
        ),
        (
            "" in segments,
            "an alias holds no '//' and does not end in '/': paths under /v1/models/ would be ambiguous",
        ),
        (
            not {".", ".."}.isdisjoint(segments),
            "no part of an alias between slashes is '.' or '..': HTTP clients shorten such paths",
        ),
    )
    return next((reason for broken, reason in rules if broken), None)
