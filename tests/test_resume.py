"""A run that is stopped at any micro-batch and resumed is, bit for bit, the run that was never stopped."""

import random

import numpy as np
import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Accuracy, RunningAverage
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import ice_engine as ice
from ice_engine import checkpoint_file
from ice_engine.errors import CheckpointError, IceEngineWarning
from tests.forked import python
from tests.test_checkpoint import assert_equal

ITERATIONS, LENGTH = 14, 7  # two epochs of 7 micro-batches, by windows of 3


class Noisy(Dataset):
    """26 samples, each different whenever it is loaded, by the generators of torch, numpy and Python."""

    def __len__(self):
        return 26

    def __getitem__(self, index):
        x = torch.linspace(0, index, 6) + torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002, S311
        return x.float(), index % 3


class Stops(Exception):  # noqa: N818
    pass


class Training:
    """All that a real run has, the same at every start."""

    def __init__(self, folder, *, workers=0, data=None, tail="step", every=1, event=None, also=None, **settings):
        self.scramble(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)
        )
        self.optimizer = ice.Optimizer(
            torch.optim.AdamW(self.model.named_parameters(), lr=0.05),
            accumulation_steps=3,
            tail=tail,
            clip=ice.clip_norm(1.0),
            grad_scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2),
            processors=[ice.schedules.cosine(total=8)],
        )
        loss = torch.nn.functional.cross_entropy
        self.trainer = ice.create_trainer(
            self.model,
            self.optimizer,
            loss,
            autocast=torch.float16,
            output_transform=lambda x, y, out, loss: (out, y, loss.item()),
        )
        self.data = data if data is not None else DataLoader(Noisy(), 4, shuffle=True, num_workers=workers)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        self.trainer.add_event_handler(
            ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED, lambda: self.average.update_parameters(self.model)
        )
        accuracy = Accuracy(output_transform=lambda out: (out[0].float(), out[1]))
        accuracy.attach(self.trainer, "accuracy")
        smooth = RunningAverage(output_transform=lambda out: out[2])
        smooth.attach(self.trainer, "smooth")
        self.log = []
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.note)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.note)
        self.to_save = {
            "trainer": self.trainer,
            "model": self.model,
            "optimizer": self.optimizer,
            "average": self.average,
            "accuracy": accuracy,
            "smooth": smooth,
        }
        if also is not None:
            also(self)
        self.checkpoint = ice.Checkpoint(self.to_save, folder, n_saved=None, **settings)
        self.checkpoint.attach(self.trainer, event or Events.ITERATION_COMPLETED(every=every))

    @staticmethod
    def scramble(seed):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)

    def note(self, engine):
        state = engine.state
        shown = {name: value for name, value in state.metrics.items() if name == "smooth" or not self.inside(state)}
        self.log.append(
            f"{state.epoch} {state.iteration} {state.optimizer_step} {state.output[2]!r} {shown} "
            f"{self.optimizer.param_groups[0]['lr']!r} {self.optimizer.grad_scaler.get_scale()}"
        )

    @staticmethod
    def inside(state):
        return state.epoch_length is None or state.iteration % state.epoch_length

    def train(self, *, until=None, **run):
        def stop(engine):
            if engine.state.iteration == until + 1:  # a save comes after all handlers of its iteration
                raise Stops

        if until is not None:
            self.trainer.logger.disabled = True
            self.trainer.add_event_handler(Events.ITERATION_STARTED, stop)
        self.trainer.run(self.data, **(run or {"max_epochs": 2}))
        return self

    def everything(self):
        states = {name: saved.state_dict() for name, saved in self.to_save.items()}
        return {**states, "clocks": self.optimizer.clocks, "metrics": dict(self.trainer.state.metrics)}


def resumed(tmp_path, at, folder="run", **settings):
    """Stop at iteration *at*, and go on in objects made anew."""
    run = settings.pop("run", {})
    first = Training(tmp_path / folder, **settings)
    with pytest.raises(Stops):
        first.train(until=at, **run)
    second = Training(tmp_path / folder, **settings)
    Training.scramble(99)
    with torch.no_grad():
        for tensor in (*second.model.parameters(), *second.average.parameters()):
            tensor.fill_(7.0)
    assert second.checkpoint.resume(second.trainer) is not None
    began = second.trainer.state.iteration
    second.train(**run)
    return first, second, began


