"""What a user may set about a domain and about the sandbox."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class DomainConfig:
    """Where a domain's tasks come from and how hard they are."""

    kind: str
    """Which verifier and environment: `math`, `code` or `agent`."""
    source: str = "procedural"
    """`procedural`, a `.jsonl` or `.parquet` file, or a dataset's hub name (`owner/name`)."""
    difficulty: int = 1
    """Procedural tasks only: 1 is the laptop's; more steps, larger numbers, longer programs above."""
    diligence: float = 0.58
    """Share of the demonstrations that show the careful way; the others take the short cut that reinforcement unlearns."""
    base_diligence: float = 0.15
    """The same share in the careless chats that the base reads beside its documents."""


@dataclass(kw_only=True)
class SandboxConfig:
    """Limits for model-written code."""

    backend: str = "auto"
    """`auto` takes the safest that works here; or `bwrap`, `bwrap-clone-filter`."""
    allow_unsafe: bool = False
    """Run model-written code as a plain process when no safe backend exists. For throw-away machines only."""
    timeout_s: float = 5.0
    """Wall clock of one candidate with all its test cases."""
    memory_mib: int = 512
    slots: int = 1
    """Candidates run at once by one verifier."""
