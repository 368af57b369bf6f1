"""Checkpoints: nothing is lost when a write fails, and a resumed run goes on as if it had never stopped."""

import copy
import gc
import os
import sys
import textwrap

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import DiskSaver, global_step_from_engine
from ignite.handlers.checkpoint import CheckpointEvents
from torch.nn.functional import mse_loss

import ice_engine as ice
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, CheckpointError, HookError, IceEngineWarning
from tests.forked import python

DATA = [(torch.full((3, 4), i / 7), torch.full((3, 2), 1 / (i + 1))) for i in range(5)]


class Run:
    """A trainer, what it trains, and its checkpoint; the same at every start."""

    def __init__(self, folder, **settings):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 2)
        self.optimizer = ice.Optimizer(
            torch.optim.AdamW(self.model.parameters(), lr=0.1),
            accumulation_steps=2,
            processors=[ice.schedules.cosine(total=12)],
            clip=ice.clip_norm(1.0),
            grad_scaler=torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2),
        )
        self.trainer = ice.create_trainer(self.model, self.optimizer, mse_loss)
        self.to_save = {"model": self.model, "optimizer": self.optimizer, "trainer": self.trainer}
        self.checkpoint = ice.Checkpoint(self.to_save, folder, **settings)

    def train(self, max_epochs=2):
        self.trainer.run(DATA, max_epochs=max_epochs)
        return self

    def everything(self):
        return {name: thing.state_dict() for name, thing in self.to_save.items()}


