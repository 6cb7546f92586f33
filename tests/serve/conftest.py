"""Small random models with every mechanism of V3, in R1's and in R1-Zero's template, and a server over each."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "1")

import pytest
import torch
from browser import chromium
from page_helpers import make_run
from serving import running, write_model

from bessemer.addons.serve.service import launch
from bessemer.engine.engine import load_engine

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def r1(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("r1"), "r1")


@pytest.fixture(scope="session")
def zero(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("zero"), "zero")


@pytest.fixture(scope="session")
def engine(r1):
    return load_engine(r1)


@pytest.fixture(scope="session")
def zero_engine(zero):
    return load_engine(zero)


@pytest.fixture(scope="session")
def server(r1):
    """Runs the model in a process of its own, as in production; the other servers here run it in a thread."""
    with running(r1, launch=launch) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    """Not session-wide: it keeps an event loop running, and tests could then not run their own."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def run_server(tmp_path_factory):
    """Serves a run of two models with the records of their training, which is what the chat page is made for."""
    with running(make_run(tmp_path_factory.mktemp("run"))) as server:
        yield server


@pytest.fixture(scope="session")
def zero_server(zero):
    with running(zero) as server:
        yield server
