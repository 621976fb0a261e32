"""Processes that share a training: what they pass on, and what becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch

from pipelines.config import Train
from pipelines.errors import UserError
from pipelines.model.peers import ALONE, Peers, is_launched, join_peers, launch

JOIN = (
    "import os, sys, torch\n"
    "from pipelines.config import Train\n"
    "from pipelines.errors import UserError\n"
    "from pipelines.model.peers import PeerLostError, join_peers\n"
    "config = Train(device='cpu', accumulate=2)\n"
)


def start(code: str, count: int = 2) -> int:
    return launch([sys.executable, "-c", JOIN + code], count)


def test_alone_nothing_is_passed_on() -> None:
    with join_peers(Train()) as peers:
        assert peers is ALONE
        assert peers.leads
    values = torch.ones(2)
    assert peers.add(values) is values
    assert peers.share(b"x") == b"x"
    parameter = torch.nn.Parameter(torch.ones(2))
    peers.add_gradients([parameter])
    assert parameter.grad is None
    peers.agree(7)
    assert not is_launched()


def test_what_a_scheduler_sets_starts_no_training_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Kubernetes and jobs of Slurm do; the process would wait for others, or fail."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with join_peers(Train()) as peers:
        assert peers is ALONE
    assert not is_launched()


@pytest.mark.parametrize("batches", [[], [0], [0, 1, 2], [0, 1, 2, 3]])
def test_each_batch_is_somebodys(batches: Sequence[int]) -> None:
    shares = [Peers(rank=rank, count=3).own(batches) for rank in range(3)]
    assert sorted(batch for share in shares for batch in share) == batches


@pytest.mark.integration
def test_sums_and_what_the_leader_gives_reach_all() -> None:
    code = (
        "with join_peers(config) as peers:\n"
        "    assert (peers.rank, peers.count) == (int(os.environ['RANK']), 2)\n"
        "    mine = torch.tensor([1.0, 10.0]) * (peers.rank + 1)\n"
        "    assert peers.add(mine).tolist() == [3, 30]\n"
        "    assert mine.tolist() == [peers.rank + 1, 10 * peers.rank + 10]\n"
        "    assert peers.share(b'leader' if peers.leads else b'no') == b'leader'\n"
        "    assert peers.share(b'') == b''\n"
        "    some, one, none = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))\n"
        "    some.grad = torch.full((2, 3), 1.0 + peers.rank)\n"
        "    if not peers.leads:\n"
        "        one.grad = torch.full((2, 3), 5.0)\n"
        "    peers.add_gradients([some, one, none])\n"
        "    assert some.grad.tolist() == [[3.0] * 3] * 2\n"
        "    assert one.grad.tolist() == [[5.0] * 3] * 2\n"
        "    assert none.grad is None\n"
        "    peers.agree(2**31)\n"
        "    peers.meet()\n"
    )
    assert start(code) == 0


@pytest.mark.integration
def test_who_drew_something_else_is_found_and_the_leader_tells(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = (
        "with join_peers(config) as peers:\n"
        "    try:\n"
        "        peers.agree(peers.rank)\n"
        "    except UserError as error:\n"
        "        sys.exit(f'{peers.rank}: {error}')\n"
    )
    assert start(code) == 1
    told = capfd.readouterr().err.splitlines()
    assert [line[:45] for line in told] == ["0: train: the processes that share the traini"]


@pytest.mark.integration
def test_batches_that_cannot_be_shared_evenly_are_refused(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = (
        "try:\n"
        "    with join_peers(config) as peers:\n"
        "        peers.meet()\n"
        "except UserError as error:\n"
        "    print(error, file=sys.stderr)\n"
        "    sys.exit(2)\n"
    )
    assert start(code, 3) == 2
    expected = (
        "train.accumulate: 2 batches make a step, which 3 processes do not share evenly; set it to "
        "a multiple of 3\n"
    )
    assert capfd.readouterr().err == expected


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulate must be a multiple of processes"):
        Train(accumulate=2, processes=3)


def test_gpus_that_are_not_there_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pipelines.model.peers.choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("pipelines.model.peers._die_with_parent", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="a GPU of its own, and there are 1"), join_peers(Train()):
        pass


@pytest.mark.integration
def test_who_is_killed_is_told_of(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "with join_peers(config) as peers:\n"
        "    peers.meet()\n"
        "    if not peers.leads:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    peers.meet()\n"
    )
    with pytest.raises(UserError, match="process 1 of 2 was ended by SIGKILL"):
        start(code)
    lines = capfd.readouterr().err.splitlines()
    assert all(line.startswith("forecart: lost the other processes") for line in lines)
    assert len(lines) <= 1


@pytest.mark.integration
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_nobody_outlives_the_launcher(tmp_path: Path, by: signal.Signals) -> None:
    code = (
        "import time\n"
        "from pathlib import Path\n"
        "with join_peers(config) as peers:\n"
        f"    Path({str(tmp_path)!r}, str(os.getpid())).touch()\n"
        "    time.sleep(600)\n"
    )
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\n"
            "from pipelines.model.peers import launch\n"
            f"sys.exit(launch([sys.executable, '-c', {JOIN + code!r}], 2))\n",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        pids = [int(path.name) for path in tmp_path.iterdir()]
        assert len(pids) == 2
        launcher.send_signal(by)
        _, told = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode == (-9 if by is signal.SIGKILL else 128 + 15)
    assert told == ""
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert os.getpid() not in pids