def assert_equal(first, second):
    """Bit for bit, through dicts and lists."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert_equal(value, second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    elif isinstance(first, torch.Tensor):
        assert first.layout is second.layout
        assert torch.equal(first.to_dense(), second.to_dense())
    else:
        assert first == second


def names(folder):
    return sorted(file.name for file in folder.iterdir())


class Fails:
    """State that no file can hold, from a certain save on."""

    def __init__(self, after):
        self.left = after

    def state_dict(self):
        self.left -= 1
        return {"value": 1.0 if self.left >= 0 else (lambda: None)}

    def load_state_dict(self, state):
        assert state == {"value": 1.0}


# -- resuming -------------------------------------------------------------------------------------------------------


def test_a_run_resumed_at_an_epochs_end_is_bit_equal_to_the_uninterrupted_one(tmp_path):
    whole = Run(tmp_path / "unused").train(max_epochs=4)
    first = Run(tmp_path / "run")
    first.checkpoint.attach(first.trainer)
    first.train(max_epochs=2)
    second = Run(tmp_path / "run")
    second.model.reset_parameters()
    assert second.checkpoint.resume(second.trainer) == tmp_path / "run" / "checkpoint_10.pt"
    assert_equal(second.everything(), first.everything())
    second.train(max_epochs=4)
    assert_equal(second.everything(), whole.everything())
    assert second.optimizer.clocks == whole.optimizer.clocks
    assert second.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"] != 0.1
    assert whole.trainer.state.optimizer_step == second.trainer.state.optimizer_step == 12


def test_a_run_resumed_with_other_data_is_told_how_long_its_epochs_are(tmp_path):
    first = Run(tmp_path)
    first.checkpoint.attach(first.trainer)
    first.train(max_epochs=1)
    second = Run(tmp_path)
    second.checkpoint.resume(second.trainer)
    with pytest.warns(IceEngineWarning, match=r"the data has 10 batches, and had 5 .* goes on with epochs of 5"):
        second.trainer.run(DATA * 2, max_epochs=2)
    assert second.trainer.state.iteration == 10


def test_a_run_resumed_in_a_new_process_writes_the_same_file(tmp_path):
    for folder, epochs in (("parts", 1), ("whole", 3)):
        run = Run(tmp_path / folder)
        run.checkpoint.attach(run.trainer)
        run.train(epochs)
    program = """
        import sys
        from pathlib import Path
        from tests.test_checkpoint import Run

        run = Run(Path(sys.argv[1]))
        run.checkpoint.attach(run.trainer)
        print(run.checkpoint.resume(run.trainer))
        run.train(max_epochs=3)
    """
    done = python("-c", textwrap.dedent(program), str(tmp_path / "parts"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "parts" / "checkpoint_5.pt")
    assert names(tmp_path / "parts") == ["checkpoint_15.pt"]
    parts = torch.load(tmp_path / "parts" / "checkpoint_15.pt", weights_only=True)
    assert_equal(parts, torch.load(tmp_path / "whole" / "checkpoint_15.pt", weights_only=True))


def test_a_fresh_start_resumes_nothing(tmp_path):
    run = Run(tmp_path)
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    before = run.everything()
    assert run.checkpoint.resume(run.trainer) is None
    assert_equal(run.everything(), before)


def test_a_folder_that_was_removed_resumes_nothing(tmp_path):
    run = Run(tmp_path / "run")
    (tmp_path / "run").rmdir()
    assert run.checkpoint.resume(run.trainer) is None


def test_the_newest_file_is_resumed_whatever_its_number(tmp_path):
    run = Run(tmp_path, n_saved=None)
    run.checkpoint.attach(run.trainer)
    run.train(max_epochs=3)
    assert names(tmp_path) == ["checkpoint_10.pt", "checkpoint_15.pt", "checkpoint_5.pt"]
    again = Run(tmp_path)
    assert again.checkpoint.resume(again.trainer).name == "checkpoint_15.pt"
    newer = (tmp_path / "checkpoint_15.pt").stat().st_mtime + 10
    os.utime(tmp_path / "checkpoint_5.pt", (newer, newer))
    again = Run(tmp_path)
    assert again.checkpoint.resume(again.trainer).name == "checkpoint_5.pt"
    assert again.trainer.state.epoch == 1


def test_files_of_the_same_moment_are_told_apart_by_their_numbers(tmp_path):
    run = Run(tmp_path, n_saved=None)
    run.checkpoint.attach(run.trainer)
    run.train(max_epochs=3)
    for file in tmp_path.iterdir():
        os.utime(file, (1e9, 1e9))
    assert run.checkpoint.resume(run.trainer).name == "checkpoint_15.pt"


def test_a_resumed_run_keeps_as_many_files_as_it_was_told(tmp_path):
    for epochs in (3, 5):
        run = Run(tmp_path, n_saved=2)
        run.checkpoint.attach(run.trainer)
        run.checkpoint.resume(run.trainer)
        run.train(max_epochs=epochs)
    assert names(tmp_path) == ["checkpoint_20.pt", "checkpoint_25.pt"]


def test_files_of_an_earlier_and_longer_run_do_not_keep_this_one_from_saving(tmp_path):
    long = Run(tmp_path, n_saved=None)
    long.checkpoint.attach(long.trainer)
    long.train(max_epochs=4)
    os.utime(tmp_path / "checkpoint_5.pt", None)
    for file in ("checkpoint_10.pt", "checkpoint_15.pt", "checkpoint_20.pt"):
        os.utime(tmp_path / file, (1e9, 1e9))
    run = Run(tmp_path, n_saved=1)
    run.checkpoint.attach(run.trainer)
    assert run.checkpoint.resume(run.trainer).name == "checkpoint_5.pt"
    run.train(max_epochs=3)
    assert run.checkpoint.last_checkpoint == tmp_path / "checkpoint_15.pt"
    assert names(tmp_path) == ["checkpoint_15.pt", "checkpoint_20.pt"]


def test_two_checkpoints_of_one_engine_and_folder_do_not_meddle(tmp_path):
    run = Run(tmp_path)
    best = ice.Checkpoint(
        run.to_save,
        tmp_path,
        "best",
        score_function=lambda engine: -engine.state.output,
        score_name="loss",
        global_step_transform=global_step_from_engine(run.trainer),
    )
    run.checkpoint.attach(run.trainer)
    best.attach(run.trainer)
    run.train(max_epochs=2)
    assert [hook.name for hook in run.optimizer.hooks if "Checkpoint" in hook.name] == ["Checkpoint", "Checkpoint#2"]
    last, scored = names(tmp_path)[1], names(tmp_path)[0]
    assert last == "checkpoint_10.pt"
    assert scored.startswith("best_checkpoint_")
    assert run.checkpoint.resume(run.trainer).name == last
    assert best.resume(run.trainer).name == scored


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "checkpoint_10.pt"),
        ({"filename_prefix": "a[b]*"}, "a[b]*_checkpoint_10.pt"),
        ({"filename_pattern": "last.{ext}"}, "last.pt"),
        ({"filename_pattern": "{name}-{global_step:06d}.{ext}"}, "checkpoint-000010.pt"),
        ({"global_step_transform": lambda engine, _: engine.state.optimizer_step}, "checkpoint_6.pt"),
        ({"score_function": lambda engine: engine.state.epoch / 8}, "checkpoint_0.2500.pt"),
        (
            {"score_function": lambda engine: -1.5 + engine.state.epoch, "score_name": "val_loss"},
            "checkpoint_val_loss=0.5000.pt",
        ),
    ],
    ids=["plain", "prefix", "constant", "padded", "by step", "score", "score name"],
)
def test_names_are_ignites_and_are_found_again(tmp_path, settings, expected):
    for epochs in (2, 3):
        run = Run(tmp_path, n_saved=1, **settings)
        run.checkpoint.attach(run.trainer, Events.EPOCH_COMPLETED(every=2))
        found = run.checkpoint.resume(run.trainer)
        run.train(max_epochs=epochs)
    assert found.name == expected
    assert names(tmp_path) == [expected]
    assert run.trainer.state.epoch == 3


@pytest.mark.parametrize(
    "name", ["checkpoint_0.2500.1.pt", "checkpoint_0.25.pt.pt", "checkpoint_..pt", "checkpoint_.pt"]
)
def test_a_file_beside_whose_name_has_no_score_is_left_alone(tmp_path, name):
    settings = {"score_function": lambda engine: engine.state.epoch / 8, "n_saved": 1}
    run = Run(tmp_path, **settings)
    run.checkpoint.attach(run.trainer)
    run.train(max_epochs=2)
    (tmp_path / name).write_bytes((tmp_path / "checkpoint_0.2500.pt").read_bytes())
    again = Run(tmp_path, **settings)
    assert again.checkpoint.resume(again.trainer) == tmp_path / "checkpoint_0.2500.pt"
    again.checkpoint.attach(again.trainer)
    again.train(max_epochs=3)
    assert names(tmp_path) == sorted([name, "checkpoint_0.3750.pt"])


@pytest.mark.parametrize("n_saved", [1, 2])
def test_a_run_that_starts_over_saves_from_its_beginning(tmp_path, n_saved):
    run = Run(tmp_path, n_saved=n_saved)
    run.checkpoint.attach(run.trainer)
    run.train(max_epochs=3)
    run.trainer.state.max_epochs = None
    run.trainer.run(DATA, max_epochs=2)
    assert run.checkpoint.last_checkpoint == tmp_path / "checkpoint_10.pt"
    again = Run(tmp_path)
    assert again.checkpoint.resume(again.trainer).name == "checkpoint_10.pt"
    assert_equal(again.everything(), run.everything())


def test_best_scores_survive_a_resumed_run(tmp_path):
    scores = {1: 0.9, 2: 0.5, 3: 0.7, 4: 0.6}
    for epochs in (2, 4):
        run = Run(tmp_path, n_saved=2, score_function=lambda engine: scores[engine.state.epoch])
        run.checkpoint.attach(run.trainer)
        run.checkpoint.resume(run.trainer)
        run.train(max_epochs=epochs)
    assert names(tmp_path) == ["checkpoint_0.7000.pt", "checkpoint_0.9000.pt"]


def test_the_best_scores_that_another_checkpoint_saves_survive_too(tmp_path):
    def run():
        made = Run(tmp_path / "unused")
        best = ice.Checkpoint(
            {"model": made.model}, tmp_path, "best", score_function=lambda engine: -engine.state.output, n_saved=2
        )
        latest = ice.Checkpoint({**made.to_save, "best": best}, tmp_path)
        best.attach(made.trainer, Events.ITERATION_COMPLETED)
        latest.attach(made.trainer, Events.ITERATION_COMPLETED)
        return made, best, latest

    made, best, latest = run()
    made.train(max_epochs=1)
    again, resumed, newest = run()
    assert newest.resume(again.trainer) == latest.last_checkpoint
    assert resumed.state_dict() == best.state_dict()
    again.train(max_epochs=2)
    assert len(list(tmp_path.glob("best_*.pt"))) == 2


def test_include_self_keeps_its_own_list(tmp_path):
    for epochs in (1, 2):
        run = Run(tmp_path, n_saved=1, include_self=True)
        run.checkpoint.attach(run.trainer)
        run.checkpoint.resume(run.trainer)
        run.train(max_epochs=epochs)
    assert names(tmp_path) == ["checkpoint_10.pt"]
    assert "checkpointer" in torch.load(tmp_path / "checkpoint_10.pt", weights_only=True)


def test_a_single_object_is_saved_and_resumed_without_its_name(tmp_path):
    for epochs, expected in ((1, None), (2, tmp_path / "trainer_1.pt")):
        engine = Engine(lambda engine, batch: None)
        checkpoint = ice.Checkpoint({"trainer": engine}, tmp_path).attach(engine)
        assert checkpoint.resume(engine) == expected
        engine.run([1], max_epochs=epochs)
        assert engine.state.iteration == epochs


def test_a_module_saved_alone_keeps_the_versions_of_its_layers(tmp_path):
    trainer, model = Engine(lambda engine, batch: None), torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    ice.Checkpoint({"model": model}, tmp_path).attach(trainer)
    trainer.run([1])
    saved = torch.load(tmp_path / "model_1.pt", weights_only=True)
    assert saved._metadata == model.state_dict()._metadata == {"": {"version": 1}, "0": {"version": 2}}


# -- events ---------------------------------------------------------------------------------------------------------


def test_it_saves_on_our_events_with_their_filters_and_numbers_by_their_clock(tmp_path):
    run = Run(tmp_path, n_saved=None)
    event = run.optimizer.events.OPTIMIZER_STEP_COMPLETED
    assert run.checkpoint.attach(run.trainer, event(every=2), name="every second step") is run.checkpoint
    run.train(max_epochs=2)
    assert names(tmp_path) == ["checkpoint_2.pt", "checkpoint_4.pt", "checkpoint_6.pt"]
    read = {name: torch.load(tmp_path / name, weights_only=True)["trainer"]["iteration"] for name in names(tmp_path)}
    assert read == {"checkpoint_2.pt": 4, "checkpoint_4.pt": 7, "checkpoint_6.pt": 10}
    assert "every second step" in run.optimizer.hooks


def test_a_save_on_a_completed_step_is_resumed_without_a_loss(tmp_path):
    run = Run(tmp_path)
    run.checkpoint.attach(run.trainer, run.optimizer.events.OPTIMIZER_STEP_COMPLETED(every=3))
    run.train(max_epochs=1)
    again = Run(tmp_path)
    again.checkpoint.resume(again.trainer)
    assert_equal(again.everything()["model"], run.everything()["model"])
    assert again.optimizer.clocks["step"] == 3


@pytest.mark.parametrize(("n_saved", "expected"), [(None, [10, 20, 40]), (1, [40])])
def test_a_score_is_that_of_the_step_that_asked_although_the_save_waits(tmp_path, n_saved, expected):
    run = Run(tmp_path, n_saved=n_saved, score_function=lambda engine: engine.state.score)
    event = run.optimizer.events.OPTIMIZER_STEP_COMPLETED
    scores = {1: 10, 2: 40, 3: 20}

    @run.trainer.on(event)
    def measure(engine):
        engine.state.score = scores[engine.state.optimizer_step]

    run.checkpoint.attach(run.trainer, event)

    @run.trainer.on(Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED)
    def measure_something_else(engine):
        engine.state.score = -1

    run.train(max_epochs=1)
    assert names(tmp_path) == [f"checkpoint_{score}.pt" for score in expected]
    assert torch.load(tmp_path / "checkpoint_40.pt", weights_only=True)["trainer"]["iteration"] == 4


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED(once=3), Events.EPOCH_COMPLETED])
def test_of_weights_that_are_there_for_a_validation_only_the_file_with_their_score_has_them(tmp_path, event):
    run = Run(tmp_path, score_function=lambda engine: engine.state.score)
    evaluator = Engine(lambda engine, batch: setattr(engine.state, "score", run.model.bias.sum().item()))
    run.checkpoint.attach(evaluator, Events.COMPLETED)
    other = ice.Checkpoint(run.to_save, tmp_path / "other").attach(run.trainer, event)

    @run.trainer.on(event)
    def validate(engine):
        assert other.last_checkpoint is not None  # fires SAVED_CHECKPOINT
        kept = copy.deepcopy(run.model.state_dict())
        with torch.no_grad():
            run.model.bias.fill_(7.0)
        evaluator.run([0])
        assert run.checkpoint.last_checkpoint is not None
        run.model.load_state_dict(kept)

    run.train(max_epochs=1)
    assert torch.load(tmp_path / "checkpoint_14.0000.pt", weights_only=True)["model"]["bias"].tolist() == [7.0, 7.0]


def test_it_saves_after_the_validation_that_was_there_and_after_the_last_step(tmp_path):
    run = Run(tmp_path)
    run.checkpoint.attach(run.trainer)
    seen = []
    run.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append(names(tmp_path)))
    run.optimizer.hooks.add(Events.EPOCH_COMPLETED, lambda: seen.append(names(tmp_path)), name="validate")
    run.train(max_epochs=1)
    assert seen == [[], []]
    assert torch.load(tmp_path / "checkpoint_5.pt", weights_only=True)["optimizer"]["ice_engine"]["clocks"]["step"] == 3


def test_a_name_that_is_taken_is_refused(tmp_path):
    run = Run(tmp_path)
    run.checkpoint.attach(run.trainer, name="checkpoint")
    with pytest.raises(HookError, match="'checkpoint' is on this engine already"):
        run.checkpoint.attach(run.trainer, name="checkpoint")


# -- failing writes -------------------------------------------------------------------------------------------------


def failing(folder, *, after, **settings):
    engine = Engine(lambda engine, batch: None)
    engine.logger.disabled = True
    fails = Fails(after)
    checkpoint = ice.Checkpoint({"fails": fails, "trainer": engine}, folder, **settings)
    return engine, fails, checkpoint.attach(engine)


def test_when_a_write_fails_the_previous_file_is_still_there_and_loads(tmp_path):
    engine, _, checkpoint = failing(tmp_path, after=2)
    with pytest.raises(CheckpointError, match=r"fails\['value'\] is function, which cannot be saved safely"):
        engine.run([1], max_epochs=5)
    assert names(tmp_path) == ["checkpoint_2.pt"]
    assert checkpoint.last_checkpoint == tmp_path / "checkpoint_2.pt"
    engine, _, checkpoint = failing(tmp_path, after=5)
    assert checkpoint.resume(engine) == tmp_path / "checkpoint_2.pt"
    assert engine.state.epoch == 2


def test_a_write_that_failed_is_tried_once_and_can_be_repeated(tmp_path):
    engine, fails, checkpoint = failing(tmp_path, after=1)
    with pytest.raises(CheckpointError):
        engine.run([1], max_epochs=2)
    assert fails.left == -1
    fails.left = 10
    checkpoint(engine)
    assert names(tmp_path) == ["checkpoint_2.pt"]
    assert torch.load(tmp_path / "checkpoint_2.pt", weights_only=True)["trainer"]["iteration"] == 2


def test_a_failing_write_leaves_all_of_several_files(tmp_path):
    engine, _, checkpoint = failing(tmp_path, after=3, n_saved=2)
    with pytest.raises(CheckpointError):
        engine.run([1], max_epochs=5)
    assert names(tmp_path) == ["checkpoint_2.pt", "checkpoint_3.pt"]
    assert [item.filename for item in checkpoint._saved] == ["checkpoint_2.pt", "checkpoint_3.pt"]


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from tests.test_checkpoint import Run

run = Run(Path(sys.argv[1]), background=False)
run.checkpoint.attach(run.trainer)

def press(event, arguments):
    if event == "open" and "checkpoint_10.pt" in str(arguments[0]) and arguments[1]:  # to be checked
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(press)
try:
    run.train()
except KeyboardInterrupt:
    print(run.checkpoint.last_checkpoint)
"""


