"""The likeliest mistakes, each made as a user makes it; the message must be enough to mend it.

A warning is an error here, as in all tests.
"""

import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.engine.deterministic import DeterministicEngine
from ignite.handlers import LinearCyclicalScheduler

import ice_engine as ice
from ice_engine import errors

MISTAKES = []
BATCHES = [torch.ones(4, 2)] * 8


def mistake(error, message):
    """Register a function that makes a mistake with the parts of a trainer; FOLDER stands for that of the test."""

    def add(make):
        MISTAKES.append(pytest.param(make, error, message, id=make.__name__))
        return make

    return add


def loss_of(model, batch):
    return model(batch).square().mean()


def trainer(step=None, *, attach=True, **settings):
    """What a user has: a model, an optimizer and an engine whose step may be wrong."""
    model = torch.nn.Linear(2, 1)
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), **settings)
    step = step or (lambda its, batch: its.optimizer.backward(loss_of(its.model, batch)))
    its = SimpleNamespace(model=model, optimizer=optimizer, scaler=settings.get("grad_scaler"))
    its.engine = Engine(lambda engine, batch: step(its, batch))
    if attach:
        optimizer.attach(its.engine)
    return its


# -- the train_step -------------------------------------------------------------


@mistake(
    errors.IceEngineWarning,
    "backward() was called 32 times and update() never: optimizer 'optimizer' does not step; call "
    "optimizer.attach(engine) before the run, or optimizer.update() after each micro-batch",
)
def attach_is_forgotten(_):
    trainer(attach=False).engine.run(BATCHES * 5)


@mistake(
    errors.IceEngineWarning,
    "step() by hand in a run whose engine steps optimizer 'optimizer': gradients are applied past its"
    " window, clipping and clocks. Take step() out of train_step, or do not attach",
)
def step_is_called_in_train_step(_):
    def step(its, batch):
        its.optimizer.backward(loss_of(its.model, batch))
        its.optimizer.step()

    trainer(step).engine.run(BATCHES)


@mistake(
    errors.BackwardError,
    "zero_grad() inside an open window of optimizer 'optimizer' would lose the gradients of 1 "
    "micro-batches; take it out of train_step, gradients are cleared after every step",
)
def zero_grad_is_called_in_train_step(_):
    def step(its, batch):
        its.optimizer.zero_grad()
        its.optimizer.backward(loss_of(its.model, batch))

    trainer(step, accumulation_steps=4).engine.run(BATCHES)


@mistake(
    errors.BackwardError,
    "gradients of optimizer 'optimizer' were cleared inside its window, by model.zero_grad()? Take "
    "that out of train_step, gradients are cleared after every step",
)
def the_model_clears_its_gradients_in_train_step(_):
    def step(its, batch):
        its.model.zero_grad()
        its.optimizer.backward(loss_of(its.model, batch))

    trainer(step, accumulation_steps=4).engine.run(BATCHES)


FOREIGN_GRADIENTS = (
    "parameters of optimizer 'optimizer' have gradients that did not come from its backward(); call "
    "optimizer.backward(loss) instead of loss.backward() (ice.create_trainer(model, optimizer, "
    "loss_fn) does, create_supervised_trainer does not), and keep another optimizer's loss from them: "
    "write with other.toggle(module): around it, of the module that has them, or detach(); "
    "optimizer.zero_grad() clears what is left from before"
)


@mistake(errors.BackwardError, FOREIGN_GRADIENTS)
def the_trainer_is_ignites(_):
    its = trainer(attach=False)
    engine = create_supervised_trainer(its.model, its.optimizer, torch.nn.MSELoss())
    its.optimizer.attach(engine)
    engine.run([(torch.ones(4, 2), torch.ones(4, 1))])


@mistake(errors.BackwardError, FOREIGN_GRADIENTS)
def the_loss_goes_backward_by_itself(_):
    trainer(lambda its, batch: loss_of(its.model, batch).backward()).engine.run(BATCHES)


@mistake(
    errors.IceEngineWarning,
    "optimizer 'optimizer' got no loss in epoch 1: its backward() was not called; call "
    "optimizer.backward(loss) in train_step",
)
def no_loss_goes_backward(_):
    trainer(lambda its, batch: loss_of(its.model, batch).item()).engine.run(BATCHES)


NOBODY_STEPS = (
    "optimizer 'optimizer' has a loss from outside train_step, and nobody would step with it; call backward() in "
    "train_step, such as where it ends an episode, or call optimizer.update() after it"
)


