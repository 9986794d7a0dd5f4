"""The files of a made-up service, with faults planted in them, for the audit prompt."""

from __future__ import annotations

import random
from collections.abc import Iterator

_PARTS = "billing ledger mailer gateway archive search session upload report quota invite audit"
_VERBS = "load store remove list check merge export import rotate notify"
_HOSTS = "alder birch cedar elm hazel larch maple oak pine rowan"


def files(seed: str) -> Iterator[str]:
    """Listings without end, the same for the same seed; about one in three holds a fault."""
    draw = random.Random(f"audit {seed}")
    makers = (_settings, _handler, _unit, _policy)
    number = 0
    while True:
        number += 1
        yield draw.choice(makers)(draw, number)


def _settings(draw: random.Random, number: int) -> str:
    part, host = draw.choice(_PARTS.split()), draw.choice(_HOSTS.split())
    lines = [
        f"--- file: conf/{part}-{number}.toml",
        "[listen]",
        f'address = "{draw.choice(("127.0.0.1", "127.0.0.1", "0.0.0.0"))}"',
        f"port = {draw.randint(2000, 9999)}",
        f"tls = {draw.choice(('true', 'true', 'false'))}",
        "[database]",
        f'host = "{host}.internal"',
        f'user = "{part}"',
        f'password_file = "/run/secrets/{part}"'
        if draw.random() < 0.7
        else f'password = "{part}{draw.randint(10, 99)}"',
        f"pool = {draw.randint(2, 64)}",
        "[limits]",
        f"requests_per_minute = {draw.choice((60, 120, 600, 0))}",
        f"max_body_bytes = {draw.choice((65536, 1048576, 1073741824))}",
    ]
    return "\n".join(lines)


def _handler(draw: random.Random, number: int) -> str:
    part, verb = draw.choice(_PARTS.split()), draw.choice(_VERBS.split())
    query = draw.choice(
        (
            f'rows = db.run("SELECT * FROM {part} WHERE owner = ?", [request.user])',
            f"rows = db.run(f\"SELECT * FROM {part} WHERE name = '{{request.name}}'\")",
        )
    )
    check = draw.choice(
        (
            f'    require(request.user, "{part}:{verb}")',
            "    # permission is checked by the caller",
        )
    )
    path = draw.choice(("open(safe_join(BASE, request.name))", "open(BASE + '/' + request.name)"))
    return "\n".join(
        [
            f"--- file: src/{part}/{verb}_{number}.py",
            f"def {verb}_{part}(request, db):",
            f'    """Answer {verb} for {part} {number}."""',
            check,
            f"    {query}",
            f"    with {path} as file:",
            "        seen = file.read()",
            f'    log.info("{verb} {part}: %d rows, %d bytes", len(rows), len(seen))',
            "    return render(rows, seen)",
        ]
    )


def _unit(draw: random.Random, number: int) -> str:
    part = draw.choice(_PARTS.split())
    user = draw.choice((part, part, "root"))
    return "\n".join(
        [
            f"--- file: units/{part}-{number}.service",
            "[Service]",
            f"User={user}",
            f"ExecStart=/usr/lib/{part}/serve --workers {draw.randint(1, 16)}",
            f"Restart={draw.choice(('on-failure', 'always', 'no'))}",
            f"NoNewPrivileges={draw.choice(('yes', 'yes', 'no'))}",
            f"UMask={draw.choice(('0077', '0027', '0000'))}",
            f"MemoryMax={draw.randint(1, 32)}G",
        ]
    )


def _policy(draw: random.Random, number: int) -> str:
    parts = draw.sample(_PARTS.split(), 3)
    lines = [f"--- file: policy/roles-{number}.yaml", "roles:"]
    for part in parts:
        verbs = draw.sample(_VERBS.split(), draw.randint(2, 4))
        allowed = "['*']" if draw.random() < 0.15 else "[" + ", ".join(verbs) + "]"
        lines += [
            f"  {part}-{draw.choice(('reader', 'editor', 'owner'))}:",
            f"    allow: {allowed}",
        ]
    lines.append(f"expires_days: {draw.choice((30, 90, 3650))}")
    return "\n".join(lines)
