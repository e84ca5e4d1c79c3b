"""``mil cache``: what the stage cache holds, and clearing it."""

from __future__ import annotations

from typing import Annotated

import typer

from mil_cli.errors import CacheError


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove entries (work under way is left alone).")] = False,
    older_than: Annotated[
        float | None, typer.Option("--older-than", metavar="DAYS", help="Only entries not used for so many days.")
    ] = None,
) -> None:
    """Show the entries and size of the stage cache, or clear it."""
    from mil_cli.cli import console
    from mil_cli.cli.progress import progress_on
    from mil_cli.run.cache import Cache, default_location

    if older_than is not None and not older_than >= 0:  # NaN, too, which would take in every entry
        hint = "write 0 or more days"
        raise CacheError(
            "an age is a number of days, and cannot be negative", where="--older-than", value=older_than, hint=hint
        )
    store = Cache(default_location(), progress_on(console.messages()))
    seconds = 0.0 if older_than is None else older_than * 86400
    if clear:
        count, size = store.clear(older_than_seconds=seconds)
        typer.echo(f"removed {count} entries, {megabytes(size)}")
        return
    listed = [entry for entry in store.entries() if entry.age_seconds >= seconds]
    for entry in listed:
        typer.echo(f"{megabytes(entry.size_bytes):>10}  {age(entry.age_seconds):>7}  {entry.kind:<10}  {entry.label}")
    typer.echo(f"{len(listed)} entries, {megabytes(sum(entry.size_bytes for entry in listed))}, in {store.location}")


def megabytes(size: int) -> str:
    """Write bytes as megabytes."""
    return f"{size / 1e6:.1f} MB"


def age(seconds: float) -> str:
    """Write an age in the largest unit that fits: ``5 min``, ``3 h``, ``12 d``."""
    if seconds < 3600:
        return f"{int(seconds // 60)} min"
    return f"{int(seconds // 3600)} h" if seconds < 86400 else f"{int(seconds // 86400)} d"
