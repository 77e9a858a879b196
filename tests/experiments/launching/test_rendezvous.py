"""An address where something else listens is told, before torchrun waits there."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from experiments.errors import UserError
from experiments.launching import rendezvous
from experiments.launching.launch import launch
from tests.experiments.run_configs import run_spec

TORCHRUN = {"name": "torchrun", "nproc": 1, "timeout_s": 600.0}


@pytest.fixture(params=[("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)], ids=str)
def silent_port(request) -> Iterator[int]:
    """Of a program that takes connections and says nothing."""
    host, family = request.param
    try:
        server = socket.socket(family)
        server.bind((host, 0))
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with server:
        server.listen(100)
        yield server.getsockname()[1]


def test_taken_port_is_told_in_one_line_before_anything_is_written(
    silent_port: int, tmp_path: Path
) -> None:
    begin = time.monotonic()
    taken = {**TORCHRUN, "rdzv_endpoint": f"localhost:{silent_port}"}
    with pytest.raises(UserError, match=rf"rdzv_endpoint=localhost:{silent_port}: .* is taken"):
        launch(run_spec(tmp_path, launch=taken))
    assert time.monotonic() - begin < 90
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_second_machine_does_not_wait_for_what_is_no_torchrun(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"at launch.rdzv_endpoint={endpoint} is no torchrun"):
            rendezvous.wait_for_first_machine(endpoint, 600.0)


def test_second_machine_says_what_it_waits_for_and_gives_up_in_time(capfd) -> None:
    with socket.socket() as server:  # does not listen
        server.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=r"nobody listens at .* after launch.timeout_s=0.5 s"):
            rendezvous.wait_for_first_machine(endpoint, 0.5)
    assert f"waiting for the first machine at {endpoint}, 0.5 s at most" in capfd.readouterr().out


@pytest.mark.slow
def test_store_of_another_machine_of_the_run_is_no_stranger() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert not rendezvous._is_free(store.port)
    assert rendezvous.can_open(f"127.0.0.1:{store.port}")
    rendezvous.wait_for_first_machine(f"127.0.0.1:{store.port}", 60.0)


def test_free_and_unnamed_ports_will_do() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    assert rendezvous.can_open(f"localhost:{port}") and rendezvous.can_open("localhost:0")
