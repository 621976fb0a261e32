"""The machine's own speed, so that a limit on processor time holds on a slow machine, too."""

import time

REFERENCE_SECONDS = 0.003


def slowness() -> float:
    """How much longer a fixed piece of Python takes here than on a machine that needs 3 ms for it.

    At least 1; the median of five, so that neither one lucky nor one unlucky time decides.
    """
    seconds = []
    for _ in range(5):
        started = time.process_time()
        _fibonacci(22)
        seconds.append(time.process_time() - started)
    return max(1.0, sorted(seconds)[2] / REFERENCE_SECONDS)


def _fibonacci(n: int) -> int:
    return n if n < 2 else _fibonacci(n - 1) + _fibonacci(n - 2)
