"""Files that hold the figures of a long run: whole at any moment, however the run ends."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class JsonFile:
    """A file with the newest figures of a long run; without a path it does nothing.

    Args:
      path: where; its directory is made, and an older file stands until the first figures replace it. A
        symbolic link stays one, and the file that it names is replaced. A device or a pipe (``/dev/null``,
        ``/dev/stderr``) is not replaced: figures are written into it, each time all of them.
      option: the option that named it, for messages.
      kind: what that option names, the file itself or the directory that it is in.

    Raises:
      JsonFile.unwritable: it cannot be written.
    """

    unwritable: type[Exception] = ValueError

    def __init__(self, path: str | Path | None, *, option: str = "--json", kind: str = "file") -> None:
        self._option, self._kind = option, kind
        self._path = None if path is None else Path(path).expanduser()
        if self._path is not None and not _is_special(self._path):
            with self._explained():
                self._path = Path(os.path.realpath(self._path))
                self._path.parent.mkdir(parents=True, exist_ok=True)
                new = not self._path.exists()
                self._path.open("a").close()
                if new:
                    self._path.unlink()  # a run that fails leaves no file without figures

    def write(self, document: Mapping[str, Any] | Sequence[Any]) -> None:
        """Puts the figures so far in place of the last ones."""
        if self._path is not None:
            text = json.dumps(document, indent=1) + "\n"
            with self._explained():
                if _is_special(self._path):
                    self._path.write_text(text, encoding="utf-8")
                    return
                partial = self._path.with_name(self._path.name + ".partial")
                partial.write_text(text, encoding="utf-8")
                os.replace(partial, self._path)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.unwritable(
                f"{self._option} must name a {self._kind} that can be written; {self._path}: {error.strerror}"
            ) from error


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, which a file put in its place would take from everybody."""
    return path.exists() and not path.is_file() and not path.is_dir()
