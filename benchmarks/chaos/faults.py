"""What goes wrong, one thing after the other, in an order that a seed decides."""

import json
import os
import resource
import signal
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from random import Random
from typing import Any, Final

import attrs
import trio

from benchmarks.chaos.hostile import HOSTILE
from benchmarks.chaos.ledger import Ledger
from benchmarks.chaos.line import Cut, Line
from benchmarks.chaos.place import CONTEXT, DRAIN_SECONDS, Place, alive
from benchmarks.chaos.questions import ALIASES, QUESTIONS, REFUSALS, Violation
from benchmarks.machine import resident_bytes

ORPHAN_SECONDS: Final = 2.0
COMMAND_SECONDS: Final = 60.0
SICKNESSES: Final = ("mute", "compute", "cut", "short", "upgrade", "garbage", "stubborn")
CROWD: Final = 100
FLOOD: Final = 150
SHORT_OF_FILES_SECONDS: Final = 1.0


@attrs.define(eq=False, kw_only=True)
class Misfortune:
    """Everything that can go wrong with one router."""

    place: Place
    ledger: Ledger
    random: Random
    most_resident_bytes: int = 0

    def schedule(self) -> list[tuple[Callable[[], Awaitable[None]], int]]:
        """What may happen, and how often in comparison."""
        return [
            (self.kill_a_llama_server, 8),
            (self.stop_a_llama_server, 2),
            (self.tell_a_llama_server_to_end, 2),
            (self.refuse_the_next_load, 3),
            (self.refuse_every_load, 1),
            (self.hang_the_next_load, 1),
            (self.make_the_next_one_sick, 5),
            (self.eject, 4),
            (self.reset, 1),
            (self.reload, 3),
            (self.reload_a_wrong_file, 1),
            (self.flood, 1),
            (self.crowd, 2),
            (self.run_out_of_files, 1),
            (self.kill_the_router, 1),
            (self.end_the_router, 1),
        ]

    async def happen(self, until: float) -> None:
        """One after the other, until then; each kind once before any comes again by chance."""
        kinds, weights = zip(*self.schedule(), strict=True)
        first = list(kinds)
        self.random.shuffle(first)
        while trio.current_time() < until:
            await trio.sleep(self.random.uniform(0.1, 1.2))
            fault = first.pop() if first else self.random.choices(kinds, weights)[0]
            self.happened(fault.__name__.replace("_", " "))
            try:
                await fault()
            except Violation as error:  # it did not start again
                self.ledger.violation(str(error))
                return
            self.most_resident_bytes = max(self.most_resident_bytes, resident_bytes([self.place.process.pid]))

    def happened(self, what: str) -> None:
        """Count it, and note when."""
        self.ledger.faults[what] += 1
        self.ledger.note(what)

    # --- to llama-servers

    async def _signal_one(self, number: signal.Signals) -> None:
        servers = self.place.llama_servers()
        if servers:
            pid = self.random.choice(servers)
            self.ledger.stages[f"{number.name} {await self._stage(pid)}"] += 1
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                self.ledger.note("it had gone")

    async def _stage(self, pid: int) -> str:
        """What a llama-server does, as far as the router knows."""
        status, raw = await self.command("GET", "/v1/models/status")
        models = json.loads(raw)["models"].values() if status == 200 else ()
        for model in models:
            if model["pid"] == pid:
                return "computing" if model["active"] else str(model["status"])
        return "on its way"

    async def kill_a_llama_server(self) -> None:
        await self._signal_one(signal.SIGKILL)

    async def stop_a_llama_server(self) -> None:
        await self._signal_one(signal.SIGSTOP)

    async def tell_a_llama_server_to_end(self) -> None:
        await self._signal_one(signal.SIGTERM)

    async def refuse_the_next_load(self) -> None:
        (self.place.folder / "refuse.1").touch()

    async def refuse_every_load(self) -> None:
        """As often as one model is tried: it fails, and is tried again after a while."""
        for number in range(1, 4):
            (self.place.folder / f"refuse.{number}").touch()
        await self.eject()

    async def hang_the_next_load(self) -> None:
        (self.place.folder / "hang").touch()

    async def make_the_next_one_sick(self) -> None:
        kind = self.random.choice(SICKNESSES)
        self.ledger.stages[f"sick: {kind}"] += 1
        (self.place.folder / "sick").write_text(kind + "\n")
        await self.eject()

    # --- by operators

    async def eject(self) -> None:
        alias, force = self.random.choice(ALIASES), self.random.random() < 0.5
        await self.command("POST", f"/v1/models/eject?force={force}", {"model": alias})

    async def reset(self) -> None:
        await self.command("POST", f"/v1/models/{self.random.choice(ALIASES)}/reset", {})

    async def reload(self) -> None:
        self.place.configure(context=self.random.choice([CONTEXT, 1280, 1536]), at_once=self.random.random() < 0.5)
        if self.random.random() < 0.5:
            self.place.process.send_signal(signal.SIGHUP)
        else:
            await self.command("POST", "/v1/config/reload", {})

    async def reload_a_wrong_file(self) -> None:
        """Refused whole."""
        self.place.write("[system]\nidle_timeout_sec = -1\n")
        status, raw = await self.command("POST", "/v1/config/reload", {})
        if status != 400 or json.loads(raw)["error"]["code"] != "invalid_config":
            self.ledger.violation(f"a wrong file was not refused: {status} {raw[:500]!r}")
        self.place.configure()
        await self.command("POST", "/v1/config/reload", {})

    async def command(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """An operator's request; status 0: it got no answer."""
        raw = b"" if body is None else json.dumps(body).encode()
        with trio.move_on_after(COMMAND_SECONDS):
            async with Line.to(self.place.port) as line:
                try:
                    head = await line.ask(method, path, raw, [("Content-Type", "application/json")])
                    answer = await line.rest()
                except (OSError, Cut, Violation) as error:
                    self.ledger.violation(f"{path}: {error!r}")
                    return 0, b""
            if head.status >= 500 and json.loads(answer)["error"]["code"] not in REFUSALS:
                self.ledger.violation(f"{path} answered {head.status}: {answer[:500]!r}")
            return head.status, answer
        self.ledger.violation(f"{path} had no end after {COMMAND_SECONDS:g} s")
        return 0, b""

    # --- by clients

    async def flood(self) -> None:
        """More than any queue holds, all of whom leave."""

        async def ask() -> None:
            question = self.random.choice(QUESTIONS)
            raw = json.dumps(question.body(stream=False)).encode()
            with trio.move_on_after(1.0):
                async with Line.to(self.place.port) as line:
                    try:
                        await line.ask("POST", question.path, raw)
                    except (OSError, Cut) as error:
                        self.ledger.note(f"flood: {error!r}")

        async with trio.open_nursery() as nursery:
            for _ in range(FLOOD):
                nursery.start_soon(ask)

    async def crowd(self) -> None:
        """Half of a head, half of a body, what is no HTTP, who closes one half: for a second."""
        with ExitStack() as stack:
            for number in range(CROWD):
                sock = stack.enter_context(trio.socket.socket())
                try:
                    await sock.connect(("127.0.0.1", self.place.port))
                    await sock.send(HOSTILE[number % len(HOSTILE)])
                    if number % 3 == 0:
                        sock.shutdown(trio.socket.SHUT_WR)
                except OSError as error:
                    self.ledger.note(f"crowd: {error!r}")
            await trio.sleep(1.0)

    # --- to the router

    async def run_out_of_files(self) -> None:
        """No descriptor more than it has, for a while."""
        pid = self.place.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        files = self.place.open_files()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (files, hard))
        await trio.sleep(SHORT_OF_FILES_SECONDS)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))

    async def kill_the_router(self) -> None:
        """And see that no llama-server outlives it, and that the next one cleans up."""
        servers = self.place.llama_servers()
        self.place.going()
        self.place.process.kill()
        await trio.to_thread.run_sync(self.place.process.wait)
        await self.none_left(servers)
        await self.place.start()
        left = list(self.place.runtime.glob("trio-router-*"))
        if len(left) != 1:
            self.ledger.violation(f"folders of routers that are gone: {left}")

    async def end_the_router(self) -> None:
        """SIGTERM under load, with a client that reads nothing."""
        async with Line.to(self.place.port) as deaf:
            raw = json.dumps(QUESTIONS[-1].body(stream=True)).encode()
            with trio.move_on_after(1.0):
                try:
                    await deaf.ask("POST", QUESTIONS[-1].path, raw)
                except (OSError, Cut) as error:
                    self.ledger.note(f"the deaf one: {error!r}")
            servers = self.place.llama_servers()
            self.place.going()
            await self.stop_the_router(servers)
        await self.place.start()

    async def stop_the_router(self, servers: list[int]) -> None:
        """SIGTERM: 0 within the time to drain, and nothing left."""
        process = self.place.process
        process.send_signal(signal.SIGTERM)
        bound = DRAIN_SECONDS + 2 * ORPHAN_SECONDS
        began = trio.current_time()
        with trio.move_on_after(4 * bound):
            await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
        if process.poll() != 0:
            self.ledger.violation(f"the router ended with {process.returncode} after SIGTERM")
        if (took := trio.current_time() - began) > bound:
            self.ledger.violation(f"the router took {took:.1f} s to stop")
        await self.none_left(servers)
        if left := list(self.place.runtime.iterdir()):
            self.ledger.violation(f"the router left {left}")

    async def none_left(self, servers: list[int]) -> None:
        """See that these end in time."""
        with trio.move_on_after(ORPHAN_SECONDS):
            while alive(servers):  # noqa: ASYNC110  (nobody tells us: they are not our children)
                await trio.sleep(0.05)
        if left := alive(servers):
            self.ledger.violation(f"llama-servers {left} outlive the router by {ORPHAN_SECONDS} s")
