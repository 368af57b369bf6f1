"""Param groups by name: who takes which parameter, what is refused, and what training makes of them."""

import functools
import re

import pytest
import torch
from ignite.engine import Engine
from torch import nn

import ice_engine as ice
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, MissingKeyError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.fc(self.norm(x)).relu()


class Transformer(nn.Module):
    """As a ViT: a parameter of its own, an embedding, blocks, a final norm and a head."""

    def __init__(self, blocks=3):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4))
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 5, bias=False)
        self.lm_head.weight = self.embed.weight


def members(groups):
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def entries(group):
    return {key: value for key, value in group.items() if key != "params"}


# -- rules --------------------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_takes_a_parameter_and_the_default_the_rest():
    model = Transformer(1)
    rules = {r"^head\.weight": {"name": "top", "lr": 0.3}, r"^(head|norm)\.": {"lr": 0.1, "mine": [1]}}

    groups = ice.param_groups(model, rules, default={"weight_decay": 0.5})

    assert members(groups) == {
        "top": ["head.weight"],
        r"^(head|norm)\.": ["norm.weight", "norm.bias", "head.bias"],
        "default": [
            *("position", "embed.weight", "embed.bias"),
            *("blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.0.fc.weight", "blocks.0.fc.bias"),
        ],
    }
    assert [entries(group) for group in groups] == [
        {"name": "top", "lr": 0.3},
        {"name": r"^(head|norm)\.", "lr": 0.1, "mine": [1]},
        {"name": "default", "weight_decay": 0.5},
    ]
    assert groups[0]["params"][0][1] is model.head.weight


def test_patterns_are_searched_not_matched_from_the_start():
    assert members(ice.param_groups(nn.Linear(1, 1), {"ia": {}}, default={"name": "rest"})) == {
        "ia": ["bias"],
        "rest": ["weight"],
    }


def test_rules_that_take_all_need_no_default_and_an_unused_default_makes_no_group():
    assert list(members(ice.param_groups(nn.Linear(1, 1), {".": {"name": "all"}}))) == ["all"]
    assert list(members(ice.param_groups(nn.Linear(1, 1), {".": {"name": "all"}}, default={}))) == ["all"]
    assert list(members(ice.param_groups(nn.Linear(1, 1), default={}))) == ["default"]


def test_rules_are_left_as_they_were():
    rules, default = {"weight": {"lr": 0.5, "name": "w"}}, {"lr": 1.0}
    ice.param_groups(nn.Linear(1, 1), rules, default, no_weight_decay=True)
    torch.optim.SGD(ice.param_groups(nn.Linear(1, 1), rules, default))

    assert rules == {"weight": {"lr": 0.5, "name": "w"}}
    assert default == {"lr": 1.0}


def test_a_tensor_lr_is_each_groups_own():
    lr = torch.tensor(0.5)

    decayed, spared = ice.param_groups(nn.Linear(1, 1), default={"lr": lr}, no_weight_decay=True)

    assert decayed["lr"] == spared["lr"] == lr
    assert decayed["lr"] is not spared["lr"]
    assert decayed["lr"] is not lr