@mistake(errors.BackwardError, NOBODY_STEPS)
def a_handler_calls_backward_when_the_episode_is_over(_):
    its = trainer(lambda its, batch: None)
    its.engine.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: its.optimizer.backward(loss_of(its.model, BATCHES[0])) and None
    )
    its.engine.run(BATCHES, max_epochs=3)


@mistake(errors.BackwardError, NOBODY_STEPS)
def a_handler_calls_backward_after_the_iteration(_):
    its = trainer()
    its.engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: its.optimizer.backward(loss_of(its.model, BATCHES[0])) and None
    )
    its.engine.run(BATCHES)


@mistake(
    errors.ArgumentTypeError,
    "loss must be a tensor, got float; pass the loss itself, not loss.item()",
)
def backward_is_given_a_number(_):
    trainer(lambda its, batch: its.optimizer.backward(loss_of(its.model, batch).item())).engine.run(BATCHES)


@mistake(
    errors.BackwardError,
    "loss must be a scalar, got shape (4, 1); reduce it first: loss.mean()",
)
def backward_is_given_a_loss_for_each_item(_):
    trainer(lambda its, batch: its.optimizer.backward(its.model(batch))).engine.run(BATCHES)


@mistake(
    errors.BackwardError,
    "loss requires no grad: no trainable parameter is behind it; look for detach(), torch.no_grad() "
    "or frozen parameters between the model and the loss",
)
def the_loss_is_computed_without_gradients(_):
    trainer(torch.no_grad()(lambda its, batch: its.optimizer.backward(loss_of(its.model, batch)))).engine.run(BATCHES)


@mistake(
    errors.BackwardError,
    "backward() outside a run: optimizer 'optimizer' is attached to an engine that is not running, so"
    " nobody would step; call it in train_step, or optimizer.detach() for a loop of your own",
)
def the_evaluator_trains(_):
    its = trainer()
    Engine(lambda engine, batch: its.optimizer.backward(loss_of(its.model, batch))).run(BATCHES)


# -- weights -------------------------------------------------------------


@mistake(
    errors.ArgumentValueError,
    "weight must be finite and at least 0, got -1.0",
)
def a_weight_is_negative(_):
    trainer(lambda its, batch: its.optimizer.backward(loss_of(its.model, batch), weight=-1)).engine.run(BATCHES)


@mistake(
    errors.ArgumentValueError,
    "weight must be finite and at least 0, got nan",
)
def a_weight_is_nan(_):
    trainer(lambda its, batch: its.optimizer.backward(loss_of(its.model, batch), weight=float("nan"))).engine.run(
        BATCHES
    )


@mistake(
    errors.ArgumentTypeError,
    "weight must be a number, got str; it is the number of items (samples, tokens) behind the loss",
)
def a_weight_is_a_string(_):
    trainer(lambda its, batch: its.optimizer.backward(loss_of(its.model, batch), weight="4")).engine.run(BATCHES)


@mistake(
    errors.BackwardError,
    "earlier losses of this window came with no weight, this one with one; pass weight= to every "
    "backward() call or to none",
)
def some_losses_have_a_weight(_):
    def step(its, batch):
        its.optimizer.backward(loss_of(its.model, batch), weight=None if its.engine.state.iteration == 1 else 4)

    trainer(step, accumulation_steps=2).engine.run(BATCHES)


@mistake(
    errors.ArgumentValueError,
    "effective_batch_size=8 counts items, and this loss came without their number: "
    "optimizer.backward(loss, weight=n), with n the samples or tokens behind it",
)
def items_are_counted_and_not_given(_):
    trainer(effective_batch_size=8).engine.run(BATCHES)


# -- the GradScaler -------------------------------------------------------------


@mistake(
    errors.BackwardError,
    "backward() was given a loss that the GradScaler has scaled already; take scale(), unscale_(), "
    "step() and update() of the GradScaler out of train_step, the optimizer that was given it calls "
    "them",
)
def the_loss_is_scaled_twice(_):
    def step(its, batch):
        its.optimizer.backward(its.scaler.scale(loss_of(its.model, batch)))

    trainer(step, grad_scaler=torch.amp.GradScaler("cpu")).engine.run(BATCHES)


@mistake(
    errors.BackwardError,
    "the GradScaler's unscale_() or step() was called inside a window; take scale(), unscale_(), "
    "step() and update() of the GradScaler out of train_step, the optimizer that was given it calls "
    "them",
)
def the_scaler_unscales_in_train_step(_):
    def step(its, batch):
        its.optimizer.backward(loss_of(its.model, batch))
        its.scaler.unscale_(its.optimizer)

    trainer(step, grad_scaler=torch.amp.GradScaler("cpu")).engine.run(BATCHES)