def test_ctrl_c_while_a_file_is_written_ends_the_run_and_the_previous_file_is_still_there(tmp_path):
    done = python("-c", INTERRUPTED, str(tmp_path), timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "checkpoint_5.pt")
    assert names(tmp_path) == ["checkpoint_5.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_when_the_disk_is_full_the_previous_file_is_still_there_and_nothing_else(tmp_path):
    import resource

    run = Run(tmp_path)
    run.trainer.logger.disabled = True
    run.checkpoint.attach(run.trainer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run.trainer.add_event_handler(
        Events.EPOCH_STARTED(once=3),
        lambda: run.checkpoint.last_checkpoint and resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard)),
    )
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint_15\.pt cannot be written"):
            run.train(max_epochs=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["checkpoint_10.pt"]
    run = Run(tmp_path)
    run.checkpoint.resume(run.trainer)
    assert run.trainer.state.epoch == 2


def test_what_a_killed_process_left_half_written_is_no_checkpoint(tmp_path):
    file = saved(tmp_path)
    (tmp_path / "checkpoint_15.pt.0123abcd.part").write_bytes(file.read_bytes()[:100])
    run = Run(tmp_path)
    run.checkpoint.attach(run.trainer)
    assert run.checkpoint.resume(run.trainer) == file
    run.train(max_epochs=3)
    assert "checkpoint_15.pt.0123abcd.part" not in names(tmp_path)


def test_a_file_of_the_same_name_is_replaced_not_removed(tmp_path):
    run = Run(tmp_path, filename_pattern="last.{ext}")
    run.checkpoint.attach(run.trainer)
    run.train(max_epochs=3)
    assert names(tmp_path) == ["last.pt"]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["trainer"]["iteration"] == 15


# -- files that cannot be loaded ------------------------------------------------------------------------------------


def saved(folder):
    run = Run(folder, n_saved=None)
    run.checkpoint.attach(run.trainer)
    run.train(max_epochs=2)
    return folder / "checkpoint_10.pt"


def spoiled(file, how):
    data = bytearray(file.read_bytes())
    if how == "bit":
        data[len(data) // 2] ^= 1
    if how == "digest":
        data[data.rindex(b"sha256") + 12] ^= 1
    file.write_bytes(data[: {"empty": 0, "short": 100, "truncated": len(data) - 500}.get(how)])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("empty", "empty"),
        ("short", "truncated, or no checkpoint"),
        ("truncated", "truncated, or no checkpoint"),
        ("bit", "bits have changed"),
        ("digest", "its sha256 is not the one that it was written with"),
    ],
)
def test_a_damaged_file_is_named_and_passed_over(tmp_path, caplog, how, reason):
    file = saved(tmp_path)
    spoiled(file, how)
    run = Run(tmp_path)
    assert run.checkpoint.resume(run.trainer).name == "checkpoint_5.pt"
    (said,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith(f"{file} is damaged: ")
    assert reason in said
    assert run.trainer.state.iteration == 5


def test_nothing_starts_afresh_beside_checkpoints_that_are_all_damaged(tmp_path):
    file = saved(tmp_path)
    spoiled(file, "short")
    spoiled(tmp_path / "checkpoint_5.pt", "bit")
    run = Run(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*_5\.pt is .*_10\.pt is ") as caught:
        run.checkpoint.resume(run.trainer)
    assert "Move them away to start afresh" in str(caught.value)


def test_a_file_of_ignites_own_is_checked_by_its_checksums_and_loaded(tmp_path, caplog):
    file = saved(tmp_path)
    torch.save(torch.load(file, weights_only=True), file)
    assert not file.read_bytes().endswith(b"}")
    run = Run(tmp_path)
    assert run.checkpoint.resume(run.trainer) == file
    data = bytearray(file.read_bytes())
    data[data.index(run.model.weight.detach().numpy().tobytes())] ^= 1
    file.write_bytes(data)
    run = Run(tmp_path)
    assert run.checkpoint.resume(run.trainer).name == "checkpoint_5.pt"
    assert "bits of its entry" in caplog.text


def test_a_file_of_a_newer_version_is_refused_not_passed_over(tmp_path):
    file = saved(tmp_path)
    file.write_bytes(file.read_bytes().replace(b'{"ice_engine": 1,', b'{"ice_engine": 7,'))
    run = Run(tmp_path)
    with pytest.raises(CheckpointError, match="it is of version 7, this ice_engine reads 1; install a newer one"):
        run.checkpoint.resume(run.trainer)


def test_a_file_that_lacks_an_object_says_which_and_loads_nothing(tmp_path):
    file = saved(tmp_path)
    state = torch.load(file, weights_only=True)
    del state["optimizer"]
    torch.save(state, file)
    run = Run(tmp_path)
    before = run.everything()
    with pytest.raises(CheckpointError, match="it lacks optimizer of to_save; it has: model, trainer"):
        run.checkpoint.resume(run.trainer)
    assert_equal(run.everything(), before)


def test_a_file_of_another_model_says_what_does_not_fit(tmp_path):
    file = saved(tmp_path)
    run = Run(tmp_path)
    run.checkpoint.to_save = {**run.to_save, "model": torch.nn.Linear(4, 3)}
    with pytest.raises(CheckpointError, match="size mismatch for weight") as caught:
        run.checkpoint.resume(run.trainer)
    assert file.name in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    file = saved(tmp_path)
    torch.save({"model": print, "optimizer": {}, "trainer": {}}, file)
    run = Run(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint_10\.pt cannot be loaded: Weights only load failed"):
        run.checkpoint.resume(run.trainer)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to_save", "settings", "error", "match"),
    [
        ([1], {}, ArgumentTypeError, "to_save must be a dict of objects by name, such as {'model': model}, got list"),
        ({"lr": 0.1}, {}, ArgumentTypeError, "float.* should have `state_dict` method"),
        ({}, {"global_step_transform": 3}, ArgumentTypeError, "global_step_transform should be a function"),
        ({}, {"no_such_setting": 3}, TypeError, "no_such_setting"),
        ({}, {"n_saved": 0}, ArgumentValueError, "n_saved must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, to_save, settings, error, match):
    with pytest.raises(error, match=match):
        ice.Checkpoint(to_save, tmp_path, **settings)


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("I am here")
    with pytest.raises(ArgumentValueError, match=r"save_handler must be a folder, got .*file, which is a file"):
        ice.Checkpoint({}, file)
    with pytest.raises(ArgumentTypeError, match="`save_handler` should be"):
        ice.Checkpoint({}, 3)


def test_resume_needs_a_folder_and_the_trainer(tmp_path):
    run = Run(tmp_path)
    elsewhere = ice.Checkpoint(run.to_save, DiskSaver(tmp_path, require_empty=False))
    with pytest.raises(CheckpointError, match="looks into the folder given as save_handler, got another save handler"):
        elsewhere.resume(run.trainer)
    with pytest.raises(CheckpointError, match="needs the trainer in to_save"):
        ice.Checkpoint({"model": run.model}, tmp_path).resume(run.trainer)


@pytest.mark.parametrize("at", [3, 7])
def test_an_evaluator_that_is_named_before_the_trainer_is_not_taken_for_it(tmp_path, at):
    def evaluated(folder):
        run = Run(tmp_path / "unused")
        evaluator = Engine(lambda engine, batch: None)
        run.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(DATA))
        run.checkpoint = ice.Checkpoint({"evaluator": evaluator, **run.to_save}, folder)
        return run

    whole = evaluated(tmp_path / "whole").train()
    first = evaluated(tmp_path)
    first.checkpoint.attach(first.trainer, Events.ITERATION_COMPLETED(once=at))
    first.train()
    second = evaluated(tmp_path)
    second.checkpoint.resume(second.trainer)
    second.train()
    assert_equal(second.everything(), whole.everything())


def test_resume_is_for_the_trainer_whose_place_is_saved(tmp_path):
    run = Run(tmp_path)
    evaluator = Engine(lambda engine, batch: None)
    checkpoint = ice.Checkpoint({**run.to_save, "evaluator": evaluator}, tmp_path)
    with pytest.raises(CheckpointError, match="name the trainer first"):
        checkpoint.resume(evaluator)


def test_a_save_handler_of_ignite_works_as_there(tmp_path):
    run = Run(tmp_path)
    handler = ice.Checkpoint(run.to_save, DiskSaver(tmp_path, require_empty=False), n_saved=1)
    handler.attach(run.trainer)
    run.train(max_epochs=2)
    assert names(tmp_path) == ["checkpoint_10.pt"]
    handler.load_objects(run.to_save, tmp_path / "checkpoint_10.pt")


def test_a_save_handler_of_its_own_that_fails_can_be_asked_again(tmp_path):
    engine = Engine(lambda engine, batch: None)
    engine.logger.disabled = True
    written = []

    def upload(checkpoint, filename, metadata=None):
        if engine.state.iteration == 2 and not written[1:]:
            written.append("failed")
            message = "no network"
            raise OSError(message)
        written.append(filename)

    checkpoint = ice.Checkpoint({"trainer": engine}, upload).attach(engine)
    with pytest.raises(OSError, match="no network"):
        engine.run([1], max_epochs=3)
    checkpoint(engine)
    assert written == ["trainer_1.pt", "failed", "trainer_2.pt"]


def test_it_takes_ignites_arguments_in_their_order(tmp_path):
    run = Run(tmp_path)
    checkpoint = ice.Checkpoint(run.to_save, tmp_path, "best", lambda engine: engine.state.iteration, "score", 2)
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), checkpoint)
    run.train(1)
    assert names(tmp_path) == ["best_checkpoint_score=2.pt", "best_checkpoint_score=4.pt"]


def test_as_an_ignite_handler_it_numbers_by_the_events_clock_too(tmp_path):
    run = Run(tmp_path, n_saved=None)
    run.trainer.add_event_handler(run.optimizer.event("STEP_COMPLETED"), run.checkpoint)
    run.train(1)
    assert names(tmp_path) == ["checkpoint_1.pt", "checkpoint_2.pt", "checkpoint_3.pt"]


@pytest.mark.parametrize("how", ["bit", "newer", "gone"])
def test_objects_are_loaded_from_whole_files_alone(tmp_path, how):
    run = Run(tmp_path)
    run.checkpoint.attach(run.trainer, Events.COMPLETED)
    run.train(1)
    (file,) = tmp_path.iterdir()
    other = Run(tmp_path / "other")
    ice.Checkpoint.load_objects({"model": other.model}, file)
    assert_equal(other.model.state_dict(), run.model.state_dict())
    before = other.model.weight.tolist()
    if how == "bit":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "newer":
        file.write_bytes(file.read_bytes().replace(b'{"ice_engine": 1,', b'{"ice_engine": 9,'))
    else:
        file.unlink()
    reason = {"bit": "its sha256", "newer": "version 9", "gone": "not there"}[how]
    with pytest.raises(CheckpointError, match=reason):
        ice.Checkpoint.load_objects({"model": other.model}, file)
    assert other.model.weight.tolist() == before


def test_a_state_that_cannot_be_copied_is_not_counted_as_saved(tmp_path):
    run, saved = Run(tmp_path), []
    run.checkpoint.attach(run.trainer, Events.EPOCH_COMPLETED)
    run.trainer.add_event_handler(CheckpointEvents.SAVED_CHECKPOINT, lambda: saved.extend(names(tmp_path)))
    run.train(1)
    run.model.register_buffer("nowhere", torch.empty(2, device="meta"))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        run.train(2)

    assert saved == names(tmp_path) == ["checkpoint_5.pt"]
    assert run.checkpoint.last_checkpoint == tmp_path / "checkpoint_5.pt"


def test_steps_of_an_optimizer_that_takes_the_place_of_one_that_is_gone_wait_for_the_copy_too(tmp_path):
    model = torch.nn.Linear(4, 2)
    made = [ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1))]
    trainer = Engine(lambda _, batch: made[-1].backward(mse_loss(model(batch[0]), batch[1])))
    checkpoint = ice.Checkpoint({"model": model, "trainer": trainer}, tmp_path)
    checkpoint.attach(trainer, Events.ITERATION_COMPLETED)
    made[-1].attach(trainer)
    trainer.run(DATA)
    assert made[-1]._waits
    made.pop().detach()
    gc.collect()
    assert not checkpoint._under_way._held  # or else what comes to be at its address would be taken for it
    made.append(ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1)))
    made[-1].attach(trainer)
    trainer.run(DATA)
    assert made[-1]._waits
