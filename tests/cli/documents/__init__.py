"""Documents as commands make them, to look at: a module for each kind, and all of them here."""

from tests.cli.documents.analyses import (
    analysed,
)
from tests.cli.documents.banks import (
    bank,
    bank_trained,
)
from tests.cli.documents.conversions import (
    checks,
    converted,
    curve,
    fitted,
    predicted,
    verified,
    write_artifact,
    write_report,
)
from tests.cli.documents.measuring import (
    benched,
    evaluated,
    examined,
    recalled,
)
from tests.cli.documents.models import (
    MODEL,
    blocks,
    inspected,
    near_misses,
)
from tests.cli.documents.passes import (
    branches,
    heads_file_of,
    pass_file_of,
    relations,
    trained_pass,
    training,
)

__all__ = [
    "MODEL",
    "analysed",
    "bank",
    "bank_trained",
    "benched",
    "blocks",
    "branches",
    "checks",
    "converted",
    "curve",
    "evaluated",
    "examined",
    "fitted",
    "heads_file_of",
    "inspected",
    "near_misses",
    "pass_file_of",
    "predicted",
    "recalled",
    "relations",
    "trained_pass",
    "training",
    "verified",
    "write_artifact",
    "write_report",
]
