"""The papers: artefacts and claims, reported numbers, and protocols as settings. No torch.

``library`` reads ``<paper>/figures.toml``, ``reported`` the CSV files; ``<paper>/study.py`` has the protocol.
"""

from __future__ import annotations

from prunelab.papers.library import (
    AS_PUBLISHED,
    CONFIRMED,
    CONTRADICTED,
    KINDS,
    NO,
    NOT_AS_PUBLISHED,
    NOT_HERE,
    NOT_MEASURED,
    ONE_RUN,
    UNDECIDED,
    YES,
    Artefact,
    Chosen,
    Claim,
    Paper,
    PapersError,
    about,
    artefact,
    artefacts,
    chosen,
    differs,
    judge,
    papers,
    read,
    rejudged,
    verdicts,
)

__all__ = [
    "AS_PUBLISHED",
    "CONFIRMED",
    "CONTRADICTED",
    "KINDS",
    "NO",
    "NOT_AS_PUBLISHED",
    "NOT_HERE",
    "NOT_MEASURED",
    "ONE_RUN",
    "UNDECIDED",
    "YES",
    "Artefact",
    "Chosen",
    "Claim",
    "Paper",
    "PapersError",
    "about",
    "artefact",
    "artefacts",
    "chosen",
    "differs",
    "judge",
    "papers",
    "read",
    "rejudged",
    "verdicts",
]
