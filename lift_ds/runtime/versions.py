"""Versions of installed packages, read without importing them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of each package, "not installed" where there is none.

    Args:
        packages: names of distributions.
    """
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a folder, without an install
            found[package] = "not installed"
    return found
