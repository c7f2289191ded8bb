"""What the values of a query say."""

from trio_router.errors import InvalidRequest, shown


def truth(value: str | None, *, default: bool) -> bool:
    """Yes or no; what is no word for no is yes."""
    return default if value is None else value.strip().lower() not in {"0", "false", "no", "off"}


def count(name: str, value: str | None, *, default: int, at_most: int) -> int:
    """How many are asked for; more than there can be is all of them. Raises InvalidRequest."""
    if value is None:
        return default
    if not (value.isascii() and value.isdigit() and len(value) <= 9):
        raise InvalidRequest(f"`{name}` is {shown(value)}; it must be a whole number from 0", param=name)
    return min(int(value), at_most)
