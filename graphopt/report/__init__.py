"""The one result object of an optimize run: what was asked, what was done, what was measured, what was chosen."""

from graphopt.report.record import (
    SCHEMA,
    CandidateRecord,
    Choice,
    DataRecord,
    LayerRecord,
    LibraryRecord,
    OfferRecord,
    PartRecord,
    Report,
    SearchRecord,
    SizeRecord,
    SourceRecord,
    TimedLayer,
    TrialRecord,
    VariantRecord,
)

__all__ = [
    "SCHEMA",
    "CandidateRecord",
    "Choice",
    "DataRecord",
    "LayerRecord",
    "LibraryRecord",
    "OfferRecord",
    "PartRecord",
    "Report",
    "SearchRecord",
    "SizeRecord",
    "SourceRecord",
    "TimedLayer",
    "TrialRecord",
    "VariantRecord",
]
