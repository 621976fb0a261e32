"""Building an image: what the builder is told, without one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipelines import container
from pipelines.config import Builder
from pipelines.errors import UserError
from pipelines.io import write_json, write_text


def write_bento(root: Path) -> None:
    write_json(
        root / "build/bento/bento.yaml",
        {"name": "forecart", "version": "1", "labels": {"model": "sha256:1"}},
    )
    write_text(root / "build/bento/env/python/requirements.txt", "torch==2.13.0\n")
    write_text(root / "deploy/container/Containerfile", "FROM scratch\n")


def test_pip_is_understood_with_its_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "index/simple").mkdir(parents=True)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "ca.pem").touch()
    found = container.parse_pip_config(
        f"global.cert='{tmp_path / 'ca.pem'}'\n"
        "global.quiet='1'\n"
        f"global.extra-index-url='file://{tmp_path / 'index/simple'} https://example.com/simple'\n"
        "global.find-links='/nowhere'\n"
        f":env:.find-links='{tmp_path / 'wheels'}'\n"
    )
    assert set(found.paths) == {tmp_path / "ca.pem", tmp_path / "index", tmp_path / "wheels"}
    assert found.options["find-links"] == str(tmp_path / "wheels")
    assert "quiet" not in found.to_text()
    assert found.to_text().startswith("[global]\ncert = ")


def test_pips_configuration_reaches_the_build_as_secret_and_mounts(tmp_path: Path) -> None:
    plan = {
        "context": tmp_path,
        "tag": "a:1",
        "arguments": {"BASE_IMAGE": "b"},
        "labels": {"x": "y"},
        "secret": tmp_path / "s",
        "mounts": [tmp_path / "w"],
    }
    command = container.plan_build(Builder.PODMAN, **plan)
    assert command[:2] == ["podman", "build"]
    assert f"id=pip,src={tmp_path / 's'}" in command
    assert f"{tmp_path / 'w'}:{tmp_path / 'w'}:ro" in command
    assert command[-1] == str(tmp_path)
    # docker has no such option, and refuses the build for it.
    assert "--volume" not in container.plan_build(Builder.DOCKER, **plan)


def test_a_model_that_is_not_the_champion_is_not_shipped_without_a_word(tmp_path: Path) -> None:
    model, other = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    assert "not judged" in container.tell_standing(tmp_path, model)
    for candidate, passed, told in [
        (other, True, "not judged"),
        (model, False, "the gate refused it"),
        (model, True, "forecart promote"),
    ]:
        check = {"name": "validation", "passed": passed, "why": "it is so"}
        verdict = {"candidate": candidate, "champion": None, "passed": passed, "checks": [check]}
        write_json(tmp_path / container.VERDICT, verdict)
        assert told in container.tell_standing(tmp_path, model)
    write_json(tmp_path / "champion.json", {"digest": model, "version": 1, "verdict": None})
    assert container.tell_standing(tmp_path, model) == ""


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"tag": "a", "base_image": "b", "builder": Builder.AUTO, "torch_index": ""}
    with pytest.raises(UserError, match=r"no Bento; run: dvc repro"):
        container.containerize(tmp_path, **options)
    write_bento(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install docker or podman or buildah"):
        container.containerize(tmp_path, **options)


def test_a_failed_build_is_told_with_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bento(tmp_path)
    fake = tmp_path / "bin/podman"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\n[ $1 = --version ] || { echo no space left; exit 1; }\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    with pytest.raises(UserError, match="no space left"):
        container.containerize(
            tmp_path, tag="a", base_image="b", builder=Builder.PODMAN, torch_index=""
        )


def test_a_moments_trouble_of_the_machine_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel refuses only now is asked for again, and nothing else is."""
    write_bento(tmp_path)
    tries = tmp_path / "tries"
    fake = tmp_path / "bin/podman"
    fake.parent.mkdir()
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")

    def build(trouble: str, until: int) -> int:
        """Return how often it was tried where each of the first tries ends with a trouble."""
        tries.write_text("")
        fake.write_text(
            "#!/bin/sh\n"
            "[ $1 = image ] && echo '[{\"Size\": 1}]'\n"
            "[ $1 = build ] || exit 0\n"
            f"echo >>{tries}\n"
            f"[ $(wc -l <{tries}) -gt {until} ] || {{ echo '{trouble}'; exit 1; }}\n"
        )
        fake.chmod(0o755)
        try:
            container.containerize(
                tmp_path, tag="a", base_image="b", builder=Builder.PODMAN, torch_index=""
            )
        except UserError as error:
            assert trouble in str(error)
        return len(tries.read_text().splitlines())

    busy = "Close_Fd sealing memfd copy: Device or resource busy"
    assert build(busy, until=1) == 2
    assert build(busy, until=9) == 3
    assert build("no space left", until=9) == 1


def test_the_next_step_binds_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service without keys is for this machine alone."""
    write_bento(tmp_path)
    fake = tmp_path / "bin/podman"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho '[{\"Size\": 123000000}]'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    said = container.containerize(
        tmp_path, tag="a", base_image="b", builder=Builder.PODMAN, torch_index=""
    )
    assert "123 MB" in said
    assert said.endswith("-p 127.0.0.1:3000:3000")


@pytest.mark.parametrize(
    ("program", "answer", "size"),
    [
        (Builder.PODMAN, '[{"Size": 123}]', 123),
        (Builder.BUILDAH, '[{"size": "1.14 GB"}]', 1_140_000_000),
    ],
)
def test_sizes_are_read(
    program: Builder, answer: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout=answer)
    )
    assert container.read_size(program, "a") == size
