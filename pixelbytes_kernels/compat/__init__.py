"""Code written for mamba_ssm, Vim's fork of it and causal_conv1d, run on these kernels.

    from pixelbytes_kernels import compat
    compat.install()
    from mamba_ssm import Mamba  # this package's

`pixelbytes_kernels.compat.transformers` does the same for the Mamba models of transformers. What is served:
docs/drop-in.md.
"""

from __future__ import annotations

from ._install import install, is_installed, uninstall
from ._not_served import NotServed

__all__ = ["NotServed", "install", "is_installed", "uninstall"]