linear = functools.partial(nn.Linear, 2, 1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ice.param_groups(linear().parameters()),
            ArgumentTypeError,
            "model must be a torch.nn.Module, got gen",
        ),
        (
            lambda: ice.param_groups(linear(), ["head"]),
            ArgumentTypeError,
            "rules must be a dict of patterns to overrid",
        ),
        (lambda: ice.param_groups(linear(), {3: {}}), ArgumentTypeError, r"rules\[3\]: a pattern must be a string"),
        (
            lambda: ice.param_groups(linear(), {"bias(": {}}),
            ArgumentValueError,
            r"rules\['bias\('\] is not a regular expression: missing \), .* at position 4; escape",
        ),
        (
            lambda: ice.param_groups(linear(), {"bias": 0.1}),
            ArgumentTypeError,
            r"rules\['bias'\] must be a dict of group entries by name, got 0.1; such as {'lr': 1e-3}",
        ),
        (lambda: ice.param_groups(linear(), {"bias": {3: 1}}), ArgumentTypeError, "must be a dict of group entries"),
        (lambda: ice.param_groups(linear(), default=0.1), ArgumentTypeError, "default must be a dict of group entries"),
        (
            lambda: ice.param_groups(linear(), {"bias": {"params": []}}),
            ArgumentValueError,
            r"rules\['bias'\] sets 'params', which comes from the model",
        ),
        (lambda: ice.param_groups(linear(), default={"param_names": []}), ArgumentValueError, "sets 'param_names'"),
        (
            lambda: ice.param_groups(linear(), {"bias": {"name": 3}}),
            ArgumentTypeError,
            r"rules\['bias'\]\['name'\] must be a string, got 3",
        ),
        (
            lambda: ice.param_groups(linear(), {"bias": {"name": "a"}, "weight": {"name": "a"}}),
            ArgumentValueError,
            "two groups are called 'a'; give each rule a 'name' of its own, or join",
        ),
        (
            lambda: ice.param_groups(linear(), {"bias": {"name": "default"}}, default={}),
            ArgumentValueError,
            "two groups are called 'default'",
        ),
        (
            lambda: ice.param_groups(
                linear(),
                {"bi": {"name": "default.no_weight_decay"}},
                default={},
                no_weight_decay=lambda n, *_: n[0] == "w",
            ),
            ArgumentValueError,
            "two groups are called 'default.no_weight_decay'",
        ),
        (
            lambda: ice.param_groups(Transformer(), {r"^haed\.": {}}, default={}),
            ArgumentValueError,
            r"rules\['\^haed\\\\.'\] matches no parameter; did you mean 'head.weight'",
        ),
        (
            lambda: ice.param_groups(linear(), {"zzz": {}}, default={}),
            ArgumentValueError,
            "matches no parameter; the model has 'weight', 'bias'$",
        ),
        (
            lambda: ice.param_groups(linear(), {".": {}, "bias": {}}),
            ArgumentValueError,
            r"rules\['bias'\] matches only parameters that rules\['.'\] took, and the first match wins",
        ),
        (
            lambda: ice.param_groups(Transformer(), {"head": {}}),
            ArgumentValueError,
            r"no rule takes 'position', .*, 'blocks.0.norm.bias' and 12 more; pass default={}",
        ),
        (lambda: ice.param_groups(linear()), ArgumentValueError, "no rule takes 'weight', 'bias'; pass default={}"),
        (lambda: ice.param_groups(nn.ReLU(), default={}), ArgumentValueError, "the model, ReLU, has no parameters"),
        (
            lambda: ice.param_groups(nn.Sequential(nn.LazyLinear(2)), default={}),
            ArgumentValueError,
            r"'0.weight', '0.bias' of a lazy module have no shape yet; run a batch .* first: model\(batch\)",
        ),
        (
            lambda: ice.param_groups(linear(), default={}, frozen="freeze"),
            ArgumentValueError,
            "frozen must be one of 'keep', 'drop', 'error'; got 'freeze'",
        ),
        (
            lambda: ice.param_groups(linear(), default={}, no_weight_decay="bias"),
            ArgumentTypeError,
            "no_weight_decay must be True, False or a predicate, got 'bias'",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# -- tied, wrapped, frozen ----------------------------------------------------------------------------------


def test_tied_weights_are_kept_once_under_their_first_name():
    assert members(ice.param_groups(Tied(), {"embed|lm_head": {"name": "words"}}, default={})) == {
        "words": ["embed.weight"],
        "default": ["body.weight", "body.bias"],
    }
    assert len(members(ice.param_groups(Tied(), default={}))["default"]) == 3


@pytest.mark.parametrize(
    ("rules", "default", "message"),
    [
        ({"lm_head": {}}, {}, r"'embed.weight' \(default\) and 'lm_head.weight' \(rules\['lm_head'\]\) are one tied"),
        ({"embed": {}, "lm_head": {}}, {}, r"\(rules\['embed'\]\) and 'lm_head.weight' \(rules\['lm_head'\]\) are one"),
        (
            {"embed": {}, "body": {}},
            None,
            r"'lm_head.weight' \(no rule\) are one tied parameter.*one rule that matches",
        ),
    ],
)
def test_a_tied_parameter_in_two_groups_is_refused(rules, default, message):
    with pytest.raises(ArgumentValueError, match=message):
        ice.param_groups(Tied(), rules, default)


def test_a_module_used_twice_is_one():
    shared = nn.Linear(2, 2)

    assert members(ice.param_groups(nn.Sequential(shared, shared), default={})) == {"default": ["0.weight", "0.bias"]}


class Parallel(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    "wrap", [Parallel, torch.compile, lambda m: Parallel(torch.compile(m)), lambda m: torch.compile(Parallel(m))]
)
def test_the_prefixes_of_wrappers_are_not_part_of_names(wrap):
    model = Transformer(2)
    settings = {"default": {"lr": 1.0}, "no_weight_decay": True, "layers": r"^blocks\.(\d+)", "layer_decay": 0.5}

    wrapped = ice.param_groups(wrap(model), {"^head": {"lr": 0.1}}, **settings)

    assert wrapped == ice.param_groups(model, {"^head": {"lr": 0.1}}, **settings)


def test_a_compiled_block_keeps_its_names_and_a_module_among_others_its_own():
    model = nn.Sequential(torch.compile(nn.Linear(1, 1)), Parallel(nn.Linear(1, 1)))

    assert members(ice.param_groups(model, default={}))["default"] == [
        *("0.weight", "0.bias", "1.module.weight", "1.module.bias")
    ]
    other = nn.ModuleDict({"module": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    assert members(ice.param_groups(other, default={}))["default"] == names_of(other)


def test_frozen_parameters_are_kept_dropped_or_refused():
    model = Transformer(1)
    model.embed.requires_grad_(False)

    kept = ice.param_groups(model, {"^embed": {"name": "embed"}}, default={})
    dropped = ice.param_groups(model, {"^embed|^head": {"name": "ends"}}, default={}, frozen="drop")

    assert members(kept)["embed"] == ["embed.weight", "embed.bias"]
    assert members(dropped)["ends"] == ["head.weight", "head.bias"]
    with pytest.raises(ArgumentValueError, match=r"'embed\.weight', 'embed\.bias' require no grad; unfreeze them"):
        ice.param_groups(model, default={}, frozen="error")
    with pytest.raises(ArgumentValueError, match=r"rules\['\^embed'\] matches frozen parameters only.*frozen='keep'"):
        ice.param_groups(model, {"^embed": {}}, default={}, frozen="drop")
    with pytest.raises(ArgumentValueError, match=r"frozen='drop' leaves nothing"):
        ice.param_groups(model.requires_grad_(False), default={}, frozen="drop")


def test_dropped_parameters_need_no_rule():
    model = Transformer(1).requires_grad_(False)
    model.head.requires_grad_(True)

    assert members(ice.param_groups(model, {"head": {}}, frozen="drop")) == {"head": ["head.weight", "head.bias"]}


# -- weight decay -------------------------------------------------------------------------------------------


class LlamaRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4))


class MyLN(nn.LayerNorm):
    pass


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm((2, 4)),
        lambda: nn.RMSNorm((2, 4)),
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.BatchNorm1d(4),
        lambda: nn.BatchNorm2d(4),
        lambda: nn.SyncBatchNorm(4),
        lambda: nn.InstanceNorm3d(4, affine=True),
        lambda: MyLN((2, 4)),
        LlamaRMSNorm,
    ],
)
def test_normalisations_are_not_decayed(norm):
    model = nn.ModuleDict({"fc": nn.Linear(4, 4, bias=False), "n": norm()})

    groups = ice.param_groups(model, default={"weight_decay": 0.1}, no_weight_decay=True)

    assert members(groups)["default"] == ["fc.weight"]
    assert set(members(groups)["default.no_weight_decay"]) == set(names_of(model)) - {"fc.weight"}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_biases_and_what_has_at_most_one_dimension_is_not_decayed():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 1, add_bias_kv=True)})
    model.scale = nn.Parameter(torch.ones(()))
    model.table = nn.Parameter(torch.ones(2, 2))

    groups = members(ice.param_groups(model, default={}, no_weight_decay=True))

    assert groups["default"] == ["table", "attention.in_proj_weight", "attention.out_proj.weight"]
    assert len(groups["default.no_weight_decay"]) == 5  # bias_k and bias_v have three dimensions


