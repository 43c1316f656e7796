"""Parts of ``make_bundle.py``.

They need the standard library only: the machine that makes a bundle need not have the project's packages.
"""


class BundleError(Exception):
    """What the user can mend; one sentence."""
