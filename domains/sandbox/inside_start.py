"""Start a program inside the sandbox: say that it begins, then run it. Text of `python -c`, standard library only.

Arguments: the file descriptor that holds the program, and the one that takes its private results.
"""

import os
import sys

_MEMORY_EXIT = 77
"""Exit code that tells the supervisor of an uncaught MemoryError; `cell.MEMORY_EXIT` is the same number."""


def _start() -> None:
    program_fd, result_fd = int(sys.argv[1]), int(sys.argv[2])
    with open(program_fd, "rb") as program:
        source = program.read()
    sys.argv[:] = ["program.py"]
    namespace = {"__name__": "__main__", "__builtins__": __builtins__, "RESULT_FD": result_fd}
    os.write(result_fd, b"S")
    try:
        exec(compile(source, "program.py", "exec"), namespace)
    except MemoryError:
        os._exit(_MEMORY_EXIT)


_start()
