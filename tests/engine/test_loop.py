"""The loop: cut and resumed, against a hand-written one, under signals and bad numbers."""

import json
import signal
import time

import pytest
import torch
from engine_toys import CASES, STEPS, Average, Data, Grow, Net, Task, TokenRates, make_loop, net, same, stack

from gossamer.core.errors import PlanError, RecipeError, RunError, StateError
from gossamer.core.method import Method
from gossamer.core.schedule import Phase, Plan, Step
from gossamer.core.stack import Stack
from gossamer.engine.checkpoint import Checkpoints
from gossamer.engine.interrupt import Interrupted
from gossamer.engine.loop import Loop, RunOptions
from gossamer.engine.optim import rate_factor
from gossamer.engine.seeding import seed_globals
from gossamer.kits.ema import Ema
from gossamer.recipe import TrainSettings


def rows(folder):
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "cpu_seconds")} for row in kept]


@pytest.fixture(autouse=True)
def no_board(monkeypatch):
    """TensorBoard has its own test; here its files only cost time."""
    import torch.utils.tensorboard as board

    class Silent:
        def __init__(self, *args, **options): ...
        def add_scalar(self, *args): ...
        def close(self): ...

    monkeypatch.setattr(board, "SummaryWriter", Silent)


@pytest.mark.parametrize("case", CASES)
def test_cut_at_every_draw_and_resumed_is_bit_equal(case, tmp_path):
    counter = Data()
    whole = make_loop(case, tmp_path / "whole", counter, ema=0.9)
    reference = whole.run(net(dropout=0.2)).state_dict()
    for cut in range(1, counter.drawn + 1):
        folder = tmp_path / f"cut{cut}"
        with pytest.raises(Interrupted):
            make_loop(case, folder, Data(stop_at=cut), ema=0.9).run(net(dropout=0.2))
        torch.manual_seed(99)
        again = make_loop(case, folder, options=RunOptions(resume=True), ema=0.9)
        assert same(again.run(net(dropout=0.2)).state_dict(), reference), cut
        assert rows(folder) == rows(tmp_path / "whole"), cut
        assert same(again.ema.average, whole.ema.average), cut
        assert again.stack.edits == whole.stack.edits


@pytest.mark.parametrize("case", ["plain", "two_pass", "zeroth", "nmask", "average"])
def test_hand_written_loop_equals_engine(case):
    reference = make_loop(case, weight_decay=0.0).run(net()).state_dict()
    methods = stack(case)
    model = methods.prepare(net())
    params = methods.groups(model)["weights"]
    opt = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)
    grads, draw = methods.grads(Task().loss), methods.loader("train", Data())
    for index in range(STEPS):
        step = Step("fit", "main", index, STEPS, seed=5)
        opt.param_groups[0]["lr"] = 1e-2 * rate_factor(Phase("fit", STEPS, warmup=0.3), index)
        grads(model, draw(step), step, params)
        methods.before_step(model, step)
        opt.step()
        opt.zero_grad()
        methods.after_step(model, step)
    assert same(methods.finish(model).state_dict(), reference)


def test_search_leaves_frozen_weights_bit_equal(tmp_path):
    dense = net()
    before = {k: v.clone() for k, v in dense.head.state_dict().items()}
    loop = make_loop("rates", tmp_path, Data(stop_at=4))
    with pytest.raises(Interrupted):
        loop.run(dense)
    assert same(dense.head.state_dict(), before)
    assert dense.blocks[1].theta.abs().sum() > 0
    assert all(p.requires_grad for p in dense.parameters())


def test_users_frozen_parameter_stays_frozen():
    model = net()
    model.head.bias.requires_grad_(False)
    before = model.head.bias.clone()
    trained = make_loop().run(model)
    assert torch.equal(trained.head.bias, before)
    assert not trained.head.bias.requires_grad


def test_accumulation_equals_full_batch():
    full = make_loop().run(net()).state_dict()
    split = make_loop(accumulate=4).run(net()).state_dict()
    assert max(float((full[k] - split[k]).abs().max()) for k in full) < 1e-6


def test_accumulation_that_does_not_divide_is_refused():
    with pytest.raises(RunError, match="does not divide"):
        make_loop(accumulate=3, batch_size=3).run(net())


