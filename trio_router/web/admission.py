"""What is looked at before a request touches a model. Knows nothing of frameworks: values in, an error or facts out."""

import functools
import ipaddress
import itertools
import math
import re
import secrets
from collections.abc import Callable, Iterable
from typing import Final

import attrs
import msgspec

from trio_router.backend.conversation import Conversation
from trio_router.config.schema import ApiConfig, KeyConfig
from trio_router.config.tables import key_digest
from trio_router.errors import (
    HostNotAllowed,
    InvalidApiKey,
    InvalidDeadline,
    InvalidJSON,
    InvalidPriority,
    MissingModel,
    OriginNotAllowed,
    UnsupportedMediaType,
    shown,
)
from trio_router.fleet.ticket import Priority
from trio_router.web.form import FORM_PATHS
from trio_router.web.keys import Holder, key_holders

INFERENCE_PATHS: Final = frozenset(
    {
        "/v1/chat/completions", "/chat/completions",
        "/v1/chat/completions/input_tokens", "/chat/completions/input_tokens",
        "/v1/completions", "/completions", "/completion",
        "/v1/embeddings", "/embeddings", "/embedding",
        "/v1/responses", "/responses",
        "/v1/responses/input_tokens", "/responses/input_tokens",
        "/v1/messages", "/v1/messages/count_tokens",
        "/v1/rerank", "/rerank", "/v1/reranking", "/reranking",
        "/infill", "/tokenize", "/detokenize", "/apply-template",
        *FORM_PATHS,
    }
)  # fmt: skip
"""Everything llama-server b10068 computes for a POST (tools/server/server.cpp)."""

OPEN_PATHS: Final = frozenset({"/", "/ui", "/health", "/v1/health", "/livez", "/readyz"})
"""Answered without a key: a probe has none, nor has a browser before it has the page that asks for one."""
OPEN_PREFIX: Final = "/ui/"
UPSTREAM: Final = "/upstream/"
"""What follows is a model's own llama-server."""

LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
OWN_SITES: Final = frozenset({"same-origin", "none"})
"""What `Sec-Fetch-Site` says of our own pages, and of who typed an address."""
HOST = re.compile(r"(?:\[([0-9a-f.]*:[0-9a-f:.]*)\]|([^\s:@/\\?#\[\],]+?)\.?)(?::[0-9]*)?")
"""RFC 9110 section 7.2, for names as they are in use. No user before an `@`, nothing after the port."""
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
MILLISECONDS = re.compile(r"0{0,20}[1-9][0-9]{0,11}")
PRIORITIES: Final = {priority.label: priority for priority in Priority}


def request_id(sent: str | None) -> str:
    """The client's own id if it is one (up to 128 visible ASCII characters), else a new one."""
    return sent if sent is not None and REQUEST_ID.fullmatch(sent) else f"req_{_RUN}{next(_numbers):012x}"


_RUN: Final = secrets.token_hex(6)
_numbers: Final = itertools.count(secrets.randbits(40))


def priority(sent: str | None) -> Priority:
    """What `X-Request-Priority` says; normal if absent. Raises InvalidPriority."""
    if sent is None:
        return Priority.NORMAL
    try:
        return PRIORITIES[sent.strip().lower()]
    except KeyError:
        raise InvalidPriority(
            f"X-Request-Priority is {shown(sent)}; it may be high, normal or low", param="X-Request-Priority"
        ) from None


def deadline_seconds(sent: str | None) -> float:
    """What `X-Request-Deadline-Ms` says; infinite if absent. Raises InvalidDeadline."""
    if sent is None:
        return math.inf
    if not MILLISECONDS.fullmatch(sent.strip()):
        raise InvalidDeadline(
            f"X-Request-Deadline-Ms is {shown(sent)}; it may be a whole number of milliseconds, 1 or more",
            param="X-Request-Deadline-Ms",
        )
    return int(sent) / 1000


def check_encoding(sent: str | None) -> None:
    """Raise UnsupportedMediaType for a body that is compressed: llama-server does not read those either."""
    if sent is not None and sent.strip().lower() not in {"", "identity"}:
        raise UnsupportedMediaType(f"Content-Encoding is {shown(sent)}; bodies are read uncompressed only")


TOO_DEEP: Final = "the body is nested too deep: some 1,000 levels are read"


class Body(msgspec.Struct):
    """The fields of a body that concern us; the rest is checked to be JSON and skipped."""

    model: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    stream: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    keep_alive: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_NOTHING: Final = frozenset({b"false", b"null", b"0"})
_ONE: Final = frozenset({b"1", b"null"})


