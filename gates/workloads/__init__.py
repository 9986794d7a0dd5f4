"""How each kind of gate loads the server. A gate file names one of these in ``workload``."""

from __future__ import annotations

from gates.workloads.base import Workload
from gates.workloads.load import Load

WORKLOADS: dict[str, Workload] = {
    "load": Load(),
}
