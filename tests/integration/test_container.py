"""The real image: built, run read-only and without rights, asked over loopback.

No image registry is needed: the base is a Debian that debootstrap makes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config import Builder
from pipelines.container import containerize
from pipelines.io import digest_directory
from pipelines.model.predictor import Predictor
from tests.integration.test_bento import (
    NOW,
    ROOT,
    Service,
    encode,
    make_request,
    project,  # noqa: F401 - a fixture
)
from tests.integration.test_gateway import find_port

TAG = "localhost/forecart-test:1"
BASE = "localhost/forecart-base:1"
NEEDED = ("buildah", "podman", "runc", "debootstrap")
SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def find_lack() -> str | None:
    """Say why no image can be built here."""
    missing = [name for name in NEEDED if shutil.which(name, path=SEARCHED) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install {' '.join(missing)}"
    if os.geteuid() != 0:
        return "needs root, for debootstrap and for mounts"
    return None


pytestmark = [
    pytest.mark.skipif(find_lack() is not None, reason=str(find_lack())),
    pytest.mark.timeout(900),
]


@dataclass(frozen=True)
class Image:
    project: Path
    folder: Path
    driver: str

    def podman(self, *arguments: str) -> list[str]:
        return [
            *["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs"],
            *["--root", str(self.folder / "root"), "--runroot", str(self.folder / "run")],
            *["--storage-driver", self.driver, *arguments],
        ]

    def run_command(self, *arguments: str) -> list[str]:
        """As it is to be run in production; seccomp and limits are the test machine's matter."""
        return self.podman(
            *["run", "--rm", "--network", "host", "--read-only", "--tmpfs", "/tmp:rw,size=256m"],  # noqa: S108 - in the container
            *["--cap-drop", "ALL", "--security-opt", "no-new-privileges"],
            *["--security-opt", "seccomp=unconfined"],
            *["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096", *arguments],
        )

    def python(self, code: str) -> Any:
        """Run Python inside; it prints JSON."""
        command = self.run_command("--entrypoint", "/opt/forecart/venv/bin/python", TAG, "-c", code)
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)


@pytest.fixture(scope="module")
def image(project: Path) -> Iterator[Image]:  # noqa: F811
    # podman takes no runroot of 50 characters; what is left of a build that fails goes, too.
    with tempfile.TemporaryDirectory(prefix="image", ignore_cleanup_errors=True) as folder:
        yield from build(project, Path(folder))


def build(project: Path, folder: Path) -> Iterator[Image]:  # noqa: F811
    driver = "overlay" if can_overlay(folder) else "vfs"
    config = folder / "storage.conf"
    config.write_text(
        f'[storage]\ndriver = "{driver}"\ngraphroot = "{folder / "root"}"\n'
        f'runroot = "{folder / "run"}"\n'
    )
    shutil.copytree(ROOT / "deploy/container", project / "deploy/container")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_STORAGE_CONF", str(config))
        patch.setenv("STORAGE_DRIVER", driver)
        patch.setenv("BUILDAH_ISOLATION", "chroot")
        patch.setenv("PATH", SEARCHED)
        try:
            make_base(folder)
            done = containerize(
                project, tag=TAG, base_image=BASE, builder=Builder.BUILDAH, torch_index=""
            )
            assert done.startswith(f"{TAG} built by buildah"), done
            print(done)
            yield Image(project=project, folder=folder, driver=driver)
        finally:
            call("buildah", "rm", "--all")
            call("buildah", "rmi", "--all", "--force")


def call(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, f"{command}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result.stdout.strip()


def can_overlay(folder: Path) -> bool:
    """Tell whether overlays can be mounted; vfs, which copies, is slower and works anywhere."""
    parts = {name: folder / "probe" / name for name in ("lower", "upper", "work", "merged")}
    for part in parts.values():
        part.mkdir(parents=True)
    options = f"lowerdir={parts['lower']},upperdir={parts['upper']},workdir={parts['work']}"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(parts["merged"])]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        return False
    call("umount", str(parts["merged"]))
    return True


