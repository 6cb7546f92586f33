"""Requests as large as the API allows: what one of them costs the server does not grow with its samples."""

from bessemer.serve.protocol import CompletionRequest
from bessemer.serve.sampling_params import requests


def loaded(server):
    (model,) = server.models.loaded.values()
    return model


class CountedIds(tuple):
    """Prompt ids that count how often all of them are read."""

    reads = 0

    def __iter__(self):
        CountedIds.reads += 1
        return super().__iter__()

    def __hash__(self):
        CountedIds.reads += 1
        return super().__hash__()


def test_a_prompt_is_read_once_for_all_of_its_samples(server):
    ids = CountedIds(range(3, 40))
    body = CompletionRequest(prompt=list(ids), n=128, seed=5)
    CountedIds.reads = 0
    made = requests(body, loaded(server), [ids], client="", max_tokens=2, param="prompt", top=0)
    assert len({one.key for one in made}) == 128 and all(one.prompt is ids for one in made)
    assert CountedIds.reads <= 4
    again = requests(body, loaded(server), [ids, ids], client="", max_tokens=2, param="prompt", top=0)
    assert len({one.key for one in again}) == 256 and [one.key for one in again][:128] == [one.key for one in made]
