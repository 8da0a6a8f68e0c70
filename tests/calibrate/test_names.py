# SPDX-License-Identifier: Apache-2.0
"""Every public name of the packages that load lazily is there, and nothing else is."""

import pytest

from msdkern import calibrate, infer


@pytest.mark.parametrize("package", [calibrate, infer], ids=lambda p: p.__name__)
def test_public_names(package):
    for name in package.__all__:
        assert getattr(package, name).__doc__ or name == "DISABLED"
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'no'"):
        _ = package.no
