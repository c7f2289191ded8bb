"""Stands between the router and a real llama-server, and makes it a sick one.

`sick.py FILE llama-server ARGUMENTS`: the first line of FILE says of what. Standard library only, a program of its own.

mute        `/health` is answered; of requests not one byte comes back any more
compute     every request gets 500 `Compute error.`
cut         a few answers end in the middle of a chunk
short       a few answers announce more bytes than come
upgrade     a few requests are answered with 101
garbage     a few requests are answered with what is no HTTP
stubborn    ignores SIGTERM, forks a child that does too, and floods its log

After "a few" it is well again. A sick one that is told to stop goes, and its llama-server with it.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

FEW = 4
FLOOD_BYTES = 4_000_000
INSTEAD = {"mute", "compute", "upgrade", "garbage"}
"""Of which the real llama-server never hears."""
COMPUTE_ERROR = b'{"error":{"code":500,"message":"Compute error.","type":"server_error"}}'


class Sickness:
    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.left = FEW if kind in {"cut", "short", "upgrade", "garbage"} else 1_000_000_000
        self.lock = threading.Lock()

    def strikes(self, head: bytes) -> str | None:
        """What is to happen to a request: the sickness, or nothing."""
        if not head.startswith(b"POST") or self.kind == "stubborn":
            return None
        with self.lock:
            self.left -= 1
            return self.kind if self.left >= 0 else None


def read_request(client: socket.socket) -> tuple[bytes, bytes]:
    """Head and body; empty at the end of the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = client.recv(65536)
        if not piece:
            return b"", b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    while len(body) < length:
        piece = client.recv(65536)
        if not piece:
            raise ConnectionError("the router left in the middle of a request")
        body += piece
    return head, body


def until_gone(client: socket.socket) -> None:
    """The router waits for an answer; return when it gives up."""
    while client.recv(65536):
        pass


def answer_sick(kind: str, client: socket.socket) -> None:
    if kind == "mute":
        until_gone(client)
    elif kind == "compute":
        head = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nConnection: close\r\n"
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(COMPUTE_ERROR) + COMPUTE_ERROR)
    elif kind == "upgrade":
        client.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: chaos\r\n\r\nchaos")
    elif kind == "garbage":
        client.sendall(b"\x00\xff this is no HTTP\r\n\r\n" * 10)


def relay(client: socket.socket, inner: socket.socket, kind: str | None) -> None:
    """The answer; `cut` and `short` end it before its time."""
    passed = 0
    while True:
        readable, _, _ = select.select([client, inner], [], [])
        if client in readable and not client.recv(65536):
            return
        if inner not in readable:
            continue
        data = inner.recv(65536)
        if not data:
            return
        if kind == "short":
            data = data.replace(b"Content-Length: ", b"Content-Length: 9")
        if kind == "cut" and passed + len(data) > 300:  # behind the head
            client.sendall(data[: max(1, len(data) // 2)])
            return
        client.sendall(data)
        passed += len(data)


def serve(client: socket.socket, inner_path: str, sickness: Sickness) -> None:
    with client:
        try:
            head, body = read_request(client)
            if not head:
                return
            kind = sickness.strikes(head)
            if kind in INSTEAD:
                answer_sick(kind, client)
                return
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
            with socket.socket(socket.AF_UNIX) as inner:
                inner.connect(inner_path)
                inner.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
                relay(client, inner, kind)
        except OSError:
            return


def be_stubborn() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        while True:
            time.sleep(1000)  # what it forked stays; a process of its own
    line = b"chaos " * 20 + b"\n"
    for _ in range(FLOOD_BYTES // len(line)):
        os.write(2, line)


def main() -> None:
    file, *command = sys.argv[1:]
    sickness = Sickness(Path(file).read_text(encoding="ascii").strip())
    Path(file).unlink()
    path = command[command.index("--host") + 1]
    inner_path = path.removesuffix(".sock") + "i.sock"
    inner = subprocess.Popen([inner_path if word == path else word for word in command])  # of our process group

    def go(*_: object) -> None:
        inner.kill()
        os._exit(0)

    if sickness.kind == "stubborn":
        be_stubborn()
    else:
        signal.signal(signal.SIGTERM, go)

    def end_with_it() -> None:
        os._exit(inner.wait() or 1)

    threading.Thread(target=end_with_it, daemon=True).start()
    while not Path(inner_path).exists():
        time.sleep(0.01)  # until the real one listens; a process of its own
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        while True:
            client, _ = listening.accept()
            threading.Thread(target=serve, args=(client, inner_path, sickness), daemon=True).start()


if __name__ == "__main__":
    main()
