"""Processes that work together, forked from one that has imported what takes seconds to import."""

import multiprocessing

import torch.multiprocessing as mp

FORKS = "forkserver" in multiprocessing.get_all_start_methods()
#: Installed packages only: before Python 3.13 the server does not know the folder of the tests.
IMPORTED = [
    "torch._dynamo",  # by the first step of an optimizer
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "accelerate",
    "datasets",
    "transformers.trainer",
    "transformers.models.distilbert.modeling_distilbert",
    "timm",
]


if FORKS:
    multiprocessing.set_forkserver_preload(IMPORTED)
METHOD = "forkserver" if FORKS else "spawn"


def together(function, world, *arguments):
    """Call ``function(rank, world, *arguments)`` in ``world`` processes, and wait for them."""
    mp.start_processes(function, args=(world, *arguments), nprocs=world, start_method=METHOD)


def started(function, *arguments):
    """A process that calls ``function(*arguments, connection)``, and the other end of the connection."""
    context = multiprocessing.get_context(METHOD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, sender), daemon=True)
    process.start()
    sender.close()  # the process has it: the end of it is the end of what comes
    return process, receiver
