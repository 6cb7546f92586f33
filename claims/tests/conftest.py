"""All the cards, computed once."""

import pytest

from bessemer_claims import cards, registry


@pytest.fixture(scope="session")
def all_cards():
    return cards.make(list(registry.claims()))