@mistake(
    errors.BackwardError,
    "the loss scale was changed inside a window, whose gradients are of two scales now; take "
    "scaler.update() and scaler.load_state_dict() out of train_step, the optimizer adapts its scale "
    "itself",
)
def the_scaler_steps_the_inner_optimizer(_):
    def step(its, batch):
        its.optimizer.backward(loss_of(its.model, batch))
        its.scaler.step(its.optimizer.inner)
        its.scaler.update()

    trainer(step, grad_scaler=torch.amp.GradScaler("cpu")).engine.run(BATCHES)


@mistake(
    errors.ArgumentTypeError,
    "grad_scaler must be a torch.amp.GradScaler or None, got bool; such as torch.amp.GradScaler('cuda')",
)
def the_scaler_is_a_flag(_):
    trainer(grad_scaler=True)


# -- how the optimizer is made -------------------------------------------------------------


@mistake(
    errors.ArgumentTypeError,
    "optimizer must be a torch.optim.Optimizer or a factory of one, got Linear; such as "
    "Optimizer(torch.optim.AdamW(model.parameters(), lr=3e-3))",
)
def it_is_given_the_model(_):
    ice.Optimizer(torch.nn.Linear(2, 1))


@mistake(
    errors.ArgumentTypeError,
    "optimizer must be a torch.optim.Optimizer or a factory of one, got generator; such as "
    "Optimizer(torch.optim.AdamW(model.parameters(), lr=3e-3))",
)
def it_is_given_parameters_alone(_):
    ice.Optimizer(torch.nn.Linear(2, 1).parameters())


@mistake(
    errors.ArgumentValueError,
    "the factory <class 'torch.optim.sgd.SGD'> needs params: Optimizer(factory, model.parameters())",
)
def a_factory_has_no_parameters(_):
    ice.Optimizer(torch.optim.SGD)


@mistake(
    errors.ArgumentTypeError,
    "Optimizer(...) got an unexpected keyword argument 'lr', which torch.optim.SGD takes: "
    "Optimizer(functools.partial(torch.optim.SGD, lr=0.1), model.parameters())",
)
def what_the_factory_takes_is_given_beside_it(_):
    ice.Optimizer(torch.optim.SGD, torch.nn.Linear(2, 1).parameters(), lr=0.1)


@mistake(
    errors.ArgumentTypeError,
    "Optimizer(...) got an unexpected keyword argument 'accum_steps'; did you mean accumulation_steps=?",
)
def an_argument_is_misspelt(_):
    trainer(accum_steps=4)


@mistake(
    errors.ArgumentTypeError,
    "Optimizer(...) missing a required argument: 'optimizer'",
)
def an_optimizer_is_made_of_nothing(_):
    ice.Optimizer()


@mistake(
    errors.ArgumentTypeError,
    "params must be parameters, pairs or groups, got Linear; pass model.parameters()",
)
def a_factory_is_given_the_model(_):
    ice.Optimizer(torch.optim.SGD, torch.nn.Linear(2, 1))


@mistake(
    errors.ArgumentValueError,
    "params is empty; model.parameters() can be gone through once, so pass a new one here, not one "
    "that was counted or printed before",
)
def a_generator_is_used_up(_):
    parameters = torch.nn.Linear(2, 1).parameters()
    assert sum(parameter.numel() for parameter in parameters) == 3
    ice.Optimizer(functools.partial(torch.optim.SGD, lr=0.1), parameters)


@mistake(
    errors.ArgumentTypeError,
    "optimizer is wrapped already; use it as it is or, for other settings, wrap a new torch optimizer: "
    "Optimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), ...)",
)
def it_is_wrapped_twice(_):
    ice.Optimizer(trainer().optimizer)


@mistake(
    errors.ArgumentTypeError,
    "this SGD is wrapped already, by optimizer 'optimizer'; use that one or, for other settings, make a new SGD",
)
def what_is_inside_it_is_wrapped_again(_):
    its = trainer()
    ice.Optimizer(its.optimizer.inner)


@mistake(
    errors.ArgumentValueError,
    "accumulation_steps must be at least 1, got 0",
)
def a_window_is_of_no_micro_batches(_):
    trainer(accumulation_steps=0)


