"""What schemathesis cannot know from a description: loaded by its command line, see `tests.process.test_openapi`."""

from typing import Any

import schemathesis

DEADLINE = "X-Request-Deadline-Ms"
SHORT_MS = 60_000


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """No deadline that passes: 504 would be right."""
    sent = str((case.headers or {}).get(DEADLINE, ""))
    if sent.isdecimal() and 0 < int(sent) < SHORT_MS:
        case.headers[DEADLINE] = str(SHORT_MS)
