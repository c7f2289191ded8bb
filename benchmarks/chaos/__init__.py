"""Everything that can go wrong, at random and at once: each request must have an end that its client can trust.

Real llama-servers behind a real router, three models with room for two, mixed plain and streamed requests by both ways
in, clients that leave when they like; and meanwhile llama-servers are killed, stopped, refused, hung while they load,
made sick in every way that `sick` knows, models ejected and reset, the configuration changed, connections opened by
who means no good, files run out, the router ended and killed. The order comes from a seed.

An answer is right if it is word for word what the same request got while nothing was wrong (temperature 0). A request
may also be refused with an error of ours, or be a stream that ends with an error event. Everything else is a
violation: other words, a clean end too early, no end, an answer to somebody else, bytes that nobody asked for, a
llama-server or a socket that is left over.

`python -m benchmarks.chaos --minutes 10` prints counts and the violations, and exits with 1 if there are any.
"""

from benchmarks.chaos.run import Chaos, run

__all__ = ["Chaos", "run"]
