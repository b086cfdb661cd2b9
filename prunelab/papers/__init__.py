"""The papers: artefacts and claims, reported numbers, and protocols as settings. No torch.

``library`` reads ``<paper>/figures.toml``, ``reported`` the CSV files; ``<paper>/study.py`` has the protocol.
"""

from __future__ import annotations

from prunelab.papers.library import (
    CONFIRMED,
    CONTRADICTED,
    NOT_MEASURED,
    UNDECIDED,
    Artefact,
    Chosen,
    Claim,
    Paper,
    PapersError,
    artefact,
    artefacts,
    chosen,
    judge,
    papers,
    read,
    verdicts,
)

__all__ = [
    "CONFIRMED",
    "CONTRADICTED",
    "NOT_MEASURED",
    "UNDECIDED",
    "Artefact",
    "Chosen",
    "Claim",
    "Paper",
    "PapersError",
    "artefact",
    "artefacts",
    "chosen",
    "judge",
    "papers",
    "read",
    "verdicts",
]
