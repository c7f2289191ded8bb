"""A llama-server that can misbehave on demand. Run it, do not import it; standard library only, ready in ~50 ms.

It takes llama-server's command line (`--host`, `--port`, `-m`, `--alias`, `-np`; what it does not know is ignored)
and answers as llama-server b10434 was seen to answer: same paths, same headers, same shapes, same errors.
Its faults are flags, so that router.toml's `flags` can ask for them; most can also be asked for by one request, in
its body: `{"model": ..., "fake": {"tokens": 5, "token_seconds": 0.1}}`. Answers depend on nothing but the request's
bytes and the flags, so that two ways to the same answer can be compared byte for byte.

Faults of the process
  --fake-load-seconds S      503 `Loading model` for so long
  --fake-load-until FILE     the same, until FILE exists
  --fake-exit-at-start CODE  say why on standard error and exit
  --fake-exit-at-start-while FILE   the same with 1, while FILE exists
  --fake-words TEXT          the words that --fake-exit-at-start says
  --fake-oom                 die at the start as llama.cpp does when the device's memory is short
  --fake-oom-above N         the same with a context (`-c`) of more than N
  --fake-fail-first N, --fake-state FILE   die at the start the first N times; FILE counts
  --fake-never-ready         503 for ever
  --fake-exit-after-ready S  exit 1, S seconds after being ready
  --fake-ignore-sigterm      so
  --fake-fork-child          a child in the same group, which ignores SIGTERM and holds the log pipe open
  --fake-flood-log BYTES     write so much log while loading
  --fake-health-hang-after-ready   /health is accepted and not answered, once it answered 200
  --fake-record FILE         append one JSON line for each event; see `Recorder`

Faults of an answer, as flags (`--fake-stall`) or in a body's `fake` (`"stall": true`)
  tokens N, token_seconds S  how many, and the pause before each
  headers_seconds S          pause before the head of the answer
  hold_until FILE            keep the slot, and send nothing, until FILE exists
  stall                      hold the slot, make no token, send nothing (a stream: nothing after its head)
  status CODE                answer this status with llama-server's error object
  500                        the flag --fake-500: status 500, `Compute error.`
  die_slowly S               what `die` ends, first closes its sockets, as one with much memory to give back does
  die WHEN                   os._exit: `before_headers`, `after_headers`, `after_first_chunk`
  die_after_chunks N         os._exit after N chunks of a stream
  close_mid_chunk            end the connection inside the second chunk of a stream, or inside a body
  wrong_length               announce more bytes than come, then close
  answer_101                 101 Switching Protocols
  garbage                    something that is not HTTP
  chunk_bytes N              make each token so long
  silent_after N             no more tokens after N, and no end
  close_idle S               how long an idle connection is kept (5)
  echo                       answer with what was received: method, path, headers, sha256
  cached N                   of the 7 tokens of a prompt, so many are said to be cached
  tag TEXT                   goes into the record
"""

# pathlib would add a third to the start-up time
# ruff: noqa: PTH110, PTH119, PTH123

import contextlib
import hashlib
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time

CREATED = 1_700_000_000
FLAGS_WITHOUT_VALUE = {
    "--fake-never-ready",
    "--fake-ignore-sigterm",
    "--fake-fork-child",
    "--fake-oom",
    "--fake-health-hang-after-ready",
    "--fake-stall",
    "--fake-500",
    "--fake-close-mid-chunk",
    "--fake-wrong-length",
    "--fake-answer-101",
    "--fake-garbage",
    "--fake-echo",
}
REASONS = {
    101: "Switching Protocols",
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    413: "Payload Too Large",
    422: "Unprocessable Entity",
    429: "Too Many Requests",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}
ERROR_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
CONTROL = "/v1/chat/completions/control"
COMMANDS = re.compile(r"/props|/lora-adapters|/slots/[0-9]+|" + CONTROL)
ROUTES = {
    "/v1/chat/completions": "chat",
    "/chat/completions": "chat",
    "/v1/completions": "text",
    "/completions": "text",
    "/completion": "completion",
    "/infill": "completion",
    "/v1/embeddings": "embeddings",
    "/embeddings": "embeddings",
    "/embedding": "embeddings",
    "/v1/responses": "responses",
    "/responses": "responses",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "count_tokens",
    "/v1/rerank": "rerank",
    "/v1/reranking": "rerank",
    "/rerank": "rerank",
    "/reranking": "rerank",
    "/tokenize": "tokenize",
    "/detokenize": "detokenize",
    "/apply-template": "apply_template",
    "/v1/audio/transcriptions": "transcription",
    "/audio/transcriptions": "transcription",
}


