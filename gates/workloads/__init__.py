"""How each kind of gate loads the server. A gate file names one of these in ``workload``."""

from __future__ import annotations

from gates.workloads.arrival import Arrival
from gates.workloads.base import Workload
from gates.workloads.bench import Bench
from gates.workloads.counters import Counters
from gates.workloads.evaluation import Evaluation
from gates.workloads.load import Load
from gates.workloads.logprobs import Logprobs
from gates.workloads.sessions import Sessions
from gates.workloads.startup import Startup
from gates.workloads.tools import Tools

WORKLOADS: dict[str, Workload] = {
    "startup": Startup(),
    "load": Load(),
    "arrival": Arrival(),
    "sessions": Sessions(),
    "bench": Bench(),
    "evaluation": Evaluation(),
    "tools": Tools(),
    "logprobs": Logprobs(),
    "counters": Counters(),
}
