"""The one place that turns a domain's configuration into a domain."""

from __future__ import annotations

from collections.abc import Callable

from domains.agent import AgentDomain
from domains.agent_tasks import AgentTasks
from domains.code import CodeDomain
from domains.code_tasks import CodeTasks
from domains.config import DomainConfig, SandboxConfig
from domains.math import MathDomain
from domains.math_tasks import MathTasks
from domains.sources import FileSource
from domains.types import Domain, TaskSource

PROCEDURAL = "procedural"


def make_domain(name: str, config: DomainConfig, sandbox: SandboxConfig) -> Domain:
    """Build the domain `name` as its configuration says; code and agent probe the sandbox at once.

    Raises:
        FileNotFoundError: the source is a file that does not exist.
        ValueError: an unknown kind, difficulty or source, or a malformed row in it.
        SandboxUnavailable: the domain runs what a model wrote, and this machine has no safe way to do so.
    """
    kinds: dict[str, Callable[[], Domain]] = {
        "math": lambda: MathDomain(name, _source(name, config)),
        "code": lambda: CodeDomain(name, _source(name, config), sandbox),
        "agent": lambda: AgentDomain(name, _source(name, config), sandbox),
    }
    if config.kind not in kinds:
        raise ValueError(f"domain {name}: kind: got {config.kind!r}, expected one of {sorted(kinds)}")
    return kinds[config.kind]()


def _source(name: str, config: DomainConfig) -> TaskSource:
    if config.source != PROCEDURAL:
        return FileSource(name, config.kind, config.source)
    tasks: dict[str, type[MathTasks] | type[CodeTasks] | type[AgentTasks]] = {"math": MathTasks, "code": CodeTasks, "agent": AgentTasks}
    return tasks[config.kind](name, difficulty=config.difficulty, diligence=config.diligence)
