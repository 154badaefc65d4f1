"""Where weights come from: a folder of this machine, or the URL of one in a store that fsspec reads.

What comes from a URL is kept in a cache folder, file by file, and asked for again only where the store says that it has
changed. Pickles are never fetched.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import uuid
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from opd_mesh.errors import ConfigError, ModelNotFoundError, UnavailableError

log = logging.getLogger(__name__)
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken")
_STATE = ".fetched.json"
# Of the cache, and not of the store.
_LOCAL_ERRORS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)


def default_cache_dir() -> Path:
    """``opd_mesh`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opd_mesh"


def local_folder(source: Path | str, cache_dir: Path | None = None) -> Path:
    """The folder itself, or a copy of what the URL holds.

    Raises:
        ModelNotFoundError: nothing usable at the URL.
        ConfigError: a scheme that fsspec does not know, or whose package is missing.
        UnavailableError: the store does not answer.
    """
    if isinstance(source, Path) or "://" not in source:
        return Path(source)
    return _fetch(source, (cache_dir or default_cache_dir()) / "fetched")


def _fetch(url: str, folder: Path) -> Path:
    import fsspec

    folder = folder / f"{PurePosixPath(url).name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    try:
        store, root = fsspec.core.url_to_fs(url)
        listing: dict[str, dict[str, Any]] = store.find(root, maxdepth=1, detail=True)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{url} cannot be read: {error}. fsspec needs a package per scheme: pip install 's3fs' for s3://, 'gcsfs' "
            "for gs://, 'adlfs' for az://"
        ) from error
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"there is nothing at {url}: {error}") from error
    except Exception as error:
        raise _unreachable(url, error) from error
    wanted = {PurePosixPath(path).name: path for path in listing if path.endswith(SUFFIXES)}
    if not wanted:
        raise ModelNotFoundError(f"{url} holds no {', '.join(SUFFIXES)} file; give the folder of a checkpoint")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # servers of one machine may share the cache
            _fetch_files(url, store, wanted, listing, folder)
    except OSError as error:
        if error.errno not in _LOCAL_ERRORS:
            raise
        raise ConfigError(
            f"{folder} cannot be written: {error.strerror}; set pool.cache_dir to a folder with room for {url}",
            field="pool.cache_dir",
        ) from error
    return folder


def _fetch_files(
    url: str, store: Any, wanted: dict[str, str], listing: dict[str, dict[str, Any]], folder: Path
) -> None:
    state_file = folder / _STATE
    try:
        state: dict[str, list[Any]] = json.loads(state_file.read_text())
    except (OSError, ValueError):
        state = {}
    fetched: dict[str, list[Any]] = {}
    for name, path in sorted(wanted.items()):
        # The store's own word for "changed": an ETag, a generation, a time.
        fetched[name] = [listing[path].get("size"), store.ukey(path)]
        target = folder / name
        if state.get(name) == fetched[name] and target.is_file() and target.stat().st_size == fetched[name][0]:
            continue
        log.info("fetching %s/%s (%s bytes)", url, name, fetched[name][0])
        partial = folder / f".{name}.{uuid.uuid4().hex}.partial"
        try:
            store.get_file(path, str(partial))
            os.replace(partial, target)  # readers that have the old file mapped keep it
        except Exception as error:
            if getattr(error, "errno", None) in _LOCAL_ERRORS:
                raise
            raise _unreachable(f"{url}/{name}", error) from error
        finally:
            partial.unlink(missing_ok=True)
    for gone in state.keys() - fetched.keys():
        (folder / gone).unlink(missing_ok=True)
    replacement = folder / f"{_STATE}.{uuid.uuid4().hex}"
    replacement.write_text(json.dumps(fetched))
    os.replace(replacement, state_file)


def _unreachable(url: str, error: Exception) -> UnavailableError:
    return UnavailableError(
        f"{url} cannot be fetched: {type(error).__name__}: {error}. Are address and credentials right?"
    )
