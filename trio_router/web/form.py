"""What concerns us of a form (`multipart/form-data`, RFC 7578), in which audio is sent: which model it asks for.

llama-server reads the form itself; here its parts are passed over, each by one search for its end, and nothing of a file is
copied (5 MB take about 1 ms). What is taken is what all clients send: no preamble, lines that end as RFC 2046 has it.
"""

from typing import Final

from werkzeug.http import parse_options_header

from trio_router.errors import InvalidForm, MissingModel

FORM_PATHS: Final = frozenset({"/v1/audio/transcriptions", "/audio/transcriptions"})
MAX_PARTS: Final = 100
MAX_PART_HEAD_BYTES: Final = 8 * 1024
MAX_DISPOSITION_BYTES: Final = 256
"""Of what says that a part is the field `model`. What is longer is a file with a long name; to parse it takes long."""
MAX_NAME_BYTES: Final = 1024
"""Of a model; no alias has more."""
MAX_BOUNDARY: Final = 70
"""RFC 2046 section 5.1.1."""
LINE: Final = b"\r\n"
END: Final = b"\r\n\r\n"


def boundary_of(content_type: str | None) -> bytes | None:
    """What the parts of a form stand between, as its `Content-Type` says; None: that is no form. Raises InvalidForm."""
    kind, options = parse_options_header(content_type)
    if kind.lower() != "multipart/form-data":
        return None
    boundary = options.get("boundary", "")
    if not 0 < len(boundary) <= MAX_BOUNDARY or not boundary.isascii():
        raise InvalidForm(f"Content-Type is multipart/form-data without a boundary of 1 to {MAX_BOUNDARY} characters")
    return boundary.encode("ascii")


def model_of(form: bytes | bytearray, boundary: bytes, default: str | None = None) -> str:
    """The field `model` of a whole form; `default` stands for one that is not there. Raises InvalidForm, MissingModel."""
    mark = b"--" + boundary
    if not form.startswith(mark):
        raise InvalidForm("the form does not begin with its boundary")
    found = default
    at = len(mark)
    for _ in range(MAX_PARTS + 1):
        if form.startswith(b"--", at):
            if found is None:
                raise MissingModel("the form has no field `model`", param="model")
            return found
        if not form.startswith(LINE, at):
            raise InvalidForm("a boundary in the form is not followed by the end of its line")
        head_end = form.find(END, at, at + MAX_PART_HEAD_BYTES)
        if head_end < 0:
            raise InvalidForm(f"a part of the form has no end of its headers within {MAX_PART_HEAD_BYTES} bytes")
        begin = head_end + len(END)
        end = form.find(LINE + mark, begin)
        if end < 0:
            raise InvalidForm("the form ends in the middle of a part")
        if _field(form[at:head_end]) == "model":
            found = form[begin : min(end, begin + MAX_NAME_BYTES + 1)].decode("utf-8", "replace")
        at = end + len(LINE) + len(mark)
    raise InvalidForm(f"the form has more than {MAX_PARTS} parts")


def _field(head: bytes | bytearray) -> str | None:
    """Which one a part is; None for a file."""
    for line in head.split(LINE):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-disposition" and len(value) <= MAX_DISPOSITION_BYTES:
            _, options = parse_options_header(value.decode("utf-8", "replace"))
            return None if "filename" in options else options.get("name")
    return None