def test_a_predicate_sees_name_parameter_and_owner():
    seen = []
    model = torch.compile(Parallel(nn.Sequential(nn.Linear(2, 1))))

    groups = ice.param_groups(
        model, default={}, no_weight_decay=lambda n, p, m: seen.append((n, p.ndim, type(m))) or n == "0.weight"
    )

    assert seen == [("0.weight", 2, nn.Linear), ("0.bias", 1, nn.Linear)]
    assert members(groups) == {"default": ["0.bias"], "default.no_weight_decay": ["0.weight"]}


def test_a_rule_without_decay_is_not_split():
    rules = {"^norm": {"weight_decay": 0}, "^head": {"weight_decay": 0.5}}

    groups = ice.param_groups(Transformer(1), rules, default={"weight_decay": 0.0}, no_weight_decay=True)

    assert list(members(groups)) == ["^norm", "^head", "^head.no_weight_decay", "default"]


def train(model, optimizer, steps=6):
    generator = torch.Generator().manual_seed(3)

    def train_step(engine, batch):
        loss = model(torch.randn(5, 3, generator=generator)).square().mean()
        if isinstance(optimizer, ice.Optimizer):
            optimizer.backward(loss)
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    engine = Engine(train_step)
    if isinstance(optimizer, ice.Optimizer):
        optimizer.attach(engine)
    engine.run(range(steps))
    return [p.detach().clone() for p in model.parameters()]


