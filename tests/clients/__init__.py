"""Programs that people use, unchanged, against the router with a real llama-server; `nox -s clients` and `npm_clients`.

Not part of the other tests: each program has an environment of its own, which those sessions make.
"""
