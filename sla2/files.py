"""Files that are never seen half written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[Path], object], *, suffix: str | None = None
) -> None:
    """Calls `write` with a temporary path beside `path`, then renames the result to `path`.

    An error, from `write` or here, leaves an old file as it was, and nothing beside it. A link goes
    on pointing to the file it names; permissions are those of any new file. suffix: the temporary
    file's, by default that of `path`, by which some writers choose the format.
    """
    target = Path(os.path.realpath(path))
    ending = target.suffix if suffix is None else suffix
    # Not tempfile: its files can be read by their owner alone, and the rename would keep that.
    temporary = target.with_name(f".{target.stem}-{secrets.token_hex(4)}{ending}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())  # else a power failure could keep the rename, not the data
        temporary.chmod(mode)  # writers may put a file of their own in its place
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
