"""Calls that end in an exception at any moment leave everything as it was, and the next step is that of an undisturbed run."""

import copy
import gc
import os
import pickle
import random
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from steady import LAYER, TEACHERS, batch, build, changed, gradient, loss_of, predict, state

import perceptual_diffusion
from perceptual_diffusion import distances, staged, taps
from perceptual_diffusion._restore import NoFastPath

pytest.importorskip("peft")

PACKAGE = os.path.dirname(perceptual_diffusion.__file__)


class Bench:
    """A model with its objective, after two steps or before the first, and the gradient of the step that comes next."""

    def __init__(self, teacher="copy", *, first=False, **options):
        self.made = lambda: build(teacher, **options)
        self.first, self.data = first, batch()
        self.renew()
        self.expected = gradient(self.model, self.objective, self.data)
        self.renew()

    def renew(self):
        self.model, self.objective = self.made()
        for _ in range(0 if self.first else 2):
            gradient(self.model, self.objective, self.data)
        self.generator = self.objective.rng_state()

    def interrupted(self, call):
        """Say what a call that may raise has changed, and whether the next step differs from an undisturbed one."""
        self.objective.set_rng_state(self.generator)
        prediction = predict(self.model, self.objective, self.data)
        before = state(self.model, self.objective)
        call(lambda: loss_of(self.objective, prediction, self.data))
        found = changed(before, state(self.model, self.objective))
        if self.first and found == ["teacher's weights"]:  # the copy may be cut by then
            found = []
        return found or self.after()

    def after(self):
        self.objective.set_rng_state(self.generator)
        got = gradient(self.model, self.objective, self.data)
        return [] if all(map(torch.equal, got, self.expected)) else ["the next gradient"]


def raising_at(moment, roots, done):
    """Run a call and raise a KeyboardInterrupt at its n-th line in files under `roots`; `done` gets the place."""

    def run(call):
        lines = 0

        def local(frame, event, arg):
            nonlocal lines
            lines += event == "line"
            if lines == moment and not done:
                done.append((os.path.basename(frame.f_code.co_filename), frame.f_lineno))
                raise KeyboardInterrupt
            return local

        def entered(frame, event, arg):
            own = frame.f_code.co_filename.startswith(roots)
            # ignored by Python in the one; in the other no signal is looked at between the two lines
            return local if own and frame.f_code.co_name not in ("__del__", "_nesting") else None

        before = sys.gettrace()
        sys.settrace(entered)
        try:
            call()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)

    return run


def at_every_line(bench, every, *, roots=(PACKAGE,), start=1):
    """Interrupt a call at every n-th line that it runs; give the places that left a trace."""
    wrong, moment = [], start
    while True:
        place = []
        if bench.first:
            bench.renew()
        found = bench.interrupted(raising_at(moment, roots, place))
        if not place:
            assert moment > 500, "hardly a line was run"
            return wrong
        if found:
            wrong.append((place[0], found))
        moment += every


def test_an_interrupt_at_any_line_leaves_nothing_and_the_next_step_is_right():
    assert at_every_line(Bench("lora"), 61, start=random.Random(0).randint(1, 61)) == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}, {"micro_batch": None}, {"formulation": "split"}], ids=str)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_an_interrupt_at_every_line_leaves_nothing_and_the_next_step_is_right(teacher, options):
    assert at_every_line(Bench(teacher, **options), 3) == []


@pytest.mark.slow
def test_an_interrupt_at_every_line_of_torch_leaves_nothing_either():
    roots = (PACKAGE, os.path.dirname(torch.__file__))
    assert at_every_line(Bench(), 3, roots=roots) == []


@pytest.mark.slow
def test_an_interrupt_at_any_line_of_the_first_step_leaves_nothing():
    assert at_every_line(Bench(first=True), 23) == []


def test_the_hooks_of_a_pass_are_gone_wherever_it_is_interrupted():
    model, _ = build()
    x, _, t = batch()
    moment = 0
    while True:
        moment, place = moment + 1, []
        raising_at(moment, (taps.__file__,), place)(lambda: taps.run(model, [LAYER, "blocks.0"], lambda: model(x, t)))
        assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in model.modules())
        assert taps._running.get() == ()
        if not place:
            break
    assert moment > 50


# --- real signals -------------------------------------------------------------------------------------------------------


