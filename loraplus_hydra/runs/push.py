"""Upload of an export to a hub, only when the command line names a repository.

The endpoint and the token are huggingface_hub's own (HF_ENDPOINT, HF_TOKEN, `hf auth login`).
"""

from __future__ import annotations

import glob
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from loraplus_hydra.errors import ConfigErrors, Problem, first_line

KEY = "push"
_EMPTY = frozenset({".gitattributes"})  # files of a repository to which nothing was uploaded


def name_problems(repository: str) -> list[Problem]:
    """Return a Problem if `repository` isn't a name that a hub takes, or if nothing can be sent."""
    fix = "write owner/name, with letters, digits, '-', '_' and '.'"
    if repository.count("/") != 1 or not all(repository.split("/")):
        return [Problem(KEY, f"'{repository}' isn't a repository's name", fix)]
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        return [Problem(KEY, first_line(error), fix)]
    if is_offline_mode():
        return [Problem(KEY, "HF_HUB_OFFLINE is set, so nothing can be sent", "unset it")]
    if get_token() is None:
        return [Problem(KEY, "there is no token for the hub", "use `hf auth login`, or set HF_TOKEN")]
    return []


def check_repository(repository: str, *, private: bool) -> None:
    """Raise ConfigErrors unless `repository` is new, or empty and as private as asked.

    Only its name and the token are sent.
    """
    _refuse_content(HfApi(), repository, private=private)


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload the files of an export's folder to `repository`, and return its address.

    The repository is made if it doesn't exist. Only files that are in the folder now are uploaded, no subfolders and no
    links. Raises ConfigErrors; the folder stays.
    """
    files = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    again = ["hf", "upload", repository, str(folder), *(["--private"] if private else [])]
    stays = f"; the export stays in {folder}, and `{shlex.join(again)}` uploads it later"
    api = HfApi()
    with _explained(repository, stays):
        api.create_repo(repository, private=private, exist_ok=True)
    _refuse_content(api, repository, private=private, stays=stays)  # it may have been there already
    with _explained(repository, stays):
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in files],
            commit_message="Upload an export of loraplus_hydra",
        )
    return str(done.repo_url)


def _refuse_content(api: HfApi, repository: str, *, private: bool, stays: str = "") -> None:
    with _explained(repository, stays):
        try:
            found = api.model_info(repository)
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:  # the hub's answer to a token that it doesn't know
                raise
            return
    files = sorted({file.rfilename for file in found.siblings or ()} - _EMPTY)
    if files:
        what = f"{repository} exists and has files ({', '.join(files[:3])}){stays}"
        raise ConfigErrors([Problem(KEY, what, "name a new repository")])
    if private and not found.private:
        what = f"{repository} exists and is open to everyone{stays}"
        raise ConfigErrors([Problem(KEY, what, "name a new repository, or set private=false")])


@contextmanager
def _explained(repository: str, stays: str) -> Iterator[None]:
    """Turn errors of the hub and of the network into ConfigErrors."""
    try:
        yield
    except Exception as error:  # huggingface_hub's HTTP library has errors of its own, which differ between versions
        what, fix = _cause(error, repository)
        raise ConfigErrors([Problem(KEY, what + stays, fix)]) from error


def _cause(error: Exception, repository: str) -> tuple[str, str]:
    if not isinstance(error, HfHubHTTPError):
        return f"the hub can't be reached: {first_line(error)}", "check the network and HF_ENDPOINT"
    status = error.response.status_code
    if status in (401, 403):
        fix = "use a token that may write there (`hf auth login`, HF_TOKEN)"
        return f"the hub doesn't let this token write {repository} (status {status})", fix
    return f"the hub refused {repository} (status {status}): {first_line(error)}", "name another repository"
