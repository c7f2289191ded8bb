"""Support for tests of real processes: a fake llama-server, tiny models, a router in a process of its own."""