@mistake(
    errors.ArgumentValueError,
    "tail must be one of 'step', 'carry', 'drop'; got 'setp'",
)
def the_tail_is_misspelt(_):
    trainer(tail="setp")


@mistake(
    errors.ArgumentValueError,
    "nonfinite must be one of None, 'skip', 'raise', 'off'; got 'ignore'",
)
def the_policy_is_misspelt(_):
    trainer(nonfinite="ignore")


@mistake(
    errors.ArgumentValueError,
    "sharding must be one of None, 'zero1'; got 'zero3'",
)
def the_sharding_is_misspelt(_):
    trainer(sharding="zero3")


@mistake(
    errors.ArgumentValueError,
    "sharding='zero1' needs a factory, as each rank makes the state of its own shard: "
    "Optimizer(functools.partial(SGD, lr=...), model.parameters(), sharding=...)",
)
def an_optimizer_that_is_there_would_be_sharded(_):
    trainer(sharding="zero1")


@mistake(
    errors.ArgumentTypeError,
    "clip must be callable, got 1.0; such as clip=ice.clip_norm(1.0)",
)
def the_clip_is_a_number(_):
    trainer(clip=1.0)


@mistake(
    errors.ArgumentTypeError,
    "clip must be callable, got 'norm'; such as clip=ice.clip_norm(1.0)",
)
def the_clip_is_a_name(_):
    trainer(clip="norm")


@mistake(
    errors.ArgumentTypeError,
    "clip must be one callable, got [clip_value(0.5), clip_norm(1.0)]; to call several, one after the other: "
    "clip=lambda parameters: (clips[0](parameters), clips[1](parameters))[0]",
)
def there_are_two_clips(_):
    clips = [ice.clip_value(0.5), ice.clip_norm(1.0)]
    trainer(clip=lambda parameters: (clips[0](parameters), clips[1](parameters))[0]).engine.run(BATCHES)  # as it says
    trainer(clip=clips)


@mistake(
    errors.ArgumentTypeError,
    "clip is the function clip_norm itself; call it, with its limit: clip=ice.clip_norm(...)",
)
def the_clip_has_no_limit(_):
    trainer(clip=ice.clip_norm)


@mistake(
    errors.ArgumentTypeError,
    "clip is called with the parameters alone, and clip_grad_norm_ cannot be: missing a required "
    "argument: 'max_norm'; write clip=ice.clip_norm(1.0), or bind the rest with functools.partial",
)
def the_clip_is_torchs(_):
    trainer(clip=torch.nn.utils.clip_grad_norm_)


# -- param groups -------------------------------------------------------------


@mistake(
    errors.ArgumentValueError,
    "rules['baias'] matches no parameter; did you mean 'bias'?",
)
def a_pattern_takes_nothing(_):
    ice.param_groups(torch.nn.Linear(2, 1), {"baias": {"weight_decay": 0.0}}, default={})


@mistake(
    errors.ArgumentValueError,
    "no rule takes 'weight'; pass default={} to train them with the optimizer's own settings, or add a rule for them",
)
def a_parameter_is_left_over(_):
    ice.param_groups(torch.nn.Linear(2, 1), {"bias": {"weight_decay": 0.0}})


@mistake(
    errors.ArgumentValueError,
    "param group 0 ('bias') has 'learning_rate', which its optimizer does not read; write 'lr', or "
    "another name if it is an entry of your own",
)
def an_entry_has_another_librarys_name(_):
    groups = ice.param_groups(torch.nn.Linear(2, 1), {"bias": {"learning_rate": 0.01}}, default={})
    ice.Optimizer(torch.optim.SGD(groups, lr=0.1))


@mistake(
    errors.ArgumentValueError,
    "param group 0 ('bias') has 'weight_deacy', which its optimizer does not read; write "
    "'weight_decay', or another name if it is an entry of your own",
)
def an_entry_is_misspelt(_):
    groups = ice.param_groups(torch.nn.Linear(2, 1), {"bias": {"weight_deacy": 0.0}}, default={})
    ice.Optimizer(functools.partial(torch.optim.SGD, lr=0.1), groups)


# -- processors and schedules -------------------------------------------------------------


@mistake(
    errors.MissingKeyError,
    "processor 'cosine' writes 'learning_rate', which param group 0 ('group_0') lacks; it has: lr, "
    "momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused, "
    "initial_lr; did you mean 'lr'?",
)
def a_schedule_writes_a_misspelt_entry(_):
    trainer(processors=[ice.schedules.cosine(total=8, dst="learning_rate")])