ADDED = re.compile(
    rb'(?:(?:,"timings_per_token":true)?,"stream":true,"stream_options":{"include_usage":true})?,"return_progress":true}$'
)
"""What the router adds to a body; an answer's id is the same with it and without, where the real one's are random."""


class ClientGone(Exception):
    """Raised when the client closed its end while an answer was being made."""


class Options:
    """The command line. `fault(name)` is a fake flag's text, True for one without a value, else None."""

    def __init__(self, arguments):
        self.host, self.port, self.model, self.alias, self.slots = "127.0.0.1", 8080, "", "", 1
        self.embedding = False
        self.context = 0
        self.faults = {}
        position = 0
        while position < len(arguments):
            name = arguments[position]
            value = arguments[position + 1] if position + 1 < len(arguments) else ""
            position += 1
            if name in FLAGS_WITHOUT_VALUE:
                self.faults[name] = True
                continue
            if name.startswith("--fake-"):
                self.faults[name] = value
            elif name == "--host":
                self.host = value
            elif name == "--port":
                self.port = int(value)
            elif name in {"-m", "--model"}:
                self.model = value
            elif name in {"-a", "--alias"}:
                self.alias = value
            elif name in {"-c", "--ctx-size"}:
                self.context = int(value)
            elif name in {"-np", "--parallel"}:
                self.slots = int(value)
            elif name in {"--embedding", "--embeddings"}:
                self.embedding = True
                continue
            else:
                continue
            position += 1

    def fault(self, name):
        return self.faults.get(name)


class Recorder:
    """Appends JSON lines, each in one write: `event`, `time` (CLOCK_MONOTONIC), `pid`, `alias`, and more.

    spawned, ready, sigterm; and of an inference request, each with its `tag` and `number`: received (method, path,
    headers, sha256, length), started (has a slot), finished, cancelled (the client went away).
    """

    def __init__(self, path, alias):
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if path else None
        self.alias = alias

    def add(self, event, **facts):
        if self.fd is not None:
            line = {"event": event, "time": time.monotonic(), "pid": os.getpid(), "alias": self.alias, **facts}
            os.write(self.fd, json.dumps(line).encode() + b"\n")


class Slots:
    """First come, first served; who waits notices that its client went away."""

    def __init__(self, count):
        self.changed = threading.Condition()
        self.free = list(range(count))
        self.count = count
        self.waiting = []

    def take(self, client):
        ticket = object()
        with self.changed:
            self.waiting.append(ticket)
            try:
                while not self.free or self.waiting[0] is not ticket:
                    self.changed.wait(0.02)
                    client.check()
                return self.free.pop(0)
            finally:
                self.waiting.remove(ticket)
                self.changed.notify_all()

    def give(self, slot):
        with self.changed:
            self.free.append(slot)
            self.free.sort()
            self.changed.notify_all()


