"""Instructions of the Dockerfile, by stage."""

from __future__ import annotations

import re
from pathlib import Path

from tests.deployment.conftest import ROOT

DOCKER = ROOT / "docker"
CONTEXT = DOCKER / "serve"
DOCKERFILE = CONTEXT / "Dockerfile"


Instruction = tuple[str, str]


def instructions(path: Path) -> list[Instruction]:
    """Of a Dockerfile: each instruction with its words, lines joined, comments gone."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (name, rest)
        for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def stages() -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {"": []}
    current = ""
    for name, rest in instructions(DOCKERFILE):
        if name == "FROM":
            current = rest.split(" AS ")[1]
            found[current] = []
        found[current].append((name, rest))
    return found


def words(stage: str, name: str) -> list[str]:
    return [rest for each, rest in stages()[stage] if each == name]
