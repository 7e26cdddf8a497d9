"""Where results go: whether they can be written there, asked before a run and not after it."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ds_decoupled.errors import ConfigError


def check_folder(option: str, folder: str | Path) -> None:
    """Make ``folder``, where there is none, and write a file there that is gone again.

    Raises:
        ConfigError: if that does not work.
    """
    path = Path(folder)
    with _refused(option, folder, "nothing can be written there"):
        if path.exists() and not path.is_dir():
            raise ConfigError(option, str(folder), "it is a file, and a folder is to be written", "Give another name")
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"0")


def check_file(option: str, file: str | Path) -> None:
    """Like :func:`check_folder`, for a file, which is not touched if it is there."""
    path = Path(file)
    with _refused(option, file, "it cannot be written"):
        if path.is_dir():
            raise ConfigError(option, str(file), "it is a folder, and a file is to be written", "Give the name of a file")
        if path.exists():
            if not path.is_file():
                raise ConfigError(option, str(file), "it is no ordinary file", "Give another name")
            os.close(os.open(path, os.O_WRONLY))
        else:  # the name itself may be too long
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            path.unlink()


def check_picture(option: str, file: str | Path) -> None:
    """Like :func:`check_file`; the ending must name a format that matplotlib writes here."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ending, canvas = Path(file).suffix.removeprefix("."), FigureCanvasAgg(Figure((1, 1)))
    try:
        canvas.print_figure(io.BytesIO(), format=ending or "none")  # some formats need programs that may not be here
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(option, str(file), f"no picture can be written with this ending ({reason})",
                          "End it with .png, .svg or .pdf") from error
    check_file(option, file)


@contextmanager
def _refused(option: str, place: str | Path, what: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(option, str(place), f"{what} ({reason})", "Give a place that you may write to") from error