def assert_same_run(whole, second, began):
    assert_equal(second.everything(), whole.everything())
    assert second.log == [line for line in whole.log if int(line.split()[1]) > began or "epoch" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Training(tmp_path_factory.mktemp("whole")).train()


@pytest.mark.parametrize("at", [*range(1, 7), *range(8, ITERATIONS)])
def test_a_run_stopped_at_any_micro_batch_goes_on_bit_by_bit(tmp_path, whole, at):
    _, second, began = resumed(tmp_path, at)
    assert began == at
    assert_same_run(whole, second, began)
    assert second.optimizer.clocks == {"step": 5, "attempt": 6, "skipped": 1, "iteration": ITERATIONS}


@pytest.mark.parametrize("settings", [{"workers": 2}, {"tail": "carry"}, {"tail": "drop"}, {"background": False}])
@pytest.mark.parametrize("at", [3, 9])
def test_so_does_one(tmp_path, settings, at):
    whole = Training(tmp_path / "whole", **settings).train()
    assert_same_run(whole, *resumed(tmp_path, at, **settings)[1:])


class Sparse(torch.nn.Module):
    """Sparse gradients, momentum and buffers, whose values change in place with each micro-batch."""

    def __init__(self):
        super().__init__()
        self.rows = torch.nn.Embedding(10, 4, sparse=True)
        self.register_buffer("coo", torch.eye(4).to_sparse())
        self.register_buffer("csr", torch.eye(4).to_sparse_csr())

    def forward(self, x):
        self.coo._values().mul_(0.9)
        self.csr.values().mul_(0.8)
        return self.rows(x) @ (self.coo.to_dense() + self.csr.to_dense())


def sparse(folder, **settings):
    torch.manual_seed(0)
    model = Sparse()
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5), accumulation_steps=2)
    trainer = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
    to_save = {"trainer": trainer, "model": model, "optimizer": optimizer}
    return to_save, ice.Checkpoint(to_save, folder, **settings)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("background", [True, False])
def test_sparse_tensors_are_copied_as_they_were(tmp_path, background):
    data = [(torch.arange(i, i + 3), torch.ones(3, 4)) for i in range(7)]
    whole, checkpoint = sparse(tmp_path, background=background)
    checkpoint.attach(whole["trainer"], Events.ITERATION_COMPLETED(once=3))  # inside a window
    whole["trainer"].run(data, max_epochs=1)
    again, checkpoint = sparse(tmp_path)
    assert checkpoint.resume(again["trainer"]) == tmp_path / "checkpoint_3.pt"
    assert again["trainer"].state.iteration == 3
    again["trainer"].run(data, max_epochs=1)
    assert_equal(*({name: saved.state_dict() for name, saved in run.items()} for run in (again, whole)))


def test_from_an_older_checkpoint_too(tmp_path, whole):
    _, second, began = resumed(tmp_path, 11, every=4)
    assert began == 8
    assert_same_run(whole, second, began)


def test_a_save_at_an_epochs_last_micro_batch_waits_for_its_end(tmp_path, whole):
    _, second, _ = resumed(tmp_path, 10, every=7)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint_7.pt", "checkpoint_14.pt"]
    assert_equal(second.everything(), whole.everything())
    assert second.log == whole.log[8:]  # of the first epoch, the handlers of its end have run


class Growing(IterableDataset):
    """Nobody knows how long it is."""

    def __iter__(self):
        for index in torch.randperm(26).tolist():
            yield (torch.linspace(0, index, 6) + torch.rand(()).item()).float(), index % 3


@pytest.mark.parametrize("at", [4, 10])
@pytest.mark.parametrize("workers", [0, 1])
def test_iterable_data_of_unknown_length_is_passed_over_to_the_same_place(tmp_path, at, workers):
    def data():
        return DataLoader(Growing(), 4, num_workers=workers)

    whole = Training(tmp_path / "whole", data=data()).train()
    assert whole.trainer.state.epoch_length == LENGTH
    _, second, began = resumed(tmp_path, at, data=data())
    assert began == at
    assert_same_run(whole, second, began)


class Stateful:
    """A loader that knows where it is; counts what it loads."""

    def __init__(self):
        self.next, self.loaded = 0, 0

    def __len__(self):
        return LENGTH

    def __iter__(self):
        while self.next < LENGTH:
            self.next += 1
            self.loaded += 1
            yield torch.full((4, 6), self.next / 7) + torch.rand(()), torch.tensor([0, 1, 2, 0])
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


