"""Where a record's weights come from: a folder, a file, or the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .errors import WeightsError
from .records import BackboneRecord, RewardRecord


def resolve_source(
    record: BackboneRecord | RewardRecord,
    *,
    patterns: Sequence[str] | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Where a record's weights are on disk: its own ``path``, or a snapshot of its hub repository.

    A folder, of which only the files that match ``patterns`` are downloaded; the file itself when ``path`` is one, or
    when the record names a ``filename`` in a repository and no ``patterns`` are given. Raises :class:`WeightsError`
    that says what to do: accept a licence, log in, go online, or pass a local folder.
    """
    filename = getattr(record, "filename", None)
    if record.path is not None:
        place = Path(record.path)
        if not place.exists():
            owner = f" It is named by {record.source}." if record.source is not None else ""
            raise WeightsError(f"{record.name!r}: {str(place)!r} does not exist.{owner}")
        if filename and place.is_dir() and not (place / filename).is_file():
            raise WeightsError(f"{record.name!r}: there is no file {filename!r} in {str(place)!r}.")
        return place
    if record.repo is None:
        raise WeightsError(f"{record.name!r} names no weights; give its record a 'repo' or 'path', or pass a folder.")
    single = filename if patterns is None else None
    return _download(record, record.repo, single, patterns, token, local_files_only)


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub client raises, beside the errors of files."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RevisionResolutionError

    return HfHubHTTPError, HFValidationError, RevisionResolutionError, EntryNotFoundError, ConnectionError


def _download(
    record: BackboneRecord | RewardRecord,
    repo: str,
    filename: str | None,
    patterns: Sequence[str] | None,
    token: str | None,
    local_files_only: bool,
) -> Path:
    """One file, or a snapshot; whatever the hub client raises becomes a :class:`WeightsError`."""
    from huggingface_hub import hf_hub_download, snapshot_download

    failures: tuple[type[Exception], ...] = (*hub_errors(), OSError)
    try:
        if filename is not None:
            return Path(
                hf_hub_download(
                    repo, filename, revision=record.revision, token=token, local_files_only=local_files_only
                )
            )
        wanted = None if patterns is None else list(patterns)
        return Path(
            snapshot_download(
                repo,
                revision=record.revision,
                allow_patterns=wanted,
                token=token,
                local_files_only=local_files_only,
            )
        )
    except failures as error:
        raise WeightsError(_hub_message(record, error, local_files_only)) from error


def _hub_message(record: BackboneRecord | RewardRecord, error: Exception, local_files_only: bool) -> str:
    """One sentence on what went wrong at the hub and one on what to do."""
    from huggingface_hub import errors

    repo, instead = record.repo, "or pass a local folder with the files"
    page = f"https://huggingface.co/{repo}"
    what = f"cannot get {record.name!r} from the hub repository {repo!r}"
    offline = local_files_only or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if isinstance(error, errors.GatedRepoError):
        return f"{what}: it is gated. Accept the licence at {page}, then log in with 'hf auth login', {instead}."
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"{what}: no access token was found. Log in with 'hf auth login' or set HF_TOKEN, {instead}."
    if isinstance(error, errors.RepositoryNotFoundError):
        gated = f" It is gated: accept the licence at {page}." if record.gated else ""
        return f"{what}: it does not exist or is private.{gated} Check its name, log in ('hf auth login'), {instead}."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what}: it has no revision {record.revision!r}. Check the record's 'revision'."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{what}: it has no file {getattr(record, 'filename', None)!r}. Check the record's 'filename'."
    if isinstance(error, errors.HFValidationError):
        return f"{what}: that is not a valid id; write 'organisation/name'."
    unreachable = errors.LocalEntryNotFoundError | errors.RevisionResolutionError | ConnectionError
    if offline and isinstance(error, unreachable):
        switch = "local_files_only" if local_files_only else "HF_HUB_OFFLINE"
        return f"{what}: {switch} is set and it is not in the cache. Download it once while online, {instead}."
    if isinstance(error, unreachable):
        return f"{what}: the hub cannot be reached and it is not in the cache. Check the connection, {instead}."
    return f"{what}: {type(error).__name__}: {error}"
