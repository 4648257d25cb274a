"""The conformance suite: what every method must keep, for ours and for third parties' methods.

>>> from gossamer.conformance import check_method
>>> check_method(example())            # doctest: +SKIP

An example is a :class:`gossamer.kits.example.MethodExample`; ``CHECKS`` holds the checks by name, so that
a test suite can run them one by one.
"""

from gossamer.conformance.rooms import ROOM_CHECKS
from gossamer.conformance.suite import CHECKS, NotConformant, check_method, check_pair, fits

__all__ = ["CHECKS", "ROOM_CHECKS", "NotConformant", "check_method", "check_pair", "fits"]