def test_clipping_bounds_the_update():
    seen = []

    class Watch(Method):
        def before_step(self, model, step):
            norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            seen.append(float(torch.stack(norms).norm()))

    loop = Loop(Stack([Watch()]), Task(), {"train": Data()}, [Phase("fit", 3)], settings=TrainSettings(clip_grad=0.01))
    loop.run(net())
    assert max(seen) <= 0.01 + 1e-6


def test_bf16_trains_close_to_full_precision():
    full = make_loop().run(net()).state_dict()
    half = make_loop(precision="bf16").run(net()).state_dict()
    assert not same(full, half)
    assert max(float((full[k] - half[k]).abs().max()) for k in full) < 0.1


def test_fp16_is_refused_on_cpu_and_with_several_passes():
    with pytest.raises(RecipeError, match="fp16"):
        make_loop(precision="fp16")
    from gossamer.engine.planning import check_plan

    with pytest.raises(PlanError, match="TwoPass"):
        check_plan(stack("two_pass"), [Phase("fit", 1)], {"train": Data()}, TrainSettings(precision="fp16"))


def test_dropout_is_drawn_from_the_step_and_leaves_the_callers_generator_alone():
    first = make_loop().run(net(dropout=0.5)).state_dict()
    model, loop = net(dropout=0.5), make_loop()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert same(loop.run(model).state_dict(), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_differ_by_rank_only_where_asked():
    def draw(rank, per_rank):
        seed_globals(Step("fit", "main", 0, 1, rank=rank), "x", per_rank=per_rank)
        return float(torch.rand(()))

    assert draw(0, False) == draw(1, False)
    assert draw(0, True) != draw(1, True)


def averaged_by_hand(decay: float):
    """Return a method that averages the weights itself; its average starts at the first weights it is shown."""

    class Watch(Method):
        average = None

        def phases(self, plan):
            self.average = {}
            return plan

        def before_step(self, model, step):
            for name, p in model.named_parameters():
                self.average.setdefault(name, p.detach().clone())

        @torch.no_grad()
        def after_step(self, model, step):
            for name, p in model.named_parameters():
                self.average[name].lerp_(p, 1 - decay)

    return Watch()


@pytest.mark.parametrize("ship", ["ema", "last"])
def test_the_average_is_shipped_unless_the_recipe_says_otherwise(ship):
    watch, given = averaged_by_hand(0.5), TrainSettings(lr=1e-2, ema=0.5, ship=ship)
    loop = Loop(Stack([watch]), Task(), {"train": Data()}, [Phase("fit", 6)], settings=given, seed=5)
    model = loop.train(net())
    now = {k: v.clone() for k, v in model.state_dict().items()}
    assert same(now, watch.average) == (ship == "ema")
    other = "last" if ship == "ema" else "ema"
    with loop.variants(model)[other]:
        assert not same(model.state_dict(), now)
        assert same(model.state_dict(), watch.average) == (other == "ema")
    assert same(model.state_dict(), now)
    last = make_loop("plain", lr=1e-2).run(net())
    assert same(make_loop("plain", lr=1e-2, ema=0.5, ship="last").run(net()).state_dict(), last.state_dict())


def test_only_what_trains_with_the_weights_is_averaged():
    model = make_loop("rates", ema=0.9).run(net())
    plain = make_loop("rates").run(net())
    assert torch.equal(model.blocks[1].theta, plain.blocks[1].theta)  # searched, and not trained since
    assert model.blocks[1].keep == plain.blocks[1].keep
    assert not torch.equal(model.head.weight, plain.head.weight)


def test_a_methods_own_work_is_adopted_by_the_average():
    class Rewrite(Method):
        def phases(self, plan):
            return plan.before("fit", Phase("rewrite", 1, work=self.work))

        @torch.no_grad()
        def work(self, model, loaders, step):
            model.head.weight.add_(1.0)

    given = TrainSettings(lr=1e-9, weight_decay=0.0, ema=0.999)
    start = net().head.weight.detach()
    loop = Loop(Stack([Rewrite()]), Task(), {"train": Data()}, [Phase("fit", 2)], settings=given)
    torch.testing.assert_close(loop.run(net()).head.weight, start + 1.0)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_not_finite_stops_and_leaves_a_usable_checkpoint(bad, tmp_path):
    class Poison(Method):
        def loss(self, model, batch, out, step):
            if step.index != 3:
                return {}
            if bad == "loss":
                return {"poison": out.sum() * float("nan")}
            return {"poison": (out.sum() * 0).sqrt()}  # finite value, infinite slope

    def loop(methods, options=None):
        given = TrainSettings(lr=1e-2, checkpoint_every=2)
        place = {"settings": given, "run_dir": tmp_path, "options": options}
        return Loop(Stack(methods), Task(), {"train": Data()}, [Phase("fit", 6)], **place)

    with pytest.raises(RunError, match=r"phase 'fit', turn 'main', step 3.*3-0, 3-1.*000-0000002") as error:
        loop([Poison()]).run(net())
    assert error.value.exit_code == 1
    assert Checkpoints(tmp_path).latest().name == "000-0000002"
    options = RunOptions(resume=True, identity=None)
    with pytest.raises(StateError, match="methods"):
        loop([], options).run(net())
    with pytest.raises(RunError, match="step 3"):
        loop([Poison()], options).run(net())


def test_termination_signal_is_handled_like_ctrl_c(tmp_path):
    with pytest.raises(Interrupted, match="--resume") as error:
        make_loop(run_dir=tmp_path, data=Data(stop_at=2, number=signal.SIGTERM)).run(net())
    assert error.value.exit_code == 130
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_unfinished_and_finished_folders_are_refused(tmp_path):
    with pytest.raises(Interrupted):
        make_loop(run_dir=tmp_path, data=Data(stop_at=2)).run(net())
    with pytest.raises(StateError, match="unfinished run; continue it with --resume"):
        make_loop(run_dir=tmp_path).run(net())
    make_loop(run_dir=tmp_path, options=RunOptions(resume=True)).run(net())
    for resume in (False, True):
        with pytest.raises(StateError, match="finished run; choose another folder"):
            make_loop(run_dir=tmp_path, options=RunOptions(resume=resume)).run(net())


def test_resume_after_a_changed_recipe_names_the_keys(tmp_path):
    with pytest.raises(Interrupted):
        make_loop(run_dir=tmp_path, data=Data(stop_at=2)).run(net())
    with pytest.raises(StateError, match=r"train\.lr: 0\.01 -> 0\.02"):
        make_loop(run_dir=tmp_path, options=RunOptions(resume=True), lr=0.02).run(net())


def test_resume_with_another_model_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        make_loop(run_dir=tmp_path, data=Data(stop_at=2)).run(net())
    with pytest.raises(StateError, match="another model"):
        make_loop(run_dir=tmp_path, options=RunOptions(resume=True)).run(Net(depth=2))


def test_dense_hook_sees_the_unchanged_model():
    seen = []
    loop = make_loop("rates", options=RunOptions(dense_hook=lambda m: seen.append(len(m.blocks))))
    assert len(loop.run(net()).blocks) == 4
    assert seen == [3]


def test_unknown_group_loader_and_repeated_phase_are_refused():
    with pytest.raises(PlanError, match="group 'gates'"):
        Loop(Stack(), Task(), {"train": Data()}, Plan([Phase("fit", 1)]).join("gates", "weights")).run(net())
    with pytest.raises(PlanError, match=r"loader 'train'; given are \['trian'\]"):
        Loop(Stack(), Task(), {"trian": Data()}, [Phase("fit", 1)]).run(net())
    with pytest.raises(PlanError, match="occurs 2 times"):
        Loop(Stack(), Task(), {"train": Data()}, [Phase("fit", 1), Phase("fit", 1)]).run(net())


def test_parameter_outside_model_and_extra_is_refused():
    class Loose(Method):
        theta = torch.nn.Parameter(torch.zeros(2))

        def groups(self, model):
            return {"loose": [self.theta]}

        def phases(self, plan):
            return plan.join("loose", "weights")

    with pytest.raises(PlanError, match="extra"):
        Loop(Stack([Loose()]), Task(), {"train": Data()}, [Phase("fit", 1)]).run(net())


def test_used_stack_is_refused():
    loop = make_loop("rates")
    loop.run(net())
    with pytest.raises(PlanError, match="fresh Stack"):
        Loop(loop.stack, Task(), {"train": Data()}, [Phase("fit", 1)]).run(net())


def test_loss_that_does_not_reach_the_group_is_refused():
    class Apart(TokenRates):
        def loss(self, model, batch, out, step):
            return {"task": model.head.weight.sum()} if model.blocks[1].soft else {}

    with pytest.raises(PlanError, match="does not depend on any parameter"):
        Loop(Stack([Apart()]), Task(), {"train": Data()}, [Phase("fit", 1)]).run(net())


def test_optimiser_state_survives_for_the_same_parameters():
    loop = make_loop("cycles", steps=4)
    loop.run(net())
    states = loop._optim.state_dict()["parameters"]
    assert {float(s["step"]) for s in states.values()} == {4.0}


def test_methods_own_average_is_restored():
    method = Average()
    Loop(Stack([method]), Task(), {"train": Data()}, [Phase("fit", 2)]).run(net())
    copy = Average()
    copy.load_state_dict(method.state_dict())
    assert same(copy.average, method.average)


def test_loop_inside_a_unit_of_work():
    class Rounds(Method):
        def phases(self, plan):
            return Plan([Phase("rounds.all", 2, work=self.round)])

        def round(self, model, loaders, step):
            inner = Loop(Stack(), Task(), loaders, [Phase("local", 2)], seed=step.index)
            inner.run(model)
            return {"steps": 2.0}

    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trained = Loop(Stack([Rounds()]), Task(), {"train": Data()}, [Phase("fit", 1)]).run(model)
    assert not same(trained.state_dict(), before)


def test_parts_of_a_training_are_the_training():
    class Parts(Method):
        def phases(self, plan):
            return plan.swap("fit", lambda p: [p.part("fit.0", 0, 2), p.part("fit.1", 2, 1), p.part("fit.2", 3, 3)])

    def run(*methods):
        loop = Loop(Stack(methods), Task(), {"train": Data()}, [Phase("fit", 6, warmup=0.5)])
        return loop.run(net()).state_dict()

    assert same(run(Parts()), run())


def test_growth_carries_averages_and_moments_of_blocks_that_moved():
    model, seen = net(), {}

    class Look(Method):
        def leave(self, model, phase):
            seen[phase.name] = (model.blocks[2].fc.weight, {**loop.ema.average})

    for fresh in (False, True):
        model = net()
        loop = make_loop("grow", ema=0.9)
        loop.stack.methods = [Grow(fresh=fresh), Look()]
        loop.run(model)
        moved = seen["fit.small"][0]
        assert model.blocks[3].fc.weight is moved
        steps = {n: float(s["step"]) for n, s in loop._optim.state_dict()["parameters"].items()}
        assert steps["model.blocks.3.fc.weight"] == (3 if fresh else 6) and steps["model.blocks.2.fc.weight"] == 3
    ema, old = Ema(0.9), net()
    ema.follow(old)
    ema.average["blocks.2.fc.weight"].fill_(7.0)
    Grow().apply(old, {"clone": 2})
    ema.follow(old)
    assert ema.average["blocks.3.fc.weight"].eq(7).all() and not ema.average["blocks.2.fc.weight"].eq(7).any()


def test_every_second_belongs_to_a_phase():
    class Slow(Method):
        def leave(self, model, phase):
            time.sleep(0.05)

    kept = []
    plan = [Phase("fit", 2), Phase("second", 1)]
    started = time.perf_counter()
    options = RunOptions(on_row=kept.append, on_phase_end=lambda *_: time.sleep(0.03))
    Loop(Stack([Slow()]), Task(), {"train": Data()}, plan, options=options).run(net())
    taken = time.perf_counter() - started
    ends = [r for r in kept if r.get("event") == "end"]
    assert len(ends) == 2 and all(0.08 <= r["seconds"] <= taken and r["cpu_seconds"] >= 0 for r in ends)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RecipeError, match="2 processes on a machine with 1 GPU; start one a GPU, or hide"):
        make_loop()


def test_sharded_training_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="FSDP is asked for; allowed are a single process and DDP"):
        make_loop()
