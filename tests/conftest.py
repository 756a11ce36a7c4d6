"What several modules of tests share"
import os

import pytest
import torch


LONG = ('resume cli gpu methods distributed newest score fastai transfer_proof compare readme networks finetune verdict figures formats '
        'docs progress semantic repo guard hostile').split()

def pytest_collection_modifyitems(items):
    "The files that take longest come first, or one of two workers would end alone with one of them"
    place = {f'test_{name}.py': i for i,name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
    "Nothing is kept in the home folder"
    os.environ['DENSESSL_CACHE'] = str(tmp_path_factory.mktemp('cache'))


@pytest.fixture
def one_thread():
    "Sums have other last digits with another number of threads, and a forked process must not have more than one"
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)
