"""Run the tasks of an evaluation in processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any

import torch

from mima.errors import MimaError
from mima.evaluation.bench import Bench, Task
from mima.evaluation.worker import Advance, Result, Worker

GUARD = '`if __name__ == "__main__":`'
KILLED = (
    "evaluate: a process that attacked was killed, perhaps for want of memory, or could not begin, "
    f"as where a script calls evaluate without {GUARD}; finished attacks are kept, and the same "
    "command goes on from them (with fewer processes, if it was the memory)"
)


def refuse_before_main() -> None:
    """Refuse to evaluate in a process that is only being started.

    It imports the script that its parent runs, and so calls whatever no guard holds back.

    Raises:
        MimaError: this is such a process.
    """
    # by what multiprocessing itself refuses to start further processes from there
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise MimaError(
            "evaluate: called by a process that is only being started, and imports the script that "
            f"started it: in that script, call evaluate below {GUARD}, or with processes=1"
        )


def _follow_parent() -> None:
    """Be a process of one thread, without a Ctrl-C of its own, and gone when its parent is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class _Stopped(Exception):  # noqa: N818 - no error: the main process asked for it
    pass


_worker: Worker


def _start_process(bench: Bench, queue: Any, stop: Any) -> None:
    """Set up a worker process."""
    global _worker
    _follow_parent()

    def advance(amount: int) -> None:
        if stop.is_set():
            raise _Stopped
        queue.put(amount)

    _worker = Worker(bench, advance)


def _run_task(task: Task) -> Result:
    return _worker.run(task)


def one_by_one(worker: Worker, tasks: deque[Task]) -> Iterator[tuple[Task, Result]]:
    """Run tasks here, and give back each with its result; more may be appended meanwhile."""
    while tasks:
        task = tasks.popleft()
        yield task, worker.run(task)


def in_parallel(
    bench: Bench, tasks: deque[Task], processes: int, advance: Advance
) -> Iterator[tuple[Task, Result]]:
    """Run tasks in processes, and give back each with its result as it ends.

    Whoever iterates may append more tasks meanwhile.
    """
    # not fork: torch and CUDA have threads by now
    context = multiprocessing.get_context("forkserver")
    queue, stop = context.SimpleQueue(), context.Event()
    pool = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_process, initargs=(bench, queue, stop)
    )

    def report() -> None:
        while not queue.empty():
            advance(queue.get())

    try:
        pending: dict[Future[Result], Task] = {}
        while tasks or pending:
            with one_thread(True):
                while tasks:
                    task = tasks.popleft()
                    try:
                        pending[pool.submit(_run_task, task)] = task
                    except (BrokenProcessPool, ConnectionError, EOFError) as error:
                        raise MimaError(KILLED) from error
            ended, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            report()
            for future in ended:
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise MimaError(KILLED) from error
                yield pending.pop(future), result
    finally:
        # running attacks end within a step; waiting ones are not begun
        stop.set()
        drain = threading.Thread(target=_drain, args=(queue,), daemon=True)
        drain.start()
        pool.shutdown(cancel_futures=True)
        queue.put(None)
        drain.join()


@contextmanager
def beside(function: Callable[..., None], *args: Any, **options: Any) -> Iterator[None]:
    """Run a function in a process of one thread while the block runs, and wait for both.

    The process ends with a block that raises.

    Raises:
        MimaError: what the function raised, or that its process was killed.
    """
    context = multiprocessing.get_context("forkserver")
    heard, said = context.Pipe(duplex=False)
    process = context.Process(target=_run_beside, args=(said, function, args, options), daemon=True)
    with one_thread(True):
        process.start()
    # the other end is the process's alone: its death is the end of what can be heard
    said.close()
    try:
        yield
        try:
            problem = heard.recv()
        except EOFError:
            process.join()
            raise MimaError(
                f"a process beside the main one ended with status {process.exitcode}, perhaps for "
                "want of memory"
            ) from None
        if problem is not None:
            raise MimaError(problem)
        # let it end by itself, and put away what it shares with others
        process.join()
    finally:
        process.terminate()
        process.join()
        heard.close()


def _run_beside(
    said: Connection, function: Callable[..., None], args: Sequence[Any], options: dict[str, Any]
) -> None:
    _follow_parent()
    try:
        function(*args, **options)
    except MimaError as error:
        said.send(str(error))
    else:
        said.send(None)


def _drain(queue: Any) -> None:
    """Empty a queue until None comes, so that nobody blocks on a full pipe."""
    while queue.get() is not None:
        pass


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Let processes started here compute with one thread each, from their first import on."""
    if not wanted:
        yield
        return
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
