"""The kernels of several instruction sets in one process."""

import pytest

from bessemer.addons.accelerate.kernels import library


def load(monkeypatch: pytest.MonkeyPatch, instructions: str) -> library.Status:
    """Makes the library for BESSEMER_KERNELS=`instructions` the one in use."""
    monkeypatch.setenv(library.VARIABLE, instructions)
    library.forget()
    return library.status()


@pytest.fixture(params=["auto", "emulated-amx"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """This machine's best instruction set; then AVX2 with AMX's code on emulated tiles."""
    status = load(monkeypatch, request.param)
    if status.instructions == "off":
        pytest.skip(status.why)
    yield status.instructions
    monkeypatch.undo()
    library.forget()