@pytest.mark.parametrize("at", [4, 7, 10])
def test_a_loader_with_a_state_goes_on_from_it(tmp_path, at):
    whole = Training(tmp_path / "whole", data=Stateful()).train()
    first = Training(tmp_path / "run", data=Stateful())
    with pytest.raises(Stops):
        first.train(until=at + (at == 7))
    second = Training(tmp_path / "run", data=Stateful())
    if at == 7:
        (tmp_path / "run" / "checkpoint_8.pt").unlink()
    second.checkpoint.resume(second.trainer)
    second.train()
    assert_same_run(whole, second, at if at != 7 else 8 - 1)
    assert second.data.loaded == 2 * LENGTH - at


def test_plain_data_of_a_sampler_is_passed_over_without_being_loaded(tmp_path):
    class Counting(TensorDataset):
        loaded = 0

        def __getitem__(self, index):
            Counting.loaded += 1
            return super().__getitem__(index)

    data = DataLoader(Counting(torch.randn(26, 6), torch.arange(26) % 3), 4, shuffle=True)
    first = Training(tmp_path, data=data)
    with pytest.raises(Stops):
        first.train(until=5)
    second = Training(tmp_path, data=data)
    second.checkpoint.resume(second.trainer)
    Counting.loaded = 0
    second.train(max_epochs=1)
    assert Counting.loaded == 26 - 5 * 4


def test_data_that_ends_before_the_place_says_so(tmp_path):
    first = Training(tmp_path, data=[(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))] * LENGTH)
    with pytest.raises(Stops):
        first.train(until=5)
    second = Training(tmp_path, data=first.data[:3])
    second.trainer.logger.disabled = True
    second.checkpoint.resume(second.trainer)
    with (
        pytest.warns(IceEngineWarning, match="the data has 3 batches, and had 7"),
        pytest.raises(CheckpointError, match=r"the data ends after 3 batches; .*, 5 had been taken from it"),
    ):
        second.train()


def test_epochs_that_were_ended_early_are_counted(tmp_path):
    def training(folder):
        made = Training(folder)
        made.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda: made.trainer.terminate_epoch())
        return made

    whole = training(tmp_path / "whole").train(max_epochs=3)
    first = training(tmp_path / "run")
    with pytest.raises(Stops):
        first.train(until=8, max_epochs=3)
    second = training(tmp_path / "run")
    second.checkpoint.resume(second.trainer)
    second.train(max_epochs=3)
    assert whole.trainer.state.iteration == 4 + 2 * LENGTH
    assert_same_run(whole, second, 8)


def test_with_fewer_ranks_and_as_long_an_epoch_the_log_says_nothing_of_its_length(tmp_path, caplog):
    first = Training(tmp_path)
    with pytest.raises(Stops):
        first.train(until=2)
    file = tmp_path / "checkpoint_2.pt"
    content = checkpoint_file.read(file)
    (position,) = content["ice_engine"]["positions"]
    content["ice_engine"]["positions"] = [{**position, "places": 2}] * 2  # as of two ranks, each with all of the data
    checkpoint_file.write(file, content)
    second = Training(tmp_path)
    second.checkpoint.resume(second.trainer)
    second.train()
    assert [said for said in caplog.messages if said.startswith("the run of")] == [
        "the run of 2 ranks goes on with 1 after iteration 4"
    ]


PROGRAM = """
import os, sys
from pathlib import Path
import torch
from ignite.engine import Events
from tests.test_resume import Training

torch.set_num_threads(int(sys.argv[4]))  # the order of sums depends on it
run = Training(Path(sys.argv[1]), workers=int(sys.argv[2]))
run.checkpoint.resume(run.trainer)
kill = int(sys.argv[3])
if kill:  # the next one begins when this one is written
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=kill), lambda: run.checkpoint.last_checkpoint)
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=kill), lambda: os._exit(9))
run.train()
print("\\n".join(run.log))
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_process_that_was_killed_goes_on_in_another_one(tmp_path, whole, workers):
    def start(kill):
        return python("-c", PROGRAM, str(tmp_path), str(workers), str(kill), str(torch.get_num_threads()))

    assert start(5).returncode == 9
    assert start(10).returncode == 9
    done = start(0)
    expected = whole if not workers else Training(tmp_path / "whole", workers=workers).train()
    assert done.stdout.splitlines() == expected.log[-len(done.stdout.splitlines()) :], done.stderr
    assert len(done.stdout.splitlines()) == 5
    file = tmp_path / "checkpoint_14.pt"
    assert_equal(torch.load(file, weights_only=True)["model"], expected.model.state_dict())
