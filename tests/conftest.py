"What several modules of tests share"
import pytest
import torch


@pytest.fixture
def one_thread():
    "Sums have other last digits with another number of threads, and a forked process must not have more than one"
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)
