"""Domains that can be built from installed packages alone: `medical`, `chemistry` and `code`.

Each module has one public function, ``build() -> Domain``; `lbr_dist.data.domains.write` writes the result to files.
"""

from lbr_dist.data.domains.domain import Domain, Source

__all__ = ["Domain", "Source"]