def make_base(folder: Path) -> None:
    """Make the smallest Debian with Python."""
    include = "python3,python3-venv,ca-certificates"
    base = str(folder / "debian")
    call("debootstrap", "--variant=minbase", f"--include={include}", "bookworm", base)
    shutil.rmtree(folder / "debian/var/cache/apt")
    shutil.rmtree(folder / "debian/var/lib/apt/lists")
    container = call("buildah", "from", "scratch")
    call("buildah", "add", "--quiet", container, base, "/")
    call("buildah", "commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(base)


@contextmanager
def running(image: Image) -> Iterator[Service]:
    port = find_port()
    log = image.folder / "service.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            image.run_command("--name", "forecart-test", TAG, "--port", str(port)),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    service = Service(port=port, process=process, log=log)
    try:
        deadline = time.monotonic() + 120
        while not service.is_ready():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield service
    finally:
        subprocess.run(image.podman("stop", "--time", "20", "forecart-test"), check=False)
        process.wait(60)


def test_it_predicts_what_the_model_says(image: Image) -> None:
    request = make_request(3)
    with running(image) as service:
        status, answer = service.predict(request)
        metrics = service.ask("GET", "/metrics")[0]
    assert (status, metrics) == (200, 200), answer
    model = image.project / "models/gpt"
    assert answer["model"] == digest_directory(model)
    now = np.full(3, int(NOW.timestamp() * 1e6))
    sequences = encode([user["events"] for user in request["users"]])
    expected = Predictor.load(model).predict(sequences, now)["purchase_14d"]
    found = [p["probabilities"]["purchase_14d"] for p in answer["predictions"]]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_it_has_no_rights_and_no_tools(image: Image) -> None:
    found = image.python(
        "import json, os, pathlib, shutil\n"
        "def denied(path):\n"
        "    try: pathlib.Path(path).write_text('x')\n"
        "    except OSError: return True\n"
        "names = ['/x', '/opt/forecart/x', '/opt/forecart/bento/src/model/x', '/etc/x']\n"
        "tools = [t for t in ('gcc', 'cc', 'g++', 'make', 'git', 'uv') if shutil.which(t)]\n"
        "left = [str(p) for p in map(pathlib.Path, ('/pip', '/pip.conf', '/requirements.txt',\n"
        "        '/opt/forecart/venv/bin/pip')) if p.exists()]\n"
        "print(json.dumps({'uid': os.getuid(), 'gid': os.getgid(), 'tools': tools, 'left': left,\n"
        "    'denied': all(map(denied, names)), 'groups': os.getgroups(),\n"
        "    'caps': [l.split()[1] for l in open('/proc/self/status') if l.startswith('CapEff')]}))"
    )
    assert found["uid"] == found["gid"] == 10001
    assert 0 not in found["groups"]
    assert found["denied"] is True
    assert found["tools"] == found["left"] == []
    assert found["caps"] == ["0000000000000000"]


def test_its_torch_is_the_cpu_build(image: Image) -> None:
    code = "import json, torch; print(json.dumps(torch.version.cuda))"
    assert image.python(code) is None


def test_its_labels_and_materials_tell_what_is_in_it(image: Image) -> None:
    described = json.loads(call(*image.podman("image", "inspect", TAG)))[0]
    labels, config = described["Labels"], described["Config"]
    assert labels["forecart.model"] == digest_directory(image.project / "models/gpt")
    assert labels["forecart.bento"] == digest_directory(image.project / "build/bento")
    assert config["User"] == "10001:10001"
    bill = image.python("print(open('/opt/forecart/sbom.cdx.json').read())")
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    found = {c["purl"].split("?")[0].partition("@")[0] for c in bill["components"]}
    wanted = (image.project / "build/bento/env/python/requirements.txt").read_text().split()
    assert {f"pkg:pypi/{line.split('==')[0]}" for line in wanted} <= found
    assert {"pkg:deb/debian/libc6", "pkg:generic/python"} <= found
    refs = [c["bom-ref"] for c in bill["components"]]
    assert len(refs) == len(set(refs))


def test_pips_configuration_stays_out(image: Image) -> None:
    history = call(*image.podman("history", "--no-trunc", "--format", "json", TAG))
    described = call(*image.podman("image", "inspect", TAG))
    for word in ("find-links", "extra-index-url =", "file:///"):
        assert word not in history + described
    found = image.python(
        "import json, pathlib\n"
        "print(json.dumps([str(p) for root in ('/etc', '/opt/forecart')"
        " for p in pathlib.Path(root).rglob('pip.conf')]))"
    )
    assert found == []
