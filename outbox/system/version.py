"""The version of the distribution."""

from __future__ import annotations

from pathlib import Path

__all__ = ["installed_version"]


def installed_version() -> str:
    """Return the version of the installed distribution, or that of a checkout that is not."""
    from importlib import metadata  # slow to import, and seldom needed

    try:
        return metadata.version("outbox-events")
    except metadata.PackageNotFoundError:
        import tomllib

        project = Path(__file__).parents[2] / "pyproject.toml"
        version: str = tomllib.loads(project.read_text())["project"]["version"]
        return version
