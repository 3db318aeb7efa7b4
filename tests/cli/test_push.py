"""`export push=...`: what is sent to a hub, when, and what is told if it can't be sent; the hub is a local server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.conftest import Finished
from tests.support.finished_runs import finished
from tests.support.hub import TOKEN, Hub, local_hub

__all__ = ["finished"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with local_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture
def export(finished: Callable[[str], Path], cli: Callable[..., Finished]) -> Callable[..., Finished]:
    return lambda *words: cli("export", str(finished("sft")), "merge=false", *words)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folder_is_uploaded_privately(export: Callable[..., Finished], hub: Hub) -> None:
    ended = export("to=out", "push=me/my-adapter")
    assert ended.status == 0, ended.err
    assert hub.files["me/my-adapter"] == {".gitattributes": b"", **content(Path("out"))}
    assert hub.private == {"me/my-adapter": True}
    assert "Uploading to me/my-adapter (private)" in ended.out
    assert f"It is at {hub.url}/me/my-adapter." in ended.out
    assert export("to=open", "push=me/open", "private=false").status == 0
    assert hub.private["me/open"] is False
    assert hub.files["me/open"].keys() == content(Path("open")).keys() | {".gitattributes"}


def test_without_push_nothing_is_asked_or_sent(export: Callable[..., Finished], hub: Hub) -> None:
    assert export("to=out").status == 0
    assert export("to=for", "target=hf").status == 0
    assert hub.requests == []


def test_empty_repository_is_filled_and_another_is_left_alone(export: Callable[..., Finished], hub: Hub) -> None:
    hub.files["me/empty"], hub.private["me/empty"] = {".gitattributes": b""}, True
    assert export("to=out", "push=me/empty").status == 0
    assert hub.files["me/empty"].keys() > content(Path("out")).keys()
    hub.files["me/used"], hub.private["me/used"] = {"model.safetensors": b"mine"}, True
    ended = export("to=other", "push=me/used")
    assert ended.status == 1
    assert "push: me/used exists and has files (model.safetensors); name a new repository" in ended.err
    assert not Path("other").exists(), "known before the export"
    assert hub.files["me/used"] == {"model.safetensors": b"mine"}
    hub.files["me/public"], hub.private["me/public"] = {}, False
    ended = export("to=other", "push=me/public")
    assert "push: me/public exists and is open to everyone; name a new repository, or set private=false" in ended.err
    assert hub.files["me/public"] == {}


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/api/repos/create", 403, "the hub doesn't let this token write me/new (status 403)"),
        ("/api/repos/create", 400, "the hub refused me/new (status 400)"),
        ("/commit/", 403, "the hub doesn't let this token write me/new (status 403)"),
    ],
)
def test_export_stays_if_the_hub_refuses_it(
    path: str, status: int, told: str, export: Callable[..., Finished], hub: Hub
) -> None:
    hub.refusals[path] = status
    ended = export("to=out", "push=me/new")
    assert ended.status == 1
    assert f"push: {told}" in ended.err
    assert "the export stays in out, and `hf upload me/new out --private` uploads it later" in ended.err
    assert "Traceback" not in ended.err
    assert "adapter_model.safetensors" in content(Path("out"))
    assert hub.files.get("me/new", {}).keys() <= {".gitattributes"}


def test_what_cannot_work_is_known_before_the_export(
    export: Callable[..., Finished], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*words: str) -> str:
        ended = export("to=out", *words)
        assert ended.status == 1
        assert not Path("out").exists()
        assert "Traceback" not in ended.err
        return ended.err

    for name in ("me", "me/my/adapter", "/adapter", "me/", "''"):
        assert "isn't a repository's name; write owner/name" in told(f"push={name}"), name
    assert "push: " in told("push=me/a--b")
    assert "push: " in told("push='me/my adapter'")
    assert "private: nothing is uploaded; set push=owner/name, or leave it out" in told("private=false")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "push: HF_HUB_OFFLINE is set, so nothing can be sent" in told("push=me/new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "push: the hub doesn't let this token write me/new (status 401)" in told("push=me/new")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
    assert "push: there is no token for the hub; use `hf auth login`, or set HF_TOKEN" in told("push=me/new")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "push: the hub can't be reached: " in told("push=me/new")


@pytest.mark.slow
def test_endpoint_of_the_environment_is_used(finished: Callable[[str], Path], tmp_path: Path) -> None:
    words = ("export", str(finished("sft")), "merge=false", f"to={tmp_path / 'out'}", "push=me/new")
    command = [sys.executable, "-m", "loraplus_hydra", *words]
    with local_hub() as served:
        settings = {**os.environ, "HF_ENDPOINT": served.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert served.files["me/new"].keys() == content(tmp_path / "out").keys() | {".gitattributes"}
