"""The package index: where it is, and which file it lists under a name.

The index is PyPI unless pip is told otherwise: ``PIP_INDEX_URL`` first, then ``index-url`` of pip's
own configuration (``pip config``). ``PIP_CERT`` (or pip's ``cert``) names the certificates to
trust; proxies and ``REQUESTS_CA_BUNDLE`` are read by requests itself. Only indexes spoken to over
HTTP count: pip's ``find-links`` and ``extra-index-url`` are not read.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from stack.errors import StackError

if TYPE_CHECKING:
    import requests
    from pypi_simple import DistributionPackage

# Seconds to connect, and seconds without a byte.
TIMEOUT = (15.0, 60.0)


@functools.cache
def pip_config() -> Mapping[str, str]:
    """What ``pip config list`` prints, by key; empty where this Python has no pip."""
    result = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    lines = result.stdout.splitlines() if result.returncode == 0 else []
    pairs = (line.partition("=") for line in lines)
    return {key: value.strip("'\"") for key, _, value in pairs if value}


def _pip_option(name: str) -> str | None:
    """Option ``name`` (``index-url``) as pip sees it: the environment, then its files."""
    from_environment = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    if from_environment:
        return from_environment
    config = pip_config()
    return config.get(f"download.{name}") or config.get(f"global.{name}")


def without_credentials(url: str) -> str:
    """``url`` with any ``user:password@`` taken out, fit to be printed."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def index_url() -> str:
    """The simple index to ask.

    Raises:
        StackError: pip's ``index-url`` is not an HTTP address.
    """
    from pypi_simple import PYPI_SIMPLE_ENDPOINT

    url = _pip_option("index-url") or PYPI_SIMPLE_ENDPOINT
    if urlsplit(url).scheme not in ("http", "https"):
        raise StackError(
            f"index-url is {without_credentials(url)!r}, expected an http or https address",
            "set PIP_INDEX_URL to a simple index, or put the file into the cache folder yourself",
        )
    return url


def session() -> requests.Session:
    """A session that trusts the certificates that pip is told to trust."""
    import requests

    made = requests.Session()
    made.headers["User-Agent"] = "vllm-sm12x-stack"
    made.verify = _pip_option("cert") or True
    return made


def listed(project: str, http: requests.Session) -> list[DistributionPackage]:
    """Every file that the index lists for ``project``.

    Raises:
        StackError: The index does not know the project, or answers with something else.
        requests.RequestException: The index was not reached; the caller retries.
    """
    from pypi_simple import (
        NoSuchProjectError,
        PyPISimple,
        UnsupportedContentTypeError,
        UnsupportedRepoVersionError,
    )

    url = index_url()
    hint = f"asked {without_credentials(url)}; is PIP_INDEX_URL or pip's index-url right?"
    try:
        return PyPISimple(endpoint=url, session=http).get_project_page(project, TIMEOUT).packages
    except NoSuchProjectError:
        raise StackError(f"the package index has no project {project!r}", hint) from None
    except (UnsupportedContentTypeError, UnsupportedRepoVersionError, ValueError) as error:
        # requests' own errors are ValueErrors at times (InvalidURL, JSONDecodeError).
        raise StackError(
            f"the package index gave no list of files for {project!r} ({type(error).__name__})",
            hint,
        ) from None


def find(project: str, filename: str, http: requests.Session) -> DistributionPackage:
    """The index's entry for one file of ``project``.

    Raises:
        StackError: The index does not list the file.
        requests.RequestException: The index was not reached; the caller retries.
    """
    for package in listed(project, http):
        if package.filename == filename:
            return package
    raise StackError(
        f"{filename} is not on the package index",
        f"asked {without_credentials(index_url())}; a mirror may lack it: see PIP_INDEX_URL",
    )
