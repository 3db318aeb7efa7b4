"""Weights & Biases, offline unless the config says otherwise: `wandb sync RUN/wandb/offline-run-*` uploads it later."""

from __future__ import annotations

import netrc
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from loraplus_hydra.errors import UserError
from loraplus_hydra.io.files import write_text
from loraplus_hydra.io.result import OK, PRUNED
from loraplus_hydra.training.trackers.tracker import TrackedRun, Tracker, remembered

MODES = ("offline", "online")
ID = "wandb_id"  # in the run's folder: a resumed run goes on under it
_NO_KEY = (
    "mode=online needs an account, and there is no key for {host} here: set WANDB_API_KEY or run `wandb login`, or use "
    "mode=offline, which can be uploaded later (wandb sync)"
)


class WandB(Tracker):
    """A run of wandb's with the sweep as its group and the config as its config; it never asks for anything."""

    needs: ClassVar[tuple[str, ...]] = ("wandb",)
    extra: ClassVar[str] = "wandb"

    def __init__(
        self,
        project: str = "loraplus_hydra",
        entity: str | None = None,
        mode: str = "offline",
        tags: list[str] | None = None,
    ) -> None:
        self.project = project
        self.entity = entity
        self.mode: Any = mode
        self.tags = tags or []
        self._run: Any = None

    @classmethod
    def problems(cls, **arguments: Any) -> list[str]:
        if missing := super().problems(**arguments):
            return missing
        mode = arguments.get("mode", "offline")
        if mode not in MODES:
            return [f"mode={mode}: it must be one of {', '.join(MODES)}"]
        if mode == "online" and (host := _host_without_key()):
            return [_NO_KEY.format(host=host)]
        return []

    def start(self, run: TrackedRun) -> None:
        import wandb

        if self.mode == "online" and (host := _host_without_key()):
            raise UserError(_NO_KEY.format(host=host))  # gone since the check; wandb would ask on a terminal
        known = remembered(run.folder / ID) if run.resumed_at else None
        name = known or uuid.uuid4().hex[:12]
        write_text(run.folder / ID, name + "\n")
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            id=name,
            name=run.name,
            group=run.group,
            tags=self.tags,
            config=dict(run.config),
            dir=str(run.folder),
            resume="allow" if self.mode == "online" else None,
            reinit="create_new",  # beside whatever session the process has, and without becoming its global one
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)  # of a step that is there already wandb keeps what it has

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        try:
            self._run.summary.update({"status": status, **{f"final/{name}": value for name, value in metrics.items()}})
        finally:
            self._run.finish(exit_code=0 if status in (OK, PRUNED) else 1)


def _host_without_key() -> str:
    """The server's name, if nothing here (environment, netrc, wandb's settings) has a key for it; else nothing."""
    import wandb

    settings = wandb.setup().settings
    host = urlsplit(settings.base_url).hostname or settings.base_url
    if settings.api_key or any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return ""
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(file.expanduser())).authenticators(host) is not None:
                return ""
    return host
