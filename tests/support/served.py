"""What the processes of tests run, imported once by the server that forks them."""

import gc

from support import commands, faults, immunizing, ranks

__all__ = ["commands", "faults", "immunizing", "ranks"]

# a process that collects garbage among these writes to memory that it shares with the server
gc.collect()
gc.freeze()