class Client:
    """One connection."""

    def __init__(self, sock):
        self.sock = sock
        self.buffer = b""

    def check(self):
        """Raise ClientGone when the other end is closed; a half-close counts, as with llama-server."""
        readable, _, _ = select.select([self.sock], [], [], 0)
        if readable and not self.peek():
            raise ClientGone

    def peek(self):
        try:
            return self.sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return b""

    def wait(self, seconds):
        """Sleep, but notice a close at once."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            readable, _, _ = select.select([self.sock], [], [], left)
            if readable:
                if not self.peek():
                    raise ClientGone
                time.sleep(max(0, min(0.01, end - time.monotonic())))

    def send(self, data):
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise ClientGone from error

    def fill(self):
        data = self.sock.recv(65536)
        if not data:
            raise ClientGone
        self.buffer += data

    def read_until(self, mark):
        while mark not in self.buffer:
            self.fill()
        head, _, self.buffer = self.buffer.partition(mark)
        return head

    def read_exactly(self, count):
        data = bytearray(self.buffer)
        while len(data) < count:
            piece = self.sock.recv(1 << 20)
            if not piece:
                raise ClientGone
            data += piece
        self.buffer = bytes(data[count:])
        return bytes(data[:count])


class Request:
    """One request, its body read whole."""

    def __init__(self, client):
        head = client.read_until(b"\r\n\r\n").decode("latin-1")
        line, *lines = head.split("\r\n")
        self.method, self.target, _ = line.split(" ", 2)
        self.path = self.target.partition("?")[0]
        self.headers = [tuple(part.strip() for part in text.split(":", 1)) for text in lines]
        self.by_name = {name.lower(): value for name, value in self.headers}
        if self.by_name.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(client.read_until(b"\r\n").split(b";")[0], 16):
                parts.append(client.read_exactly(size))
                client.read_exactly(2)
            client.read_until(b"\r\n")
            self.body = b"".join(parts)
        else:
            self.body = client.read_exactly(int(self.by_name.get("content-length", "0")))
        self.sha256 = hashlib.sha256(self.body).hexdigest()

    @property
    def is_form(self):
        return self.by_name.get("content-type", "").startswith("multipart/form-data")

    def form(self):
        """A form's fields, files as bytes; llama-server takes them for a JSON object."""
        from email.parser import BytesParser

        head = f"Content-Type: {self.by_name['content-type']}\r\n\r\n".encode("latin-1")
        fields = {}
        for part in BytesParser().parsebytes(head + self.body).walk():
            name = part.get_param("name", header="content-disposition")
            if name is not None:
                data = part.get_payload(decode=True)
                fields[name] = data.decode() if part.get_filename() is None else data
        fields["stream"] = fields.get("stream") == "true"
        return fields


def dumps(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def event(value, name=None):
    prefix = b"event: " + name.encode() + b"\n" if name else b""
    return prefix + b"data: " + dumps(value) + b"\n\n"


def end_this_thread(*_):
    """The first one's: the process has begun to end then, but is still there."""
    import ctypes
    import platform

    ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)


