"""The Weights & Biases tracker, by default offline.

`wandb sync RUN/wandb/offline-run-*` uploads such a run later.
"""

from __future__ import annotations

import netrc
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast
from urllib.parse import urlsplit

from loraplus_hydra.errors import UserError
from loraplus_hydra.io.files import write_text
from loraplus_hydra.io.result import OK, PRUNED, WAITING
from loraplus_hydra.training.trackers.tracker import TrackedRun, Tracker, read_id

MODES = ("offline", "online")
ID = "wandb_id"  # a file in the run's folder; a resumed run keeps its ID
_NO_KEY = (
    "mode=online needs an account, but there is no key for {host}: set WANDB_API_KEY, run `wandb login`, or use "
    "mode=offline and upload the run later (wandb sync)"
)


@dataclass
class WandB(Tracker):
    """A tracker that logs to a wandb run, in the sweep's group.

    The tracker never prompts. A missing key is an error.
    """

    needs: ClassVar[tuple[str, ...]] = ("wandb",)
    extra: ClassVar[str] = "wandb"

    project: str = "loraplus_hydra"
    entity: str | None = None
    mode: str = "offline"
    tags: list[str] | None = None
    _run: Any = field(default=None, init=False)

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
            # The key has been removed since the check. On a terminal wandb would prompt for a key.
            raise UserError(_NO_KEY.format(host=host))
        known = read_id(run.folder / ID) if run.resumed_at else None
        run_id = known or uuid.uuid4().hex[:12]
        write_text(run.folder / ID, run_id + "\n")
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=cast("Any", self.mode),  # wandb's Literal, which the check compares with
            id=run_id,
            name=run.name,
            group=run.group,
            tags=self.tags or [],
            config=dict(run.config),
            dir=str(run.folder),
            resume="allow" if self.mode == "online" else None,
            reinit="create_new",  # doesn't change another session of the process
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)  # if wandb already has values for the step, it keeps the old values

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        try:
            self._run.summary.update({"status": status, **{f"final/{name}": value for name, value in metrics.items()}})
        finally:
            self._run.finish(exit_code=0 if status in (OK, WAITING, PRUNED) else 1)


def _host_without_key() -> str:
    """Return the server's host name if there is no key for it, otherwise an empty string.

    Keys are searched in the environment, netrc and wandb's settings.
    """
    import wandb

    settings = wandb.setup().settings
    host = urlsplit(settings.base_url).hostname or settings.base_url
    if settings.api_key or any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return ""
    configured = os.environ.get("NETRC")
    for file in [configured] if configured else ["~/.netrc", "~/_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(Path(file).expanduser())).authenticators(host) is not None:
                return ""
    return host
