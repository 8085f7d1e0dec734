"""What the systems that an evaluation compares are called. Imports no torch."""

LABELS = {
    "bm25": "BM25",
    "base": "Base model, untouched",
    "learn": "After learn alone (no labelled pair seen)",
    "lbr": "LBR: learn, then represent",
}
"""In tables and charts."""

SHORT_LABELS = {
    "bm25": "BM25",
    "base": "the untouched base model",
    "learn": "the model after learn alone",
    "lbr": "LBR",
}
"""Inside a sentence."""