class Server:
    """All of it; a thread for each connection."""

    def __init__(self, options):
        self.options = options
        self.alias = options.alias or os.path.basename(options.model)
        self.slots = Slots(options.slots)
        self.recorder = Recorder(options.fault("--fake-record"), self.alias)
        self.key = os.environ.get("LLAMA_API_KEY", "")
        self.ready = False
        self.told_ready = False
        self.counter = 0
        self.under_way = set()
        self.sockets = []
        self.tokens = 0

    # --- the process ---------------------------------------------------------------------------------

    def say(self, text):
        os.write(2, f"0.00.{time.monotonic_ns() // 1000 % 1_000_000:06d} {text}\n".encode())

    def run(self):
        options = self.options
        if options.fault("--fake-ignore-sigterm"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.recorder.add("spawned", argv=sys.argv[1:])
        self.die_at_start()
        if options.fault("--fake-fork-child") and os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                signal.pause()
        listener = self.listen()
        threading.Thread(target=self.accept, args=(listener,), daemon=True).start()
        self.load()
        if not options.fault("--fake-ignore-sigterm"):
            signal.signal(signal.SIGTERM, self.on_sigterm)
        signal.signal(signal.SIGUSR1, end_this_thread)
        self.ready = True
        self.say("I srv    load_model: model loaded")
        self.recorder.add("ready")
        if "LLAMA_SERVER_ROUTER_PORT" in os.environ:
            threading.Thread(target=self.watch_router, daemon=True).start()
        seconds = options.fault("--fake-exit-after-ready")
        if seconds is not None:
            time.sleep(float(seconds))
            self.say("E ggml_abort: the fake server was told to exit")
            os._exit(1)
        while True:
            signal.pause()

    def die_at_start(self):
        options = self.options
        fail_first, state = options.fault("--fake-fail-first"), options.fault("--fake-state")
        if fail_first is not None:
            with open(state, "a+", encoding="ascii") as file:
                file.write("x")
                file.flush()
                file.seek(0)
                count = len(file.read())
            if count <= int(fail_first):
                self.say(f"E srv  llama_server: start {count} fails on purpose")
                os._exit(1)
        bound = options.fault("--fake-oom-above")
        if options.fault("--fake-oom") or (bound is not None and options.context > int(bound)):
            self.say(
                "E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9216.00 MiB on device 0: cudaMalloc failed: out of memory"
            )
            self.say("E alloc_tensor_range: failed to allocate CUDA0 buffer of size 9663676416")
            self.say("E llama_model_load: error loading model: unable to allocate CUDA0 buffer")
            self.say("E srv  llama_server: exiting due to model loading error")
            os._exit(1)
        code = options.fault("--fake-exit-at-start")
        if code is not None:
            self.say(options.fault("--fake-words") or "error: invalid argument: --fake-exit-at-start")
            os._exit(int(code))
        broken = options.fault("--fake-exit-at-start-while")
        if broken is not None and os.path.exists(broken):
            self.say(f"E srv  llama_server: exits while {broken} is there")
            os._exit(1)
        try:
            with open(options.model, "rb") as file:
                magic = file.read(4)
        except OSError:
            magic = b""
        if magic != b"GGUF":
            self.say(
                f"E llama_model_load: error loading model: llama_model_loader: failed to load model from {options.model}"
            )
            self.say("E srv  llama_server: exiting due to model loading error")
            os._exit(1)

    def listen(self):
        host, port = self.options.host, self.options.port
        try:
            if host.endswith(".sock"):
                listener = socket.socket(socket.AF_UNIX)
                listener.bind(host)
            else:
                listener = socket.socket()
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((host, port))
                self.options.port = listener.getsockname()[1]
            listener.listen(512)
        except OSError:
            self.say(f"E srv         start: couldn't bind HTTP server socket, hostname: {host}, port: {port}")
            os._exit(1)
        return listener

    def load(self):
        options = self.options
        flood = int(options.fault("--fake-flood-log") or 0)
        line = b"0.00.000.000 I llama_model_loader: - kv   0: " + b"x" * 80 + b"\n"
        while flood > 0:
            os.write(2, line)
            flood -= len(line)
        time.sleep(float(options.fault("--fake-load-seconds") or 0))
        gate = options.fault("--fake-load-until")
        while gate and not os.path.exists(gate):
            time.sleep(0.005)
        while options.fault("--fake-never-ready"):
            time.sleep(3600)

    def watch_router(self):
        """llama-server's own guard: it ends with the pipe to its router."""
        while True:
            line = sys.stdin.buffer.readline()
            if not line:
                os._exit(1)
            if line.strip() == b"cmd_router_to_child:exit":
                os._exit(0)

    def on_sigterm(self, *_):
        """Running requests hold it up, and a second signal cuts them: both as seen in llama-server."""
        signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
        self.recorder.add("sigterm")
        while len(self.slots.free) < self.slots.count:
            time.sleep(0.005)
        self.say("I srv    operator(): cleaning up before exit...")
        os._exit(0)

    def end(self, faults):
        """Die. Slowly: the kernel closes a process's connections before it gives back memory that a device holds."""
        if "die_slowly" in faults:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            while b") Z " not in open(f"/proc/{os.getpid()}/stat", "rb").read():  # noqa: SIM115
                time.sleep(0.001)
            for sock in self.sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            time.sleep(float(faults["die_slowly"]))
        os._exit(1)

    def accept(self, listener):
        self.sockets.append(listener)
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:  # `end` was told to
                return
            self.sockets.append(sock)
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    # --- one connection ------------------------------------------------------------------------------

    def serve(self, sock):
        client = Client(sock)
        idle = float(self.options.fault("--fake-close-idle") or 5)
        with contextlib.closing(sock), contextlib.suppress(ClientGone, OSError):
            for count in range(1, 101):
                if not client.buffer and not select.select([sock], [], [], idle)[0]:
                    return
                request = Request(client)
                keep = request.by_name.get("connection", "").lower() != "close" and count < 100
                if not self.answer(client, request, keep=keep):
                    return

    def head(self, client, status, headers, *, keep, extra=()):
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}"]
        lines += ["Keep-Alive: timeout=5, max=100"] if keep else ["Connection: close"]
        lines += [f"{name}: {value}" for name, value in headers]
        lines += ["Access-Control-Allow-Origin: ", "Server: llama.cpp"]
        lines += [f"{name}: {value}" for name, value in extra]
        client.send("\r\n".join([*lines, "", ""]).encode("latin-1"))

    def whole(self, client, status, body, *, keep, content_type="application/json; charset=utf-8"):
        keep = keep and status < 400
        headers = [("Content-Type", content_type), ("Content-Length", str(len(body)))]
        self.head(client, status, headers, keep=keep)
        client.send(body)
        return keep

    def error(self, client, status, message, kind=None):
        kind = kind or ERROR_TYPES.get(status, "server_error")
        body = dumps({"error": {"code": status, "message": message, "type": kind}})
        return self.whole(client, status, body, keep=False)

    def answer(self, client, request, *, keep):
        path = request.path
        if path in {"/health", "/v1/health"}:
            if not self.ready:
                return self.error(client, 503, "Loading model", "unavailable_error")
            if self.told_ready and self.options.fault("--fake-health-hang-after-ready"):
                client.wait(3600)
            self.told_ready = True
            return self.whole(client, 200, b'{"status":"ok"}', keep=keep)
        offered = request.by_name.get("authorization", "").removeprefix("Bearer ") or request.by_name.get("x-api-key")
        if self.key and offered != self.key:
            return self.error(client, 401, "Invalid API Key")
        if not self.ready:
            return self.error(client, 503, "Loading model", "unavailable_error")
        if request.method == "GET":
            return self.monitor(client, path, keep=keep)
        kind = ROUTES.get(path)
        if request.method == "POST" and COMMANDS.fullmatch(path):
            return self.command(client, request, keep=keep)
        if request.method == "DELETE" and path == "/v1/stream":
            return self.whole(client, 204, b"", keep=keep)
        if kind is None or request.method != "POST":
            return self.error(client, 404, "File Not Found")
        return self.infer(client, request, kind, keep=keep)

    def command(self, client, request, *, keep):
        """Says what it was told. An action on a slot waits until it is free, and on one only."""
        body = json.loads(request.body) if request.body else None
        told = {"path": request.target, "body": body}
        if request.path.startswith("/slots/"):
            number = int(request.path.removeprefix("/slots/"))
            if number >= self.slots.count:
                return self.error(client, 400, "Invalid slot ID")
            while number not in self.slots.free:
                client.wait(0.05)
        if request.path == CONTROL:
            told["success"] = body.get("id") in self.under_way
        return self.whole(client, 200, dumps(told), keep=keep)

    def monitor(self, client, path, *, keep):
        busy = self.slots.count - len(self.slots.free)
        if path == "/slots":
            slots = [
                {"id": n, "n_ctx": 1024, "is_processing": n not in self.slots.free} for n in range(self.slots.count)
            ]
            return self.whole(client, 200, dumps(slots), keep=keep)
        if path == "/props":
            props = {
                "default_generation_settings": {"n_ctx": 1024},
                "total_slots": self.slots.count,
                "model_alias": self.alias,
                "model_path": self.options.model,
                "build_info": "b1-fake",
            }
            return self.whole(client, 200, dumps(props), keep=keep)
        if path == "/metrics":
            text = (
                "# HELP llamacpp:tokens_predicted_total Number of generation tokens processed.\n"
                "# TYPE llamacpp:tokens_predicted_total counter\n"
                f"llamacpp:tokens_predicted_total {self.tokens}\n"
                "# HELP llamacpp:requests_processing Number of requests processing.\n"
                "# TYPE llamacpp:requests_processing gauge\n"
                f"llamacpp:requests_processing {busy}\n"
            )
            return self.whole(client, 200, text.encode(), keep=keep, content_type="text/plain; version=0.0.4")
        if path in {"/v1/models", "/models"}:
            data = [{"id": self.alias, "object": "model", "created": CREATED, "owned_by": "llamacpp"}]
            return self.whole(client, 200, dumps({"object": "list", "data": data}), keep=keep)
        return self.error(client, 404, "File Not Found")

    # --- inference -----------------------------------------------------------------------------------

    def infer(self, client, request, kind, *, keep):
        try:
            body = request.form() if request.is_form else json.loads(request.body)
        except ValueError as error:
            return self.error(client, 500, f"[json.exception.parse_error.101] {error}")
        faults = {name.removeprefix("--fake-").replace("-", "_"): value for name, value in self.options.faults.items()}
        if isinstance(body.get("fake"), dict):
            faults |= body["fake"]
        self.counter += 1
        facts = {"number": self.counter, "tag": faults.get("tag")}
        self.recorder.add(
            "received",
            method=request.method,
            path=request.target,
            headers=request.headers,
            sha256=request.sha256,
            length=len(request.body),
            **facts,
        )
        slot = under_way = None
        try:
            slot = self.slots.take(client)
            self.recorder.add("started", slot=slot, **facts)
            answer = Answer(self, client, request, body, faults, keep=keep)
            under_way = "chatcmpl-" + answer.id
            self.under_way.add(under_way)
            kept = answer.give(kind)
        except ClientGone:
            self.recorder.add("cancelled", **facts)
            raise
        else:
            self.recorder.add("finished", **facts)
            return kept
        finally:
            self.under_way.discard(under_way)
            if slot is not None:
                self.slots.give(slot)


