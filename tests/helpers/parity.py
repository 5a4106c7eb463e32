"""The vendor's checkpoints with outputs of the vendor's own code, see tests/parity/README.md."""

from pathlib import Path

import parloop  # noqa: F401  (registers the model)

CASES = sorted(path.parent for path in (Path(__file__).parents[1] / "parity").glob("*/cases.npz"))