@mistake(
    errors.UnknownKeyError,
    "'learning_rate' is not an entry of param group 0 ('group_0'); it has: lr, momentum, dampening, "
    "weight_decay, nesterov, maximize, foreach, differentiable, fused, initial_lr; did you mean 'lr'?",
)
def a_processor_writes_an_unknown_entry(_):
    def process(group):
        group["learning_rate"] = 0.1
        return group

    trainer(processors=[process]).engine.run(BATCHES)


@mistake(
    errors.ProcessorReturnError,
    "processor 'process' returned NoneType for param group 0 ('group_0'); a processor returns a "
    "mapping: add `return group`, or give a decorated one its dst=",
)
def a_processor_returns_nothing(_):
    def process(group):
        group["lr"] = 0.1

    trainer(processors=[process]).engine.run(BATCHES)


@mistake(
    errors.ProcessorReturnError,
    "processor 'half' returned float for param group 0 ('group_0'); a processor returns a mapping: "
    "add `return group`, or give a decorated one its dst=",
)
def a_decorated_function_has_no_dst(_):
    @ice.dictprocess
    def half(lr):
        return lr / 2

    trainer(processors=[half]).engine.run(BATCHES)


@mistake(
    errors.ProcessorValueError,
    "'lr' of param group 0 ('group_0') would become -0.1; it must be at least 0, or the loss is climbed",
)
def a_processor_makes_the_lr_negative(_):
    trainer(processors=[ice.dictprocess(lambda lr: -lr)(dst="lr")]).engine.run(BATCHES)


@mistake(
    errors.ArgumentTypeError,
    "processors must be a list, got cosine(total=8); write processors=[...]",
)
def one_processor_is_no_list(_):
    trainer(processors=ice.schedules.cosine(total=8))


@mistake(
    errors.ArgumentTypeError,
    "processors[0] is constant(factor: float = 1.0, *, unit: Literal['step', 'iteration', 'epoch'] = "
    "'step', dst: str = 'lr') -> ice_engine.processors.schedule.Schedule, which is not called with a "
    "mapping; if it makes a processor, call it: constant(...)",
)
def a_schedule_is_not_called(_):
    trainer(processors=[ice.schedules.constant])


@mistake(
    errors.ArgumentTypeError,
    "processors[0] is the scheduler StepLR, which is no processor; take one of ours, such as "
    "ice.schedules.cosine(), or leave it out and step it at OPTIMIZER_STEP_COMPLETED",
)
def a_schedule_of_torch_is_among_the_processors(_):
    inner = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1)
    ice.Optimizer(inner, processors=[torch.optim.lr_scheduler.StepLR(inner, 3)])


@mistake(
    errors.ArgumentTypeError,
    "processors[0] is the scheduler LinearCyclicalScheduler, which is no processor; take one of ours,"
    " such as ice.schedules.cosine(), or leave it out and step it at OPTIMIZER_STEP_COMPLETED",
)
def a_schedule_of_ignite_is_among_the_processors(_):
    inner = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1)
    ice.Optimizer(inner, processors=[LinearCyclicalScheduler(inner, "lr", 1.0, 0.0, 8)])


@mistake(
    errors.ArgumentValueError,
    "cosine(warmup=...) must be below total=4, which includes it, got 10",
)
def a_warmup_is_longer_than_the_schedule(_):
    trainer(processors=[ice.schedules.cosine(total=4, warmup=10)])


@mistake(
    errors.ArgumentValueError,
    "plan() needs epoch_length and max_epochs (or max_iters): optimizer 'optimizer' is attached to no"
    " engine; write optimizer.plan(epoch_length=len(loader), max_epochs=...)",
)
def a_plan_has_no_length(_):
    trainer(attach=False, processors=[ice.schedules.cosine()]).optimizer.plan()


@mistake(
    errors.ArgumentTypeError,
    "epoch_length must be an int, got list; if its length is meant: epoch_length=len(...)",
)
def a_plan_is_given_the_data(_):
    trainer(processors=[ice.schedules.cosine()]).optimizer.plan(epoch_length=BATCHES, max_epochs=2)


# -- attach -------------------------------------------------------------


@mistake(
    errors.AttachError,
    "optimizer 'optimizer' is attached to this engine already; call optimizer.detach() first",
)
def it_is_attached_twice(_):
    its = trainer()
    its.optimizer.attach(its.engine)