def by_signals(bench, times, error=KeyboardInterrupt):
    """Interrupt so many calls by a timer at random moments; give what they left, and how many were interrupted."""
    draw, wrong, hits = random.Random(0), [], 0
    prediction, start = predict(bench.model, bench.objective, bench.data), time.perf_counter()
    loss_of(bench.objective, prediction, bench.data)
    took = time.perf_counter() - start

    def interrupt(number, frame):
        raise error

    def call(run):
        nonlocal hits
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, took))
                run()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except error:
            hits += 1

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(50 * times):
            wrong += bench.interrupted(call) if hits < times else []
    finally:
        signal.signal(signal.SIGALRM, before)
    return wrong, hits


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
@pytest.mark.parametrize(("error", "options"), [(KeyboardInterrupt, {}), (TimeoutError, {"teacher": "lora"})])
def test_an_interrupt_by_a_timer_leaves_nothing_and_the_next_step_is_right(error, options):
    wrong, hits = by_signals(Bench(**options), 12, error)
    assert wrong == []
    assert hits == 12


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
@pytest.mark.parametrize("teacher", TEACHERS)
def test_hundreds_of_interrupts_by_a_timer_leave_nothing_and_the_next_step_is_right(teacher):
    wrong, hits = by_signals(Bench(teacher), 200)
    assert wrong == []
    assert hits == 200


# --- exceptions in what is run --------------------------------------------------------------------------------------------

ERRORS = [KeyboardInterrupt, torch.OutOfMemoryError, MemoryError, RuntimeError, ValueError, AssertionError]


class Failing(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.error("broken")


def break_teacher(bench, error):
    def fail(module, args, output):
        raise error("broken")

    return taps.layer(bench.objective.teacher.module, "blocks.0").register_forward_hook(fail).remove


def break_teachers_pass_with_grad(bench, error):
    def fail(module, args, output):
        if torch.is_grad_enabled():
            raise error("broken")

    return taps.layer(bench.objective.teacher.module, "blocks.0").register_forward_hook(fail).remove


def break_teachers_backward(bench, error):
    def fail(module, args, output):
        return Failing.apply(output, error) if torch.is_grad_enabled() else None

    return taps.layer(bench.objective.teacher.module, "blocks.0").register_forward_hook(fail).remove


def break_distance(bench, error):
    def fail(features, true):
        raise error("broken")

    return replace_distance(bench, fail)


def break_distances_backward(bench, error):
    return replace_distance(bench, lambda features, true: distances.mse(Failing.apply(features, error), true))


def replace_distance(bench, distance):
    before, bench.objective.distance = bench.objective.distance, distance
    return lambda: setattr(bench.objective, "distance", before)


BREAKS = [
    break_teacher, break_teachers_pass_with_grad, break_teachers_backward, break_distance, break_distances_backward,
]  # fmt: skip


@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_an_exception_is_passed_on_leaves_nothing_and_the_next_step_is_right(teacher, broken, first):
    bench = Bench(teacher, first=first)
    for error in ERRORS[:1] if first else ERRORS[1:4]:
        mend = broken(bench, error)

        def call(run, error=error):
            with pytest.raises(error, match="broken"):
                run()

        prediction = predict(bench.model, bench.objective, bench.data)
        before = state(bench.model, bench.objective)
        call(lambda: loss_of(bench.objective, prediction, bench.data))  # noqa: B023
        found = changed(before, state(bench.model, bench.objective))
        assert found == [] or (first and teacher == "copy" and found == ["teacher's weights"]), "the copy may be cut"
        mend()
        assert bench.after() == []


@pytest.mark.parametrize("error", ERRORS)
def test_an_exception_in_the_student_or_its_backward_leaves_nothing(error):
    bench = Bench()

    def fail(*args):
        raise error("broken")

    handle = bench.model.blocks[1].register_forward_hook(fail)
    before = state(bench.model, bench.objective)
    with pytest.raises(BaseException, match="broken") as caught:  # perhaps told again
        bench.objective(bench.model, bench.data[0])
    assert error in (type(caught.value), type(caught.value.__cause__))
    handle.remove()
    before["hooks"] = state(bench.model, bench.objective)["hooks"]
    assert set(changed(before, state(bench.model, bench.objective))) <= {"random"}, "dropout before the hook"
    prediction = predict(bench.model, bench.objective, bench.data)
    loss = loss_of(bench.objective, Failing.apply(prediction, error), bench.data)
    before = state(bench.model, bench.objective)
    with pytest.raises(error, match="broken"):
        loss.backward()
    assert changed(before, state(bench.model, bench.objective)) == []
    assert bench.after() == []


def test_under_autocast_and_no_grad_an_exception_leaves_both_as_they_are():
    bench = Bench("lora")
    mend = break_teachers_pass_with_grad(bench, RuntimeError)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = predict(bench.model, bench.objective, bench.data)
        before = state(bench.model, bench.objective)
        with pytest.raises(RuntimeError, match="broken"):
            loss_of(bench.objective, prediction, bench.data)
        assert changed(before, state(bench.model, bench.objective)) == []
    mend()
    mend = break_teacher(bench, RuntimeError)
    with torch.no_grad():
        before = state(bench.model, bench.objective)
        with pytest.raises(RuntimeError, match="broken"):
            loss_of(bench.objective, prediction.float(), bench.data)
        assert changed(before, state(bench.model, bench.objective)) == []
    mend()
    assert bench.after() == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_after_an_exception_no_activation_is_alive(error):
    bench = Bench()
    alive = []
    handles = [
        block.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
        for block in taps.layer(bench.objective.teacher.module, "blocks")
    ]
    mend = break_teachers_backward(bench, error)
    gc.collect()
    gc.disable()
    try:
        prediction = predict(bench.model, bench.objective, bench.data)
        with suppress(error):
            loss_of(bench.objective, prediction, bench.data)
        assert len(alive) == 4
        assert not any(end() is not None for end in alive)
    finally:
        gc.enable()
        mend()
        for handle in handles:
            handle.remove()


# --- what a failed call has drawn -----------------------------------------------------------------------------------------


def test_a_failed_call_has_drawn_and_the_state_from_before_repeats_it():
    bench = Bench()
    clean = bench.data[0]
    drawn = bench.objective.rng_state()
    mend = break_distance(bench, RuntimeError)
    with pytest.raises(RuntimeError, match="broken"):
        bench.objective(bench.model, clean)
    assert not torch.equal(bench.objective.rng_state(), drawn)
    mend()
    bench.objective.set_rng_state(drawn)
    torch.manual_seed(3)
    again = bench.objective(bench.model, clean)
    bench.renew()
    bench.objective.set_rng_state(drawn)
    torch.manual_seed(3)
    assert torch.equal(bench.objective(bench.model, clean), again)


def test_arguments_that_are_refused_before_a_draw_leave_the_generator():
    bench = Bench()
    drawn = bench.objective.rng_state()
    with pytest.raises(ValueError, match="reduction"):
        bench.objective(bench.model, bench.data[0], reduction="sum")
    with pytest.raises(ValueError, match="has shape"):
        bench.objective.loss(bench.data[0], clean=bench.data[0], noise=bench.data[1], t=bench.data[2][:1])
    assert torch.equal(bench.objective.rng_state(), drawn)


def test_a_sampler_that_has_run_out_is_told_and_does_not_end_the_loop():
    times = iter([torch.full((3,), 0.5)])
    model, objective = build(t=lambda schedule, like, *, t, generator: next(times))
    clean = batch()[0]
    with pytest.raises(ValueError, match="`t`"):
        list(map(objective, [model] * 3, [clean] * 3))


# --- threads, and calls inside of calls -----------------------------------------------------------------------------------


def at_once(jobs):
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(60) for future in [pool.submit(job) for job in jobs]]


