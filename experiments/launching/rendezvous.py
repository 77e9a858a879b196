"""The address where the machines of a run meet, looked at before torchrun waits there.

torchrun waits for minutes, and says nothing, where something else listens at its address.
"""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import time

from experiments.errors import UserError

# How long a store of torch may take to answer, the loading of torch included.
_ANSWER_S = 40.0
_CONNECT_S = 5.0


def can_open(endpoint: str) -> bool:
    """Whether torchrun can open its store here, or another machine's already has.

    Args:
        endpoint: host:port of this machine; port 0 is any free one.
    """
    host, port = _parts(endpoint)
    return port == 0 or _is_free(port) or _is_store(host, port)


def wait_for_first_machine(endpoint: str, limit_s: float) -> None:
    """Wait until the first machine's torchrun listens.

    Args:
        endpoint: host:port of the first machine.
        limit_s: seconds, `launch.timeout_s`.

    Raises:
        UserError: nobody listens there in time, or something else does.
    """
    host, port = _parts(endpoint)
    deadline = time.monotonic() + limit_s
    said = False
    while not _answers(host, port, min(_CONNECT_S, limit_s)):
        if time.monotonic() > deadline:
            raise UserError(
                f"nobody listens at launch.rdzv_endpoint={endpoint} after launch.timeout_s="
                f"{limit_s:g} s: start launch.node_rank=0 there, and let machines reach that port"
            )
        if not said:
            print(f"waiting for the first machine at {endpoint}, {limit_s:g} s at most", flush=True)
            said = True
        time.sleep(0.2)
    if not _is_store(host, port):
        raise UserError(
            f"what listens at launch.rdzv_endpoint={endpoint} is no torchrun: name another port"
        )


def _parts(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def _is_free(port: int) -> bool:
    """Whether this process could listen at a port, on all interfaces as torch does."""
    for family, host in ((socket.AF_INET, ""), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((host, port))
                one.listen()
        except PermissionError:
            return True  # torchrun will say so
        except OSError as error:
            if family == socket.AF_INET6 and error.errno != errno.EADDRINUSE:
                continue  # this machine has none
            return False
    return True


def _answers(host: str, port: int, limit_s: float) -> bool:
    try:
        socket.create_connection((host, port), timeout=limit_s).close()
    except OSError:
        return False
    return True


def _is_store(host: str, port: int) -> bool:
    """Whether a store of torch listens; asked in a process of its own, which can be ended."""
    code = "import sys; from experiments.training.ranks import store_answers; "
    code += "sys.exit(not store_answers(sys.argv[1], int(sys.argv[2])))"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", code, host, str(port)],
            capture_output=True, timeout=_ANSWER_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0