@mistake(
    errors.ArgumentTypeError,
    "engine must be an ignite.engine.Engine, got Linear",
)
def it_is_attached_to_the_model(_):
    its = trainer(attach=False)
    its.optimizer.attach(its.model)


@mistake(
    errors.AttachError,
    "an optimizer named 'optimizer' is attached to this engine already; give each its own: "
    "Optimizer(..., name='generator')",
)
def two_optimizers_have_one_name(_):
    trainer(attach=False).optimizer.attach(trainer().engine)


@mistake(
    errors.AttachError,
    "optimizers 'optimizer' and 'second' share 2 parameters ('param_groups.0.params.0'...); each "
    "would step on the other's gradients; give every parameter to one optimizer, or, if a new one takes "
    "the place of an old one, call old.detach() first or make the engine anew",
)
def two_optimizers_share_the_model(_):
    its = trainer()
    ice.Optimizer(torch.optim.SGD(its.model.parameters(), lr=0.1), name="second").attach(its.engine)


@mistake(
    errors.AttachError,
    "optimizers 'optimizer' and 'optimizer' share 2 parameters ('param_groups.0.params.0'...); each "
    "would step on the other's gradients; give every parameter to one optimizer, or, if a new one takes "
    "the place of an old one, call old.detach() first or make the engine anew",
)
def a_cell_that_makes_the_optimizer_is_run_again(_):
    its = trainer()
    new = ice.Optimizer(torch.optim.SGD(its.model.parameters(), lr=0.1), accumulation_steps=2)
    new.attach(its.engine)


@mistake(
    errors.ArgumentValueError,
    "name must be an identifier, got 'my optimizer'; it prefixes events and engine.state attributes, "
    "such as name='generator' for GENERATOR_STEP_COMPLETED and engine.state.generator_step",
)
def a_name_has_a_space(_):
    trainer(name="my optimizer")


@mistake(
    errors.ArgumentTypeError,
    "optimizer must be an ice_engine.Optimizer, got SGD; wrap it: ice.Optimizer(optimizer)",
)
def a_trainer_is_made_of_a_torch_optimizer(_):
    model = torch.nn.Linear(2, 1)
    ice.create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.MSELoss())


@mistake(
    errors.ArgumentTypeError,
    "loss_fn is an optimizer, Optimizer; the order is create_trainer(model, optimizer, loss_fn)",
)
def a_trainer_is_made_in_another_order(_):
    its = trainer(attach=False)
    ice.create_trainer(its.model, torch.nn.functional.mse_loss, its.optimizer)


@mistake(
    errors.ArgumentTypeError,
    "weight is called as weight(x, y), and <lambda> cannot be: too many positional arguments; such as "
    "weight=lambda x, y: len(y)",
)
def a_weight_is_of_the_batch(_):
    its = trainer(attach=False)
    ice.create_trainer(its.model, its.optimizer, torch.nn.MSELoss(), weight=lambda batch: len(batch[0]))


# -- state -------------------------------------------------------------


@mistake(
    errors.StateDictError,
    "not an optimizer's state dict: state and param_groups missing; it has weight, bias. Of a "
    "checkpoint, give it the optimizer's part: optimizer.load_state_dict(checkpoint['optimizer'])",
)
def the_models_state_goes_to_the_optimizer(_):
    its = trainer()
    its.optimizer.load_state_dict(its.model.state_dict())


@mistake(
    errors.StateDictError,
    "not an optimizer's state dict: state and param_groups missing; it has model, optimizer. Of a "
    "checkpoint, give it the optimizer's part: optimizer.load_state_dict(checkpoint['optimizer'])",
)
def a_whole_checkpoint_goes_to_the_optimizer(_):
    its = trainer()
    its.optimizer.load_state_dict({"model": its.model.state_dict(), "optimizer": its.optimizer.state_dict()})


@mistake(
    errors.CheckpointError,
    "resume() needs the trainer in to_save, or its epoch would start anew: to_save={'trainer': trainer, ...}",
)
def a_run_is_resumed_without_its_trainer(folder):
    its = trainer()
    ice.Checkpoint({"model": its.model, "optimizer": its.optimizer}, folder).attach(its.engine).resume(its.engine)


@mistake(
    errors.IceEngineWarning,
    "resume() gives optimizer 'optimizer' its state back, and not the parameters it trains, which no "
    "module of to_save has: to_save={'model': model, ...}",
)
def a_run_is_resumed_without_its_model(folder):
    its = trainer()
    checkpoint = ice.Checkpoint({"optimizer": its.optimizer, "trainer": its.engine}, folder).attach(its.engine)
    its.engine.run(BATCHES)
    checkpoint.resume(its.engine)