class Talk(Body):
    """The same of a request that may belong to a conversation, or be asked for in another way."""

    messages: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    input: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    prompt: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    input_prefix: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    prompt_cache_key: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    tools: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    functions: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    return_progress: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    n: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    n_cmpl: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    response_fields: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    return_tokens: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    continue_final_message: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    logprobs: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    top_logprobs: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    n_probs: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    verbose: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    timings_per_token: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET

    @property
    def wants_timings(self) -> bool:
        """Whether it asks for llama-server's `timings_per_token` itself."""
        return self.timings_per_token is not msgspec.UNSET and bytes(self.timings_per_token) not in _NOTHING

    @property
    def wants_progress(self) -> bool:
        """Whether it says something of llama-server's `return_progress` itself."""
        return self.return_progress is not msgspec.UNSET

    @property
    def is_odd(self) -> bool:
        """Whether `stream` is no truth value: llama-server is to say so."""
        return self.stream is not msgspec.UNSET and bytes(self.stream) not in {b"true", b"false", b"null"}

    @property
    def has_tools(self) -> bool:
        """Whether the model is told of tools that it may call."""
        return self.tools is not msgspec.UNSET or self.functions is not msgspec.UNSET

    @property
    def is_several(self) -> bool:
        """Whether it may ask for more answers than one."""
        return (self.n, self.n_cmpl) != (msgspec.UNSET, msgspec.UNSET) or (
            self.prompt is not msgspec.UNSET and bytes(memoryview(self.prompt)[:1]) != b'"'
        )

    @property
    def is_list(self) -> bool:
        """Whether it asks for more answers than one by their number."""
        return any(field is not msgspec.UNSET and bytes(field) not in _ONE for field in (self.n, self.n_cmpl))

    @property
    def is_cut_out(self) -> bool:
        """Whether it says of one of llama-server's own answers what is to stand in it."""
        return self.response_fields is not msgspec.UNSET or self.return_tokens is not msgspec.UNSET

    @property
    def is_told_otherwise(self) -> bool:
        """Whether an answer in one piece says what its stream does not.

        Log probabilities have the token that ends the answer, and not those of a stop word; what is gone on with is
        repeated; `__verbose` holds the text.
        """
        fields = (self.continue_final_message, self.logprobs, self.top_logprobs, self.n_probs, self.verbose)
        return any(field is not msgspec.UNSET and bytes(field) not in _NOTHING for field in fields)

    def conversation(self, session: bytes | None) -> Conversation | None:
        """Which one; None for several prompts at once, which need as many slots as there are."""
        said = next(
            (
                bytes(field)
                for field in (self.messages, self.input, self.input_prefix, self.prompt)
                if field is not msgspec.UNSET
            ),
            b"",
        )
        if said.startswith(b"[") and self.messages is self.input is msgspec.UNSET:
            return None
        if session is None and self.prompt_cache_key is not msgspec.UNSET:
            session = bytes(self.prompt_cache_key)
        return Conversation.of(said, session)


@attrs.define(kw_only=True)
class Wish:
    """What a body asks for. Not frozen: making one would take three times as long, and one is made for every request."""

    model: str
    stream: bool
    keep_alive: msgspec.Raw | None = None
    """As it is written, if it is there."""
    talk: Talk | None = None
    """Where that was asked for."""


def read_wish(body: bytes | bytearray, default: str | None = None, *, talk: bool = False) -> Wish:
    """Find what concerns us, with `talk` also what tells a conversation; `default` stands for a model that is not named.

    About 1 µs for a small body, 3 ms for 5 MB. Raises InvalidJSON, MissingModel.
    """
    try:
        if not body.isascii():
            body.decode()  # fields that are skipped are not looked into
        found = _TALK.decode(body) if talk else _BODY.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidJSON("the body is JSON, but not an object") from error
    except RecursionError as error:
        raise InvalidJSON(TOO_DEEP) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidJSON(f"the body is not JSON: {error}") from error
    try:
        model = _model(found)
    except MissingModel:
        if default is None:
            raise
        model = default
    stream = found.stream is not msgspec.UNSET and bytes(found.stream) == b"true"
    kept = None if found.keep_alive is msgspec.UNSET else found.keep_alive
    return Wish(model=model, stream=stream, keep_alive=kept, talk=found if isinstance(found, Talk) else None)


def _model(found: Body) -> str:
    if found.model is msgspec.UNSET:
        raise MissingModel("the body has no field `model`", param="model")
    try:
        return _MODEL.decode(found.model)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MissingModel(
            f"`model` is {shown(bytes(found.model)[:200].decode('utf-8', 'replace'))}; it must be a string",
            param="model",
        ) from error


def check_json(body: bytes | bytearray) -> None:
    """Raise InvalidJSON: llama-server answers 500 then, which clients take for its fault and repeat."""
    try:
        read_wish(body)
    except MissingModel:
        return


_BODY: Final = msgspec.json.Decoder(Body)
_TALK: Final = msgspec.json.Decoder(Talk)
_MODEL: Final = msgspec.json.Decoder(str)


