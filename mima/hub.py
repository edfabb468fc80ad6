"""The hub: whether it can be reached, and a repository to publish to."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # not in __all__

from mima.errors import MimaError

# RuntimeError: a large file that was not taken
REFUSALS = (
    *(HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, ConnectionError, RuntimeError),
)
TIMEOUT = 10.0
"""Seconds to wait for a connection."""


def unreachable() -> str | None:
    """Why the hub cannot be reached, or None where it can.

    huggingface_hub itself tries for a minute before it says so. Where there is a proxy, only that
    knows: then the answer is None.
    """
    if constants.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE)"
    address = urlsplit(constants.ENDPOINT)
    if address.hostname is None:
        return f"{address.geturl()!r} is no address (HF_ENDPOINT)"
    if getproxies():
        return None
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=TIMEOUT).close()
    except OSError as error:
        return f"{address.hostname}: {error.strerror or error}"
    return None


def is_hub_id(name: str) -> bool:
    """Whether a name is of the form owner/name and what the hub allows."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


class Repository:
    """A model's repository on the hub, to publish to.

    Args:
        repo_id: ``owner/name``; made where it does not exist.
        private: whether a new one is private; None leaves it to the owner's settings.
        token: of the hub; None takes the one that ``hf auth login`` stored.

    Raises:
        MimaError: the hub cannot be reached, or refuses.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> None:
        self._name = repo_id
        problem = unreachable()
        if problem:
            raise MimaError(f"hub: cannot publish {repo_id!r}: {problem}")
        self._api = HfApi(token=token)
        with self._explained():
            self._name = self._api.create_repo(repo_id, private=private, exist_ok=True).repo_id

    def upload(
        self,
        folder: str | Path,
        *,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload with mima",
    ) -> str:
        """Publish what a folder holds.

        Args:
            folder: the folder.
            revision: a branch, made from the main one where it is missing; default the main one.
            create_pr: open a pull request instead of committing.
            commit_message: of the commit.

        Returns:
            The commit's address.

        Raises:
            MimaError: the hub refuses.
        """
        with self._explained():
            if revision is not None and not create_pr:
                self._api.create_branch(self._name, branch=revision, exist_ok=True)
            commit = self._api.upload_folder(
                repo_id=self._name,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )
        return str(commit.commit_url)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except REFUSALS as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise MimaError(f"hub: cannot publish {self._name!r}: {first}") from error