def test_it_trains_as_groups_made_by_hand_do_bit_for_bit():
    torch.manual_seed(0)
    model, by_hand, plain = Transformer(), Transformer(), Transformer()
    by_hand.load_state_dict(model.state_dict())
    plain.load_state_dict(model.state_dict())
    adamw = functools.partial(
        torch.optim.AdamW, lr=0.05, weight_decay=0.3, foreach=False
    )  # left open, ours would take the fused form
    bare = [p for n, p in by_hand.named_parameters() if n.endswith("bias") or "norm" in n]
    others = [p for n, p in by_hand.named_parameters() if not (n.endswith("bias") or "norm" in n)]
    groups = functools.partial(ice.param_groups, default={}, no_weight_decay=True)

    expected = train(by_hand, adamw([{"params": others}, {"params": bare, "weight_decay": 0.0}]))
    actual = train(model, ice.Optimizer(adamw, params=groups(model)))

    assert all(map(torch.equal, actual, expected))
    assert all(map(torch.equal, train(plain, adamw(groups(plain))), expected))
    assert not torch.equal(model.norm.weight, torch.ones(4))


# -- depth --------------------------------------------------------------------------------------------------

DEPTHS = {"position": 4, "embed": 4, "blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "norm": 0, "head": 0}


def test_depth_is_the_distance_from_the_top_and_the_lr_decays_with_it():
    model = Transformer(3)

    groups = ice.param_groups(
        model, {"^head": {"lr": 0.5}}, default={"lr": 0.1}, layers=r"blocks\.(\d+)", layer_decay=0.75
    )

    assert list(members(groups)) == ["^head.depth_0", *(f"default.depth_{d}" for d in (4, 3, 2, 1, 0))]
    for group in groups:
        base = 0.5 if group["name"].startswith("^head") else 0.1
        depth = int(group["name"][-1])
        assert group["lr"] == base * 0.75**depth
        for name in members([group])[group["name"]]:
            assert depth == next(depth for start, depth in DEPTHS.items() if name.startswith(start))


def test_a_rule_without_an_lr_decays_that_of_the_default():
    groups = ice.param_groups(
        Transformer(1), {"position": {}}, default={"lr": 0.1}, layers=r"blocks\.(\d+)", layer_decay=0.5
    )

    assert entries(groups[0]) == {"name": "position.depth_2", "lr": 0.1 * 0.25}


def test_what_decays_by_depth_already_is_not_decayed_again_by_a_schedule():
    groups = ice.param_groups(Transformer(1), default={"lr": 0.1}, layers=r"blocks\.(\d+)", layer_decay=0.5)
    optimizer = ice.Optimizer(torch.optim.SGD(groups), processors=[ice.schedules.layer_decay(0.5)])

    with pytest.raises(MissingKeyError, match="'layer_decay' needs 'depth', which the mapping lacks"):
        optimizer.plan(4, 1)


def test_a_schedule_decays_by_depth_as_the_groups_do():
    kept, decayed = (
        ice.param_groups(Transformer(2), default={"lr": 0.1}, layers=r"blocks\.(\d+)", layer_decay=decay)
        for decay in (None, 0.5)
    )
    plan = ice.Optimizer(torch.optim.SGD(kept), processors=[ice.schedules.layer_decay(0.5)]).plan(1, 1)

    assert [plan.rows[0][f"lr/{group['name']}"] for group in decayed] == [group["lr"] for group in decayed]


def beit_layer_id(name, layers):
    """As in BEiT's optim_factory.py; its lr is multiplied by ``decay ** (layers + 1 - id)``."""
    if name == "position" or name.startswith("embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else layers + 1


@pytest.mark.parametrize("blocks", [1, 2, 12])
def test_the_numbers_are_those_of_beit(blocks):
    model = Transformer(blocks)

    groups = ice.param_groups(model, default={"lr": 1.0}, layers=r"^blocks\.(\d+)", layer_decay=0.65)

    scales = {name: group["lr"] for group in groups for name, _ in group["params"]}
    assert scales == {name: 0.65 ** (blocks + 1 - beit_layer_id(name, blocks)) for name in names_of(model)}


def test_depth_and_decay_split_together():
    groups = ice.param_groups(Transformer(1), default={}, layers=r"blocks\.(\d+)", no_weight_decay=True)

    assert [(group["name"], group["depth"]) for group in groups] == [
        ("default.depth_2", 2),
        ("default.depth_2.no_weight_decay", 2),
        ("default.depth_1", 1),
        ("default.depth_1.no_weight_decay", 1),
        ("default.depth_0", 0),
        ("default.depth_0.no_weight_decay", 0),
    ]
    assert all("lr" not in group for group in groups)


def test_depth_counts_frozen_blocks_and_gaps_do_not_count():
    model = Transformer(3)
    model.blocks[2].requires_grad_(False)
    depths = functools.partial(ice.param_groups, model, default={}, layers=r"blocks\.(\d+)")
    assert [group["depth"] for group in depths(frozen="drop")] == [4, 3, 2, 0]

    del model.blocks[1]
    model.blocks.register_module("7", Block())
    assert [group["depth"] for group in depths()] == [4, 3, 2, 1, 0]


def test_what_stands_between_two_blocks_belongs_to_the_one_before():
    model = nn.Sequential()
    for name in ("block0", "down", "block1", "head"):
        model.add_module(name, nn.Linear(1, 1, bias=False))

    groups = ice.param_groups(model, default={}, layers=r"block(\d)")

    assert members(groups) == {
        "default.depth_2": ["block0.weight", "down.weight"],
        "default.depth_1": ["block1.weight"],
        "default.depth_0": ["head.weight"],
    }


def test_a_tensor_lr_is_decayed_into_tensors_of_their_own():
    lr = torch.tensor(0.5)

    groups = ice.param_groups(Transformer(1), default={"lr": lr}, layers=r"blocks\.(\d+)", layer_decay=0.5)

    assert [group["lr"].item() for group in groups] == [0.125, 0.25, 0.5]
    assert groups[-1]["lr"] is not lr


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers": 3}, ArgumentTypeError, "layers must be a regular expression, got 3"),
        ({"layers": "("}, ArgumentValueError, r"layers='\(' is not a regular expression"),
        ({"layers": r"blocks\.\d+"}, ArgumentValueError, "captures 0 groups, wanted is the block's number"),
        ({"layers": r"(blocks)\.(\d+)"}, ArgumentValueError, "captures 2 groups"),
        ({"layers": r"block\.(\d+)"}, ArgumentValueError, "matches no parameter; did you mean 'blocks.0"),
        ({"layers": r"(blocks)"}, ArgumentValueError, "finds 'blocks' in 'blocks.0.norm.weight', which is no number"),
        ({"layers": r"blocks(x)?"}, ArgumentValueError, "finds None in"),
        ({"layer_decay": 0.5}, ArgumentValueError, r"layer_decay=0.5 needs layers=, such as"),
        ({"layers": r"blocks\.(\d)", "layer_decay": 1.5}, ArgumentValueError, "layer_decay must be at most 1, got 1.5"),
        ({"layers": r"blocks\.(\d)", "layer_decay": 0.0}, ArgumentValueError, "layer_decay must be above 0"),
        ({"layers": r"blocks\.(\d)", "layer_decay": "a"}, ArgumentTypeError, "layer_decay must be a number"),
        (
            {"layers": r"blocks\.(\d)", "layer_decay": 0.5, "default": {}},
            ArgumentValueError,
            r"layer_decay needs an 'lr' to multiply; give one to default={'lr': 1e-3}",
        ),
        (
            {"rules": {".": {}}, "layers": r"blocks\.(\d)", "layer_decay": 0.5, "default": {}},
            ArgumentValueError,
            r"give one to rules\['\.'\] or to default={'lr': 1e-3}",
        ),
        (
            {"layers": r"blocks\.(\d)", "layer_decay": 0.5, "default": {"lr": "fast"}},
            ArgumentTypeError,
            r"default\['lr'\] must be a number, got 'fast'",
        ),
        (
            {"layers": r"blocks\.(\d)", "default": {"depth": 3}},
            ArgumentValueError,
            "default sets 'depth', and so does layers=",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        ice.param_groups(Transformer(), **{"default": {"lr": 0.1}, **settings})


# -- in use -------------------------------------------------------------------------------------------------


def test_torch_and_checkpoints_get_the_names():
    model = Transformer(1)
    inner = torch.optim.AdamW(ice.param_groups(model, {"^head": {"name": "head", "lr": 0.3}}, default={}), lr=0.1)
    optimizer = ice.Optimizer(inner)

    assert [group["param_names"] for group in inner.param_groups] == [
        ["head.weight", "head.bias"],
        names_of(model)[:-2],
    ]
    assert [group["lr"] for group in inner.param_groups] == [0.3, 0.1]
    assert dict(optimizer.named_parameters())["head.weight"] is model.head.weight


def test_schedules_records_and_processors_know_the_groups():
    model = Transformer(2)
    groups = ice.param_groups(model, default={"lr": 1.0}, layers=r"blocks\.(\d+)")
    schedule = ice.schedules.constant(0.5) * ice.schedules.layer_decay(0.5)
    seen = {}

    def note(group):
        seen[group["group_name"]] = group["depth"]
        return group

    optimizer = ice.Optimizer(torch.optim.SGD, groups, processors=[schedule, note])
    train(model, optimizer, steps=1)

    assert seen == {f"default.depth_{depth}": depth for depth in (3, 2, 1, 0)}
    assert optimizer.record.values == {f"default.depth_{d}": {"lr": 0.5 * 0.5**d} for d in (3, 2, 1, 0)}


def test_the_mend_of_a_forgotten_parameter_mends_it():
    model = Transformer(1)
    with pytest.raises(ArgumentValueError) as caught:
        ice.param_groups(model, {"head": {}})

    mend = re.search(r"pass (default=\{\})", str(caught.value))
    assert mend
    assert len(ice.param_groups(model, {"head": {}}, default={})) == 2