def meeting(call, parties=2):
    """A call that waits, for a moment, until another thread is in it, too."""
    barrier = threading.Barrier(parties)

    def met(model, x_t, t, cond):
        with suppress(threading.BrokenBarrierError):
            barrier.wait(0.05)
        barrier.reset()
        return call(model, x_t, t, cond)

    return met


def steps(model, objective, data, count=2):
    """Gradients of steps of one's own, with t' given and no dropout."""
    clean, _, t = data
    found = []
    for i in range(count):
        prediction = (clean * (i + 1)).requires_grad_()
        loss_of(objective, prediction, data, t_prime=t.flip(0)).backward()
        found.append(prediction.grad)
    return found


def other(data):
    clean, noise, t = data
    return clean.flip(1), noise.flip(0), t.flip(0)


@pytest.mark.parametrize("shared", ["nothing", "module", "objective"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_two_threads_get_the_gradients_of_one(teacher, shared):
    model, objective = build(teacher)
    two = objective
    if shared == "nothing":
        two = build(teacher)[1]
    elif shared == "module":
        two = build(teacher=objective.teacher.module)[1]
    data = batch()
    expected = steps(model, objective, data), steps(model, two, other(data))
    objective.teacher.call = two.teacher.call = meeting(objective.teacher.call)
    fast = torch.backends.mha.get_fastpath_enabled()
    found = at_once([lambda: steps(model, objective, data), lambda: steps(model, two, other(data))])
    for got, wanted in zip(found, expected, strict=True):
        assert all(map(torch.equal, got, wanted))
    assert not any(module._forward_hooks for module in objective.teacher.module.modules())
    torch.backends.mha.set_fastpath_enabled(fast)


def test_two_threads_leave_the_fast_path_of_attention_as_it_was():
    one, two = NoFastPath(), NoFastPath()
    try:
        one.__enter__(), at_once([two.__enter__])
        one.__exit__(None, None, None)
        assert not torch.backends.mha.get_fastpath_enabled(), "the other is still inside"
        at_once([lambda: two.__exit__(None, None, None)])
        assert torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("shared", ["module", "objective"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_two_threads_may_both_make_the_first_pass(teacher, shared):
    def made():
        model, objective = build(teacher)
        return model, objective, build(teacher=objective.teacher.module)[1] if shared == "module" else objective

    data = batch()
    model, objective, two = made()
    expected = steps(model, objective, data), steps(model, two, other(data))
    model, objective, two = made()
    inside, most = [], []

    def alone(teacher, call):
        def called(*args):
            if teacher._ran:
                return call(*args)
            inside.append(teacher)
            most.append(len(inside))
            time.sleep(0.02)
            try:
                return call(*args)
            finally:
                inside.remove(teacher)

        return called

    given = objective.teacher.call = alone(objective.teacher, objective.teacher.call)
    if two is not objective:
        two.teacher.call = alone(two.teacher, two.teacher.call)
    found = at_once([lambda: steps(model, objective, data), lambda: steps(model, two, other(data))])
    for got, wanted in zip(found, expected, strict=True):
        assert all(map(torch.equal, got, wanted))
    assert set(most) == {1}
    assert objective.teacher.call is given
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in objective.teacher.module.modules())


@pytest.mark.parametrize("of", ["student", "teacher"])
@pytest.mark.parametrize("layer", ["blocks.0", LAYER, "leave"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_call_inside_a_hook_of_the_model_is_right_and_so_is_the_one_around_it(teacher, layer, of):
    bench = Bench(teacher)
    module = bench.model if of == "student" else bench.objective.teacher.module
    if of == "teacher" and layer == "leave":
        pytest.skip("the teacher's pass ends before")
    expected = steps(bench.model, bench.objective, other(bench.data), 1)
    inside, found = [], []

    def call(*args):
        if not inside:
            inside.append(True)
            try:
                with torch.enable_grad():
                    found.extend(steps(bench.model, bench.objective, other(bench.data), 1))
            finally:
                inside.clear()

    handle = taps.layer(module, layer).register_forward_hook(call)
    try:
        assert bench.after() == []
    finally:
        handle.remove()
    assert found
    assert all(torch.equal(one, expected[0]) for one in found)


def test_a_call_inside_the_distance_is_right_and_so_is_the_one_around_it():
    bench = Bench()
    expected = steps(bench.model, bench.objective, other(bench.data), 1)
    found, inside = [], []

    def distance(features, true):
        if not inside:
            inside.append(True)
            found.extend(steps(bench.model, bench.objective, other(bench.data), 1))
            inside.clear()
        return distances.mse(features, true)

    replace_distance(bench, distance)
    assert bench.after() == []
    assert all(torch.equal(one, expected[0]) for one in found)


# --- copies -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_copied_or_pickled_objective_continues_as_the_original(teacher, way):
    model, objective = build(teacher, call=call)
    data = batch()
    gradient(model, objective, data)
    copied = copy.deepcopy(objective) if way == "deepcopy" else pickle.loads(pickle.dumps(objective))
    assert torch.equal(copied.rng_state(), objective.rng_state())
    assert copied.teacher.module is not objective.teacher.module
    found = gradient(model, copied, data)
    assert all(map(torch.equal, found, gradient(model, objective, data)))
    assert torch.equal(copied.rng_state(), objective.rng_state())


def test_an_objective_with_a_lambda_is_not_pickled():
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(build()[1])


def call(model, x_t, t, cond):
    return model(x_t, t, **cond)


def test_the_state_is_put_back_also_where_autocast_was_entered_and_not_left():
    before = staged.Before(torch.device("cpu"))
    try:
        torch.autocast_increment_nesting()
        torch.set_autocast_enabled("cpu", True)
        torch.set_grad_enabled(False)
        torch.rand(1)
    finally:
        before.restore()
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.autocast_increment_nesting() == 1
    assert torch.autocast_decrement_nesting() == 0
