"""torchdata's StatefulDataLoader brings itself back to its place; what goes on from there is the same bit by bit."""

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from tests.test_resume import Noisy, Stops, Training, assert_same_run

pytest.importorskip("torchdata")
# torchdata 0.11 calls it with torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: E402

RUN = {"max_epochs": 3}


class Plain(Dataset):
    """As Noisy, without the noise, which a worker of torchdata's does not get back."""

    def __len__(self):
        return 26

    def __getitem__(self, index):
        return torch.linspace(0, index, 6), index % 3


class Growing(IterableDataset):
    """Samples of which nobody knows how many there are; knows where it is."""

    def __init__(self):
        self.next = 0

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        count, rest = (1, 0) if worker is None else (worker.num_workers, worker.id)
        while self.next < 32:
            self.next += 1
            if self.next % count == rest:
                yield torch.linspace(0, self.next, 6), self.next % 3
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def assert_goes_on(tmp_path, at, make):
    loaders = []

    def data():
        torch.manual_seed(1)  # its sampler draws when it is made
        loaders.append(make())
        return loaders[-1]

    whole = Training(tmp_path / "whole", data=data()).train(**RUN)
    first = Training(tmp_path / "run", data=data())
    with pytest.raises(Stops):
        first.train(until=at, **RUN)
    second = Training(tmp_path / "run", data=data())
    Training.scramble(99)
    second.checkpoint.resume(second.trainer)
    began = second.trainer.state.iteration
    second.train(**RUN)
    assert began == at
    assert_same_run(whole, second, began)
    for loader in loaders:
        if loader.num_workers:  # left to the collector of cycles, two workers are waited for 5 s each
            loader._iterator._shutdown_workers()


@pytest.mark.parametrize("at", [3, 8, 17])
def test_without_workers(tmp_path, at):
    assert_goes_on(tmp_path, at, lambda: StatefulDataLoader(Noisy(), 4, shuffle=True))


@pytest.mark.parametrize("at", [3, 8, 17])
@pytest.mark.parametrize("settings", [{}, {"prefetch_factor": 3, "persistent_workers": True}])
def test_with_workers(tmp_path, at, settings):
    assert_goes_on(tmp_path, at, lambda: StatefulDataLoader(Plain(), 4, shuffle=True, num_workers=2, **settings))


@pytest.mark.parametrize("at", [3, 9, 17])
@pytest.mark.parametrize("workers", [0, 2])
def test_of_unknown_length(tmp_path, at, workers):
    assert_goes_on(tmp_path, at, lambda: StatefulDataLoader(Growing(), 4, num_workers=workers))
