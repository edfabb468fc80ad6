"""The application: what every command shares before and after it runs."""

from __future__ import annotations

import errno
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mima._version import __version__
from mima.errors import MimaError, one_line

USAGE_ERROR, UNEXPECTED_ERROR, INTERRUPTED = 2, 1, 130
OF_PATHS = frozenset({errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR})
"""What the system says of a path that the user gave, whatever looks at it first."""
OF_WRITING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})
"""What it says of a disk, that to which a command's output is sent included."""


class _Commands(TyperGroup):
    """Turns exceptions into messages and exit codes, for every command alike."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # people append --debug to the command that has just failed
        if "--debug" in args:
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        from mima.console import show_error

        debug = bool(ctx.params.get("debug"))
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            show_error("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        # typer ends quietly where `| head` has read enough
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except MimaError as error:
            if debug:
                traceback.print_exc()
            show_error(str(error))
            raise typer.Exit(USAGE_ERROR) from error
        # this is the outermost frame: whatever went wrong is reported here and nowhere else
        except Exception as error:
            # usage errors know how to show themselves
            if hasattr(error, "format_message"):
                _explain_more_values(error)
                raise
            problem = _of_the_system(error)
            if problem is None or debug:
                traceback.print_exc()
            if problem is not None:
                show_error(problem)
                raise typer.Exit(USAGE_ERROR) from error
            show_error(
                "this is a bug in mima, not a mistake of yours; please report the lines above"
            )
            raise typer.Exit(UNEXPECTED_ERROR) from error


def _of_the_system(error: Exception) -> str | None:
    """One line where the system refuses a path, or to write; None of other errors."""
    if not isinstance(error, OSError):
        return None
    if error.errno in OF_WRITING:
        return f"{one_line(error.filename or 'cannot write')}: {error.strerror}"
    if error.errno not in OF_PATHS or error.filename is None:
        return None
    return f"{one_line(error.filename)}: {error.strerror}"


def _explain_more_values(error: Any) -> None:
    """Say of a word too many that options take one each: people write ``--concepts cat dog``."""
    if "unexpected extra argument" not in error.message or error.ctx is None:
        return
    repeated = [p.opts[0] for p in error.ctx.command.params if getattr(p, "multiple", False)]
    if repeated:
        error.message += (
            f"; {', '.join(repeated)} take one value and are repeated for more: "
            f"{repeated[0]} A {repeated[0]} B"
        )


app = typer.Typer(
    name="mima",
    cls=_Commands,
    help="Immunize text-to-image models against fine-tuning on many concepts at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    from mima.console import drop_unwritten

    try:
        app()
    finally:
        drop_unwritten()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mima {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Show tracebacks of all errors, and other libraries' messages."
        ),
    ] = False,
) -> None:
    from mima.console import quiet_third_parties, yield_cores

    yield_cores()
    if not debug:
        quiet_third_parties()