@attrs.define
class Admission:
    """Who may ask: host, origin, key."""

    _api: ApiConfig
    _keys: Iterable[KeyConfig] = ()
    renewals: int = attrs.field(init=False, default=0)
    """How often the rules have been set: what was admitted by other ones is looked at again."""
    _holders: dict[bytes, Holder] = attrs.field(init=False, factory=dict, repr=False)
    _hosts: frozenset[str] = attrs.field(init=False)
    _wildcard: bool = attrs.field(init=False)
    """Whether we listen on every address, so that any of them is a good name for us."""

    def __attrs_post_init__(self) -> None:
        self.renew(self._api, self._keys)

    def renew(self, api: ApiConfig, keys: Iterable[KeyConfig]) -> None:
        """Go by these from now on; what runs is not concerned."""
        self._api, self._keys = api, keys
        self.renewals += 1
        self._holders = key_holders(api, keys, self._holders)
        self._wildcard = api.host in {"0.0.0.0", "::", ""}  # noqa: S104  (compared, not bound)
        listed = api.allowed_hosts
        self._hosts = (
            LOOPBACK_NAMES | {api.host.lower()} if listed is None else frozenset(name.lower() for name in listed)
        )

    @property
    def needs_key(self) -> bool:
        """Whether a key is configured."""
        return bool(self._holders)

    @property
    def knows_origins(self) -> bool:
        """Whether any origin is configured."""
        return bool(self._api.cors_origins)

    def check_host(self, host: str | None) -> None:
        """Raise HostNotAllowed unless `Host` names us: DNS rebinding makes a foreign page's name resolve to us.

        HTTP/1.0 clients send none; no browser is among them.
        """
        if host is None or "*" in self._hosts:
            return
        name = _host_name(host)
        if name in self._hosts or (self._wildcard and self._api.allowed_hosts is None and _is_address(name)):
            return
        raise HostNotAllowed(f"Host is {shown(host)}; api.allowed_hosts has {', '.join(sorted(self._hosts))}")

    def check_origin(self, method: str, host: str | None, origin: str | None) -> None:
        """Raise OriginNotAllowed when a page of a foreign origin asks for more than to read."""
        if origin is None or method in SAFE_METHODS or self.origin_allowed(origin) or _same_origin(origin, host):
            return
        raise OriginNotAllowed(f"Origin is {shown(origin)}; api.cors_origins lists those that may call")

    def check_page(self, host: str | None, header: Callable[[str], str | None]) -> None:
        """Raise OriginNotAllowed when a page of a foreign origin has something read that is more than to read.

        A browser names no `Origin` with an image or a link. What tells of the page then is `Sec-Fetch-Site`, which goes to
        whom it trusts (by HTTPS, and on loopback; https://www.w3.org/TR/fetch-metadata/), else mostly a `Referer`. A link
        that somebody followed may: it is they who ask.
        """
        origin, site, referer = header("Origin"), header("Sec-Fetch-Site"), header("Referer")
        if origin is None and site is not None:
            followed = header("Sec-Fetch-User") == "?1" and header("Sec-Fetch-Dest") == "document"
            if site in OWN_SITES or followed:
                return
            raise OriginNotAllowed(
                f"a page of another origin asks (Sec-Fetch-Site is {shown(site)}), and not for itself"
            )
        self.check_origin("POST", host, _origin(referer) if origin is None else origin)

    def origin_allowed(self, origin: str) -> bool:
        """Whether a browser may show our answers to pages of `origin`."""
        return origin in self._api.cors_origins

    def check_key(self, path: str, authorization: str | None, x_api_key: str | None) -> Holder | None:
        """Whose key the request brings; None when it needs none. Raises InvalidApiKey."""
        if not self._holders or path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return None
        for sent in (_bearer(authorization), x_api_key):
            # by its digest, so the time a look-up takes tells nothing of a key
            if sent is not None and (holder := self._holders.get(key_digest(sent.strip()))) is not None:
                return holder
        what = "no API key" if authorization is None and x_api_key is None else "a wrong API key"
        raise InvalidApiKey(f"{what} was sent; send it as `Authorization: Bearer KEY` or `X-Api-Key: KEY`")


_INFERENCE_ENDS: Final = tuple(INFERENCE_PATHS)


PLAN_PATH: Final = "/v1/router/plan"
CONTROL_PATH: Final = "/v1/chat/completions/control"
"""A word to llama-server about an answer under way, by its id; computes nothing, so it waits for no slot."""


def changes_state(method: str, path: str) -> bool:
    """Whether a request is an operator's: it does more than to read, or to ask a model."""
    if method in SAFE_METHODS or path.rstrip("/") in INFERENCE_PATHS or path in {PLAN_PATH, CONTROL_PATH}:
        return False
    return not (path.startswith(UPSTREAM) and path.endswith(_INFERENCE_ENDS))


def _bearer(authorization: str | None) -> str | None:
    scheme, _, key = (authorization or "").partition(" ")
    return key if scheme.lower() == "bearer" else None


@functools.lru_cache(maxsize=256)
def _host_name(host: str) -> str:
    """`Host` without its port and brackets, lower case; empty for what is no host."""
    match = HOST.fullmatch(host.strip().lower())
    return "" if match is None else match[1] or match[2]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _origin(referer: str | None) -> str | None:
    """Of the page at that address."""
    scheme, mark, rest = (referer or "").partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if mark else None


def _same_origin(origin: str, host: str | None) -> bool:
    scheme, _, rest = origin.partition("://")
    return host is not None and scheme in {"http", "https"} and rest.lower() == host.strip().lower()
