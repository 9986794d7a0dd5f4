"""A middleware for ``vllm serve`` that says which modules a request for an answer imported."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROUTES = ("/v1/completions", "/v1/chat/completions")


class ImportLog:
    """Prints a line a request. Of requests side by side each has what all of them imported."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass the request on; look before it and after its last byte."""
        before = set(sys.modules)
        await self.app(scope, receive, send)
        if scope.get("path") in ROUTES:
            print("imported by a request:", json.dumps(sorted(set(sys.modules) - before)))


def imported(log: Path) -> list[list[str]]:
    """The modules of each request, from the server's log."""
    said = log.read_text(encoding="utf-8", errors="replace")
    return [json.loads(one) for one in re.findall(r"imported by a request: (\[.*\])", said)]