@mistake(
    errors.IceEngineWarning,
    "the engine goes on at iteration 8, optimizer 'optimizer' starts at step 0, and so do its "
    "schedules; load its state too: optimizer.load_state_dict(...)",
)
def a_run_is_resumed_without_its_optimizer(folder):
    for epochs in (1, 2):
        its = trainer()
        checkpoint = ice.Checkpoint({"model": its.model, "trainer": its.engine}, folder).attach(its.engine)
        checkpoint.resume(its.engine)
        its.engine.run(BATCHES, max_epochs=epochs)


@mistake(
    errors.CheckpointError,
    "resume() from FOLDER/checkpoint_8.pt: FOLDER/checkpoint_8.pt cannot be loaded: it lacks net of "
    "to_save; it has: model, optimizer, trainer, ice_engine. It is the only one. To load what fits "
    "into a model that changed: state = torch.load(file, weights_only=True), then "
    "model.load_state_dict(..., strict=False) and optimizer.load_state_dict(..., strict=False)",
)
def a_run_is_resumed_under_another_name(folder):
    for name in ("model", "net"):
        its = trainer()
        saved = {name: its.model, "optimizer": its.optimizer, "trainer": its.engine}
        ice.Checkpoint(saved, folder).attach(its.engine).resume(its.engine)
        its.engine.run(BATCHES)


@mistake(
    errors.ArgumentTypeError,
    "to_save must be a dict of objects by name, such as {'model': model}, got Optimizer",
)
def a_checkpoint_is_of_one_object(folder):
    ice.Checkpoint(trainer().optimizer, folder)


@mistake(
    errors.ArgumentTypeError,
    "to_save has a DeterministicEngine, whose state cannot be saved safely; make it an Engine, as ice.create_trainer "
    "does: a checkpoint in a folder keeps all random generators and the place in the data itself",
)
def a_checkpoint_is_of_a_deterministic_engine(folder):
    its = trainer()
    engine = DeterministicEngine(lambda engine, batch: None)
    ice.Checkpoint({"trainer": engine, "model": its.model, "optimizer": its.optimizer}, folder)


# -- events and hooks -------------------------------------------------------------


@mistake(
    errors.AttachError,
    "optimizer 'optimizer' is not attached to an engine; call optimizer.attach(engine) first",
)
def hooks_are_asked_for_before_attach(_):
    trainer(attach=False).optimizer.hooks.add(Events.STARTED, lambda: None)


@mistake(
    errors.HookSignatureError,
    "hook 'show' is <lambda>(engine, batch); ITERATION_COMPLETED calls it with (engine) or (). Bind "
    "other parameters with functools.partial, or read engine.state",
)
def a_hook_takes_the_batch(_):
    trainer().optimizer.hooks.add(Events.ITERATION_COMPLETED, lambda engine, batch: None, name="show")


@mistake(
    errors.ArgumentTypeError,
    "hook must be callable, got NoneType; pass the function itself: report, not report()",
)
def a_hook_is_called_where_it_is_added(_):
    def show():
        pass

    trainer().optimizer.hooks.add(Events.ITERATION_COMPLETED, show())


@mistake(
    errors.ArgumentTypeError,
    "event and hook are swapped; the order is hooks.add(event, hook)",
)
def a_hook_is_added_in_another_order(_):
    trainer().optimizer.hooks.add(lambda: None, Events.ITERATION_COMPLETED(every=2))


@mistake(
    errors.HookError,
    "hook 'show': GENERATOR_STEP_COMPLETED is not an event of this engine; attach the optimizer of "
    "that name first, or engine.register_events(...)",
)
def a_hook_is_on_the_event_of_another_optimizer(_):
    event = ice.optimizer_events("generator").GENERATOR_STEP_COMPLETED
    trainer().optimizer.hooks.add(event, lambda: None, name="show")


@mistake(
    errors.HookError,
    "hook 'show' cannot go on EXCEPTION_RAISED: with any handler there Ignite swallows the exception "
    "and goes on with the next epoch; wrap engine.run() in try/except instead",
)
def a_hook_would_swallow_exceptions(_):
    trainer().optimizer.hooks.add(Events.EXCEPTION_RAISED, lambda: None, name="show")