class Answer:
    """One answer to one inference request, with the faults that were asked for."""

    def __init__(self, server, client, request, body, faults, *, keep):
        self.server, self.client, self.request, self.body, self.faults = server, client, request, body, faults
        self.keep = keep
        self.id = hashlib.sha256(ADDED.sub(b"}", request.body)).hexdigest()[:32]
        self.model = body.get("model", server.alias)
        self.seconds = float(faults.get("token_seconds", 0))
        limit = faults.get("tokens", body.get("max_tokens", body.get("n_predict", body.get("max_output_tokens", 4))))
        self.count = int(limit)
        self.cached = int(faults.get("cached", 0))

    def give(self, kind):
        faults, client, server = self.faults, self.client, self.server
        client.wait(float(faults.get("headers_seconds", 0)))
        while "hold_until" in faults and not os.path.exists(faults["hold_until"]):
            client.wait(0.005)
        if faults.get("die") == "before_headers":
            self.server.end(faults)
        if faults.get("500"):
            return server.error(client, 500, "Compute error.")
        if "status" in faults:
            return server.error(client, int(faults["status"]), f"the fake server was told to answer {faults['status']}")
        if faults.get("answer_101"):
            client.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            client.wait(0.2)
            return False
        if faults.get("garbage"):
            client.send(b"\x00\x01 this is not HTTP\r\n\r\n")
            return False
        if kind == "embeddings" and not (server.options.embedding or "tokens" in faults):
            return server.error(
                client,
                501,
                "This server does not support embeddings. Start it with `--embeddings`",
                "not_supported_error",
            )
        if kind == "transcription" and not isinstance(self.body.get("file"), bytes):
            return server.error(client, 400, "No input file found for transcription")
        if self.body.get("stream") and hasattr(self, "stream_" + kind):
            return self.stream(getattr(self, "stream_" + kind)())
        return self.whole(dumps(getattr(self, kind)()))

    def whole(self, body):
        faults, client = self.faults, self.client
        if faults.get("echo"):
            body = dumps(
                {
                    "method": self.request.method,
                    "path": self.request.target,
                    "headers": self.request.headers,
                    "sha256": self.request.sha256,
                }
            )
        if faults.get("stall"):
            client.wait(3600)
        announced = len(body) + 100 if faults.get("wrong_length") else len(body)
        headers = [("Content-Type", "application/json; charset=utf-8"), ("Content-Length", str(announced))]
        self.server.head(client, 200, headers, keep=self.keep)
        if faults.get("die") == "after_headers":
            self.server.end(faults)
        if faults.get("close_mid_chunk"):
            client.send(body[: len(body) // 2])
            return False
        client.send(body)
        if faults.get("wrong_length"):
            return False
        return self.keep

    def stream(self, events):
        faults, client = self.faults, self.client
        headers = [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked"), ("X-Accel-Buffering", "no")]
        self.server.head(client, 200, headers, keep=self.keep)
        if faults.get("die") == "after_headers":
            self.server.end(faults)
        if faults.get("stall"):
            client.wait(3600)
        limit = 1 if faults.get("die") == "after_first_chunk" else faults.get("die_after_chunks")
        number = 0
        for data in events:
            number += b'"prompt_progress"' not in data
            if faults.get("close_mid_chunk") and number == 2:
                client.send(b"%x\r\n" % len(data) + data[: len(data) // 2])
                return False
            client.send(b"%x\r\n" % len(data) + data + b"\r\n")
            if limit is not None and number >= int(limit):
                self.server.end(faults)
        client.send(b"0\r\n\r\n")
        return self.keep

    # --- what is in it -------------------------------------------------------------------------------

    def tokens(self):
        """The words, one after the other, each after its pause."""
        width = int(self.faults.get("chunk_bytes", 0))
        for number in range(self.count):
            if number == self.faults.get("silent_after"):
                self.client.wait(3600)
            self.client.wait(self.seconds)
            self.server.tokens += 1
            yield f"tök{number} ".ljust(width, "x")

    def progress(self):
        """What is said of the prompt, if that was asked for."""
        if not self.body.get("return_progress"):
            return {}
        return {"prompt_progress": {"total": 7, "cache": self.cached, "processed": 7, "time_ms": 5}}

    def usage(self):
        return {
            "completion_tokens": self.count,
            "prompt_tokens": 7,
            "total_tokens": self.count + 7,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def timings(self):
        return {
            "cache_n": self.cached,
            "prompt_n": 7 - self.cached,
            "prompt_ms": 7.5,
            "predicted_n": self.count,
            "predicted_ms": 1.5 * self.count,
        }

    def so_far(self, number):
        """What is said of the answer at a token, if that was asked for."""
        return {"timings": {**self.timings(), "predicted_n": number}} if self.body.get("timings_per_token") else {}

    def common(self, kind):
        fingerprint = {"created": CREATED, "model": self.model, "system_fingerprint": "b1-fake"}
        return {**fingerprint, "object": kind, "id": "chatcmpl-" + self.id}

    def end(self, kind):
        """What follows the choices of a whole answer, in its order."""
        facts = self.common(kind)
        identity = facts.pop("id")
        return {**facts, "usage": self.usage(), "id": identity, "timings": self.timings()}

    def chat(self):
        choice = {
            "finish_reason": "stop",
            "index": 0,
            "message": {"role": "assistant", "content": "".join(self.tokens())},
        }
        return {"choices": [choice], **self.end("chat.completion")}

    def stream_chat(self):
        def chunk(delta, reason=None):
            choices = [{"finish_reason": reason, "index": 0, "delta": delta}]
            return {"choices": choices, **self.common("chat.completion.chunk")}

        begin = chunk({"role": "assistant", "content": None})
        if progress := self.progress():
            yield event({**begin, **progress})
        yield event(begin)
        for number, token in enumerate(self.tokens(), 1):
            yield event({**chunk({"content": token}), **self.so_far(number)})
        last = chunk({}, "stop")
        if (self.body.get("stream_options") or {}).get("include_usage"):
            yield event(last)
            yield event({**last, "choices": [], "usage": self.usage(), "timings": self.timings()})
        else:
            yield event({**last, "timings": self.timings()})
        yield b"data: [DONE]\n\n"

    def text_choice(self, text, reason):
        choices = [{"text": text, "index": 0, "logprobs": None, "finish_reason": reason}]
        return {"choices": choices, **self.common("text_completion")}

    def stream_text(self):
        if progress := self.progress():
            yield event({**self.text_choice("", None), **progress})
        for number, token in enumerate(self.tokens(), 1):
            yield event({**self.text_choice(token, None), **self.so_far(number)})
        yield event({**self.text_choice("", "length"), "usage": self.usage(), "timings": self.timings()})
        yield b"data: [DONE]\n\n"

    def text(self):
        choices = self.text_choice("".join(self.tokens()), "length")["choices"]
        return {"choices": choices, **self.end("text_completion")}

    def completion_end(self, text):
        facts = {"index": 0, "content": text, "tokens": [], "id_slot": 0, "stop": True, "model": self.model}
        counts = {"tokens_predicted": self.count, "tokens_evaluated": 7, "stop_type": "limit", "truncated": False}
        return {**facts, **counts, "timings": self.timings()}

    def completion(self):
        return self.completion_end("".join(self.tokens()))

    def stream_completion(self):
        for number, token in enumerate(self.tokens(), 1):
            facts = {"index": 0, "content": token, "tokens": [number], "stop": False, "id_slot": -1}
            yield event({**facts, "tokens_predicted": number, "tokens_evaluated": 7})
        yield event(self.completion_end(""))

    def embeddings(self):
        inputs = self.body.get("input", self.body.get("content", ""))
        data = []
        for index, item in enumerate(inputs if isinstance(inputs, list) else [inputs]):
            digest = hashlib.sha256(str(item).encode()).digest()[:8]
            data.append({"embedding": [value / 255 for value in digest], "index": index, "object": "embedding"})
        usage = {"prompt_tokens": 7, "total_tokens": 7}
        return {"model": self.model, "object": "list", "usage": usage, "data": data}

    def response(self, text):
        content = [{"type": "output_text", "annotations": [], "logprobs": [], "text": text}]
        item = {
            "content": content,
            "id": "msg_" + self.id,
            "role": "assistant",
            "status": "completed",
            "type": "message",
        }
        usage = {"input_tokens": 7, "output_tokens": self.count, "total_tokens": 7 + self.count}
        facts = {"id": "resp_" + self.id, "object": "response", "created_at": CREATED, "status": "completed"}
        return {**facts, "model": self.model, "output": [item], "usage": usage}

    def responses(self):
        return dict(sorted({**self.response("".join(self.tokens())), "completed_at": CREATED}.items()))

    def stream_responses(self):
        started = {"id": "resp_" + self.id, "object": "response", "status": "in_progress"}
        yield event({"type": "response.created", "response": started}, "response.created")
        progress = self.progress()
        yield event({"type": "response.in_progress", "response": started, **progress}, "response.in_progress")
        if progress:
            yield event({"type": "response.in_progress", "response": started, **progress}, "response.in_progress")
        item = {"content": [], "id": "msg_" + self.id, "role": "assistant", "status": "in_progress", "type": "message"}
        yield event({"type": "response.output_item.added", "item": item}, "response.output_item.added")
        text = ""
        for number, token in enumerate(self.tokens(), 1):
            text += token
            delta = {"type": "response.output_text.delta", "item_id": "msg_" + self.id, "delta": token}
            yield event({**delta, **self.so_far(number)}, "response.output_text.delta")
        yield event({"type": "response.completed", "response": self.response(text)}, "response.completed")

    def message(self, content, reason, output_tokens):
        usage = {"cache_read_input_tokens": 0, "input_tokens": 7, "output_tokens": output_tokens}
        facts = {"id": "chatcmpl-" + self.id, "type": "message", "role": "assistant", "content": content}
        return {**facts, "model": self.model, "stop_reason": reason, "stop_sequence": None, "usage": usage}

    def messages(self):
        return self.message([{"type": "text", "text": "".join(self.tokens())}], "end_turn", self.count)

    def stream_messages(self):
        yield event({"type": "message_start", "message": self.message([], None, 0)}, "message_start")
        block = {"type": "text", "text": ""}
        yield event({"type": "content_block_start", "index": 0, "content_block": block}, "content_block_start")
        for token in self.tokens():
            delta = {"type": "text_delta", "text": token}
            yield event({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")
        yield event({"type": "content_block_stop", "index": 0}, "content_block_stop")
        delta = {"stop_reason": "end_turn", "stop_sequence": None}
        yield event({"type": "message_delta", "delta": delta, "usage": {"output_tokens": self.count}}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def count_tokens(self):
        return {"input_tokens": 7}

    def rerank(self):
        documents = self.body.get("documents", [])
        results = [{"index": index, "relevance_score": 1.0 / (index + 1)} for index in range(len(documents))]
        return {
            "model": self.model,
            "object": "list",
            "usage": {"prompt_tokens": 7, "total_tokens": 7},
            "results": results,
        }

    def tokenize(self):
        return {"tokens": list(str(self.body.get("content", "")).encode())}

    def detokenize(self):
        return {"content": bytes(token % 256 for token in self.body.get("tokens", [])).decode("latin-1")}

    def transcription(self):
        heard = f"{len(self.body['file'])} bytes of {self.body.get('language', 'something')}"
        return {"type": "transcript.text.done", "text": heard, "usage": {"type": "tokens", "input_tokens": 7}}

    def stream_transcription(self):
        for token in self.tokens():
            yield event({"type": "transcript.text.delta", "delta": token})
        yield event(self.transcription())

    def apply_template(self):
        return {"prompt": "".join(f"<|{m.get('role')}|>{m.get('content')}" for m in self.body.get("messages", []))}


if __name__ == "__main__":
    Server(Options(sys.argv[1:])).run()
