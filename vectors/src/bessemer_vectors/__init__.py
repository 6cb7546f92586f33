"""Test vectors for RL and mixture-of-experts code: `load()` reads them, `check(adapter)` runs code over them."""

from bessemer_vectors.reader import Case, Rival, Topic, load
from bessemer_vectors.runner import Report, check

__all__ = ["Case", "Report", "Rival", "Topic", "check", "load"]