@mistake(
    errors.ArgumentValueError,
    "event() must be one of 'GRADIENTS_READY', 'STEP_STARTED', 'STEP_COMPLETED', 'STEP_SKIPPED'; got 'STEPS_COMPLETED'",
)
def an_event_is_misspelt(_):
    trainer().optimizer.event("STEPS_COMPLETED")


@mistake(
    AttributeError,
    "OptimizerEvents has no STEP_COMPLETED, only OPTIMIZER_GRADIENTS_READY, OPTIMIZER_STEP_STARTED, "
    "OPTIMIZER_STEP_COMPLETED, OPTIMIZER_STEP_SKIPPED",
)
def an_event_has_no_prefix(_):
    Engine(lambda engine, batch: None).add_event_handler(ice.OptimizerEvents.STEP_COMPLETED, lambda: None)


@mistake(
    errors.HookError,
    "OPTIMIZER_STEP_COMPLETED is not an event of this engine, which has GENERATOR_STEP_COMPLETED; write "
    "optimizer.event('STEP_COMPLETED'), of an optimizer that is attached",
)
def a_handler_is_on_the_event_of_another_name(_):
    its = trainer(attach=False, name="generator")
    engine = ice.create_trainer(its.model, its.optimizer, torch.nn.MSELoss())
    engine.add_event_handler(its.optimizer.event("STEP_COMPLETED")(every=2), lambda: None)  # as it says
    engine.on(ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED(every=2))(lambda: None)


# -- what is recorded -------------------------------------------------------------


@mistake(
    errors.AttachError,
    "optimizer 'optimizer' is not attached to this engine; call optimizer.attach(engine) before",
)
def tensorboard_has_an_optimizer_that_is_not_attached(folder):
    its = trainer(attach=False)
    ice.TensorBoard(folder).attach(its.engine, its.optimizer)


@mistake(
    errors.AttachError,
    "TensorBoard writes what an ice.Optimizer does, got SGD; wrap it, and attach that to the engine: "
    "ice.Optimizer(optimizer).attach(engine)",
)
def tensorboard_has_a_torch_optimizer(folder):
    its = trainer()
    ice.TensorBoard(folder).attach(its.engine, its.optimizer.inner)


@mistake(
    errors.AttachError,
    "TensorBoard writes what an ice.Optimizer does, got Engine; an evaluator goes by name: "
    "TensorBoard.attach(engine, optimizer, evaluators={'validation': evaluator})",
)
def an_evaluator_stands_among_the_optimizers(folder):
    its = trainer()
    ice.TensorBoard(folder).attach(its.engine, its.optimizer, Engine(lambda engine, batch: None))


@mistake(
    errors.AttachError,
    "this engine has a Ledger already, which can write of several optimizers; leave this one out",
)
def a_run_has_two_ledgers(folder):
    its = trainer()
    for name in ("a.jsonl", "b.jsonl"):
        ice.Ledger(folder / name).attach(its.engine, its.optimizer)


@mistake(
    errors.ArgumentValueError,
    "path must be a file such as 'FOLDER/ledger.jsonl', got the folder 'FOLDER'",
)
def a_ledger_is_a_folder(folder):
    ice.Ledger(folder)


@mistake(
    errors.ArgumentValueError,
    "measure() must be one of 'grad_norm', 'noise_scale', 'update_ratio', 'times'; got 'gradnorm'",
)
def what_is_measured_is_misspelt(_):
    trainer().optimizer.measure("gradnorm")


@pytest.mark.parametrize(("make", "error", "message"), MISTAKES)
def test_the_message_says_what_was_found_and_how_to_mend_it(tmp_path, make, error, message):
    if error is not errors.IceEngineWarning:  # what else is said on the way
        warnings.simplefilter("ignore", errors.IceEngineWarning)
    with pytest.raises(error) as caught:
        make(tmp_path)
    assert str(caught.value).replace(str(tmp_path), "FOLDER") == message


# -- processes that do not know of each other -------------------------------------------------------------------


def test_under_a_launcher_without_a_process_group_attach_warns(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    optimizer = ice.Optimizer(torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1))

    with pytest.warns(ice.IceEngineWarning, match=r"process 2 of WORLD_SIZE=4.*init_process_group\(\)") as said:
        optimizer.attach(Engine(lambda engine, batch: None))

    assert said[0].filename == __file__


def test_one_process_of_a_launcher_is_alone_on_purpose(monkeypatch, recwarn):
    monkeypatch.setenv("WORLD_SIZE", "1")

    ice.Optimizer(torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)).attach(
        Engine(lambda engine, batch: None)
    )

    assert not recwarn
