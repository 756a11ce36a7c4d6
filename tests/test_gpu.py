"""On a GPU: everything in its place, few waits, the same numbers.

Where there is no GPU, the steps run on tensors that pretend to be on one (pretend_gpu.py). The tests marked `gpu` need a card: `pytest -m gpu`.
"""
import contextlib
import copy
import importlib.util
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from fastai.callback.core import Callback
from torch.testing import assert_close

from densessl.data.augment import _blur_matrices, adjust_color, draw_augment
from densessl.ground.ranks import from_first_rank
from densessl.training.score import DenseScore
from densessl.ground.core import InputError
from densessl.data.images import scene_dls
from densessl.methods.encoders import dense_encoder
from densessl.training.learner import learner, methods
from densessl.training.precision import AutocastBF16, compile_blocks
from densessl.ground.synthetic import draw_scenes
from densessl.data.views import Augment, _crop_resize_batched
from pretend_gpu import OnGPU, PretendGPU, pretend_gpu

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('gpu_experiment', ROOT/'experiments/gpu.py')
spec.loader.exec_module(check := importlib.util.module_from_spec(spec))

METHODS = ['flsl', 'clove', 'dino']     # the others: test_methods
gpu = pytest.mark.gpu
needs_one = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
without_one = pytest.mark.skipif(torch.cuda.is_available(), reason='pretends to have a GPU')


# ---- the pretended GPU itself

@without_one
@pytest.mark.parametrize('mix', [
    lambda x, y: x+y, lambda x, y: torch.cat([x, y]), lambda x, y: x@y, lambda x, y: torch.where(x>0, x, y), lambda x, y: x.lerp_(y, .5),
    lambda x, y: torch.nn.functional.linear(x, y), lambda x, y: x.index_copy(0, torch.arange(3), y), lambda x, y: torch._foreach_add([x], [y])])
def test_mixed_devices_raise(mix):
    with pretend_gpu():
        x, y = torch.ones(3, 3, device='cuda'), torch.ones(3, 3)
        for pair in ((x, y), (y, x)):
            with pytest.raises(RuntimeError, match='same device'): mix(*pair)
        assert (x*torch.tensor(2.)).device.type=='cuda'       # one number of the CPU may stand beside them


WAITS = dict(
    item=lambda x: x.sum().item(), truth=lambda x: bool(x.any()), number=lambda x: float(x.sum()), cpu=lambda x: x.cpu(), to=lambda x: x.to('cpu', non_blocking=True),
    nonzero=lambda x: x.nonzero(), mask=lambda x: x[x>0], mask_set=lambda x: x.index_put_((x>0,), x[:2].clone()), unique=lambda x: x.unique(), list=lambda x: x.tolist(),
    equal=lambda x: torch.equal(x, x), copy=lambda x: x.copy_(torch.zeros(3)), made=lambda x: torch.tensor([1.], device='cuda'), moved=lambda x: torch.ones(3).to('cuda'),
    index=lambda x: x[torch.tensor([1])], svd=lambda x: torch.linalg.svdvals(x[None]), repeat=lambda x: x.repeat_interleave(x.long()))
RUNS_ON = dict(
    sum=lambda x: x.sum(), masked_fill=lambda x: x.masked_fill_(x>0, 1.), where=lambda x: torch.where(x>0, x, 0.), mask_set=lambda x: x.__setitem__(x>0, 2.),
    gather=lambda x: x.gather(0, torch.zeros(2, dtype=torch.long, device='cuda')), moved=lambda x: torch.ones(3).to('cuda', non_blocking=True),
    again=lambda x: x.to('cuda'), half=lambda x: x.half(), drawn=lambda x: torch.rand(3, device='cuda'), like=lambda x: torch.zeros_like(x))

@without_one
@pytest.mark.parametrize('name', WAITS)
def test_waits_are_counted(name):
    with pretend_gpu() as g:
        x = torch.arange(3., device='cuda')
        with g.counted() as seen: WAITS[name](x)
    assert sum(seen.waits.values())>=1

@without_one
@pytest.mark.parametrize('name', RUNS_ON)
def test_what_does_not_wait_is_not_counted(name):
    with pretend_gpu() as g:
        x = torch.arange(3., device='cuda')
        with g.counted() as seen: RUNS_ON[name](x)
    assert not seen.waits and sum(seen.copies.values())==(name=='moved')

@without_one
def test_it_computes_what_the_cpu_computes():
    "A small network with its gradients, half precision and an optimizer's step"
    def work(device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 2))
        x, opt = torch.randn(5, 6), torch.optim.AdamW(net.parameters(), lr=.1)
        net.to(device)                                     # the optimizer keeps its parameters
        with torch.autocast(device, dtype=torch.bfloat16): loss = net(x.to(device)).square().mean()
        loss.backward()
        opt.step()
        assert all(p.device.type==p.grad.device.type==device for p in net.parameters())
        return [p.detach().cpu() for p in copy.deepcopy(net).parameters()]
    want = work('cpu')
    with pretend_gpu(): got = work('cuda')
    for a,b in zip(got, want): assert_close(a, b, rtol=0, atol=0)
    assert not torch.cuda.is_available()


@without_one
def test_streams_that_do_not_wait_raise():
    with pretend_gpu():
        main, side, x = torch.cuda.current_stream(), torch.cuda.Stream(), torch.ones(3, device='cuda')
        with torch.cuda.stream(side):
            with pytest.raises(RuntimeError, match='race'): x+1
            side.wait_stream(main)
            with pytest.raises(RuntimeError, match='record_stream'): x+1
            x.record_stream(side)
            y = x+1
        with pytest.raises(RuntimeError, match='race'): y.sum()
        main.wait_stream(side)
        with pytest.raises(RuntimeError, match='record_stream'): y.sum()
        y.record_stream(main)
        z = y+x
        assert z.tolist()==[3.]*3
        with torch.cuda.stream(side): z+1        # `tolist` has waited for all


# ---- a step of each method stays on the device

# none: the loss stays on the device for the epoch; whether loss and gradients are finite is read when the next step begins, from an event
STEP_WAITS = Counter()
STEP_EVENTS = Counter({'guard.read': 1})
# numbers drawn for boxes, colors, blur and flips, and the boxes themselves; all of them are small and none waits
STEP_COPIES = dict(flsl=31, clove=32, dino=32)

class Steps(Callback):
    "Waits and copies of each step, from the end of the one before it"
    order, run_valid = 3000, False
    def __init__(self, gpu): self.gpu, self.steps = gpu, []
    def after_batch(self):
        if self.steps: self.last.__exit__(None, None, None)
        self.last = self.gpu.counted()
        self.steps.append(self.last.__enter__())

def steps_of(method, gpu, how='fp32', n=4, **kwargs):
    "The learner, what each step from the second on has cost, and the look of the monitor at the last one"
    steps = Steps(gpu)
    learn = check.small_learner(method, 'cuda', n=4*n, cbs=[steps], **dict(monitor_every=100, bf16=False)|kwargs)
    if how!='fp32': getattr(learn, f'to_{how}')()
    check.fit(learn)
    return learn, steps.steps[:-1]          # the last one is not over

@without_one
@pytest.mark.parametrize('method', METHODS)
def test_a_step_stays_on_the_device(method):
    with pretend_gpu() as g:
        learn, steps = steps_of(method, g)
        losses = torch.tensor([float(o) for o in learn.recorder.losses])
        states = [v for s in learn.opt.state_dict()['state'].values() for v in s.values() if isinstance(v, torch.Tensor) and v.dim()]
        there = [*learn.model.parameters(), *learn.model.buffers(), *states]
        assert there and all(isinstance(o, OnGPU) for o in there)
    for s in steps[:2]:
        assert not s.waits-STEP_WAITS, f'a step waits more often: {s.waits}'
        assert not s.events-STEP_EVENTS, s.events
        assert sum(s.copies.values())<=STEP_COPIES[method], f'a step copies more often: {s.copies}'
    assert steps[1].events==STEP_EVENTS         # the first was looked at by the monitor
    want = check.fit(check.small_learner(method, 'cpu', n=16, monitor_every=100))
    assert_close(losses, torch.tensor(want), rtol=.02, atol=0)        # views are rounded elsewhere there

# one look of the monitor: its numbers in one copy, and the eigenvalues for each rank
LOOK_WAITS = dict(flsl=2, clove=3, dino=2)

@without_one
@pytest.mark.parametrize('method', METHODS)
def test_a_look_of_the_monitor(method):
    with pretend_gpu() as g: _, steps = steps_of(method, g, monitor_every=1)
    for s in steps[:2]: assert sum((s.waits-STEP_WAITS).values())<=LOOK_WAITS[method], s.waits

@without_one
@pytest.mark.parametrize('method,how', [('flsl', 'bf16'), ('clove', 'bf16'), ('dino', 'bf16'), ('flsl', 'fp16'), ('dino', 'fp16')])
def test_half_precision_stays_on_the_device(method, how):
    "fp16 waits where fastai's scaler asks whether the step overflowed, and the guard looks at the loss before that, at the gradients after it"
    more = Counter({'fp16.before_step': 2, 'fp16.after_step': 1, 'ranks.ranks_where': 2} if how=='fp16' else {})
    with pretend_gpu() as g:
        learn, steps = steps_of(method, g, how)
        assert all(math.isfinite(float(o)) for o in learn.recorder.losses)
        assert not torch.is_autocast_enabled('cuda')
    for s in steps[:2]: assert not s.waits-STEP_WAITS-more, s.waits

@without_one
@pytest.mark.parametrize('bf16,precision', [(None, 'high'), (True, 'high'), (False, 'highest')])
@pytest.mark.parametrize('fails', [False, True])
def test_a_gpu_gets_bf16_and_tf32_while_it_trains(bf16, precision, fails):
    seen = []

    class Look(Callback):
        def before_backward(self):
            seen.append(torch.get_float32_matmul_precision())
            if fails: raise KeyboardInterrupt
    with pretend_gpu():
        learn = check.small_learner('flsl', 'cuda', cbs=[Look()], bf16=bf16)
        assert bool(learn._grab_cbs(AutocastBF16)) is (bf16 is not False)
        with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext(): check.fit(learn)
    assert seen[0]==precision and torch.get_float32_matmul_precision()=='highest'
    assert not torch.is_autocast_enabled('cuda')

@without_one
def test_a_compiled_learner_waits_no_more(method='dino'):
    "With the real blocks in place of compiled ones, as no compiler knows the pretended tensors"
    with pretend_gpu() as g, torch._dynamo.config.patch(disable=True): _, steps = steps_of(method, g, compile='eager')
    for s in steps[:2]: assert not s.waits-STEP_WAITS, s.waits

@without_one
def test_scores_pictures_export_and_resume(tmp_path):
    "What the main job does beside its steps"
    with pretend_gpu():
        for name,f in dict(resume=lambda: check.resume_on('clove', 'cuda'), scores=lambda: check.scores_beside_cpu('cuda'), pictures=lambda: check.pictures_of('cuda'),
                           export=lambda: check.export_from(check.CNN[0], 'cuda', img_size=32, **check.CNN[1])).items():
            res = f()
            assert res['ok'], (name, res)
        scored = DenseScore(labelled=check.scenes_with_labels(), n_photos=4, out=tmp_path, linear=True, verbose=False, starts=2)
        check.fit(check.small_learner('flsl', 'cuda', cbs=[scored]), 2)
    assert (tmp_path/'best.safetensors').exists() and len(scored.history)==3

@without_one
@pytest.mark.parametrize('method', METHODS)
def test_views_on_the_device(method):
    with pretend_gpu(): assert (res := check.views_beside_cpu(method, torch.device('cuda')))['ok'], res

@without_one
@pytest.mark.parametrize('method', METHODS)
def test_views_are_made_beside_the_step_before(method):
    "On a stream of their own that waits for nothing, so for no step either (kept canvases: test_kept)"
    made = []
    class Look(Callback):
        def before_batch(self): made.extend(PretendGPU.current.made[x.data_ptr()] for v in self.xb[0].values() for x in (v.images, v.boxes))
    with pretend_gpu() as g: check.fit(check.small_learner(method, 'cuda', n=16, cbs=[Look()]))
    assert len(made)>=8 and all(stream is not g.stream and claimed=={g.stream} for stream,_,claimed in made)
    assert not any(stream.known for stream,*_ in made)


# ---- several processes

def wait_for_the_first(rank, init, out):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=init, rank=rank, world_size=2, timeout=timedelta(seconds=1))
    value = from_first_rank(lambda: time.sleep(2.5) or 'scores')
    (out/str(rank)).write_text(value)
    os._exit(0)

@pytest.mark.skipif(sys.platform!='linux' or not dist.is_gloo_available(), reason='forks, with gloo')
def test_the_others_wait_for_a_long_scoring(tmp_path):
    "Longer than the time limit of their group, which is ten minutes with nccl"
    context = multiprocessing.get_context('fork')
    ps = [context.Process(target=wait_for_the_first, args=(r, f'file://{tmp_path/"meet"}', tmp_path)) for r in range(2)]
    for p in ps: p.start()
    for p in ps: p.join(60)
    assert [(tmp_path/str(r)).read_text() for r in range(2)]==['scores']*2


# ---- compiled

def test_views_are_three_graphs():
    "Crops, colors and blur, as an accelerator makes them: one graph each, with the same numbers"
    canvas = draw_scenes(3, 40, seed=1)[0]
    px, flip = torch.tensor([[0, 0, 40, 40], [3, 5, 30, 21], [9, 9, 10, 10]]), torch.tensor([False, True, False])
    d = draw_augment(Augment(), 3, 40, torch.Generator().manual_seed(0))
    steps = [(_crop_resize_batched, (canvas, px, flip, 32)), (adjust_color, (canvas/255, d.matrix, d.contrast)),
             (_blur_matrices, (canvas/255, torch.tensor([.5, 1., 2.])))]
    for f,args in steps:
        torch._dynamo.reset()
        assert_close(torch.compile(f, backend='aot_eager', fullgraph=True)(*args), f(*args), rtol=0, atol=1e-5)

def parts_of(method, **kwargs):
    "Method, loss and views"
    c, (arch, own), m = check.small_settings(method), check.NETWORKS[method], methods[method]
    if method=='flsl': c = replace(c, random_query=True)
    torch.manual_seed(0)
    model = m.model(dense_encoder(arch, img_size=c.img_size, **own|kwargs), c).train()
    return model, m.loss(c), check.make_views(methods[method].recipe(c), check.draw_scenes(4, 40, seed=4)[0])

@pytest.mark.parametrize('method,half', [('flsl', False), ('flsl', True), ('clove', False), ('dino', False)])
def test_the_step_of_a_method_is_one_graph(method, half):
    "Forward pass and loss without a break, and in fp32 the same bits"
    torch._dynamo.reset()
    model, loss_func, views = parts_of(method)
    graphs, twin = [], copy.deepcopy(model)

    def step(m):
        def f(v):
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=half): return loss_func(m(v))
        return f
    compiled = torch.compile(step(model), backend='aot_eager', fullgraph=True)
    losses = []
    for f in (step(twin), compiled):
        torch.manual_seed(1)
        losses.append(f(views))
        losses[-1].backward()
    tolerance = dict(rtol=0, atol=.02) if half else dict(rtol=0, atol=0)
    assert_close(losses[1], losses[0], **tolerance)
    for (k, p),q in zip(twin.named_parameters(), model.parameters()):
        assert (p.grad is None)==(q.grad is None), k
        if p.grad is not None: assert_close(q.grad, p.grad, **tolerance, msg=lambda m: f'{k}: {m}')

@torch._dynamo.config.patch(recompile_limit=8)
def test_no_block_of_a_cnn_is_left_out():
    "Sixteen blocks of as many shapes, more than torch compiles of one function unless told to"
    torch._dynamo.reset()
    c = methods['byol'].presets['scenes']
    c = replace(c, img_size=64, hidden_dim=16, out_dim=8)
    learn = learner(scene_dls(4, methods['byol'].recipe(c), bs=2), 'resnet26', 'byol', c, model_kwargs=dict(stem_width=8, channels=[8, 16, 24, 32]), compile='eager')
    torch._dynamo.utils.counters.clear()
    check.fit(learn)
    frames = torch._dynamo.utils.counters['frames']
    assert frames['ok']==frames['total']>=16

@pytest.mark.parametrize('depth', [3, 12])
def test_all_blocks_share_their_graphs(depth):
    "However many blocks, and though each has a rate of stochastic depth of its own: with and without it, for two sizes, in student and teacher"
    torch._dynamo.reset()
    model, loss_func, views = parts_of('flsl', depth=depth, drop_path_rate=.1)
    names, made = list(model.state_dict()), []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward
    assert len(compile_blocks(model, backend))==2*depth
    for _ in range(2):
        loss_func(model(views)).backward()
        model.update_teacher(.9)
    assert 0<len(made)<=6 and list(model.state_dict())==names

def test_a_compiled_learner_is_the_same_run(method='flsl'):
    "Weights have the same names and, with a backend that makes no kernels, the same bits; its checkpoint fits a learner that is not compiled"
    torch._dynamo.reset()
    runs = []
    for kwargs in ({}, dict(compile='aot_eager')):
        runs.append(check.small_learner(method, 'cpu', **kwargs))
        check.fit(runs[-1])
    plain, compiled = runs
    for (k, v),(name, w) in zip(plain.model.state_dict().items(), compiled.model.state_dict().items()):
        assert k==name
        assert_close(w, v, rtol=1e-5, atol=1e-6)
    plain.model.load_state_dict(compiled.model.state_dict())

def test_all_blocks_share_three_programs():
    "The teacher's, the student's, and the student's for views of another size; with a rate of its own in every block and none in the first"
    model, _, views = parts_of('flsl', depth=3, drop_path_rate=.2)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(model, 'aot_eager')
    for _ in range(2): model(views)
    assert torch._dynamo.utils.counters['stats']['unique_graphs']==3

def test_stochastic_depth_as_a_tensor():
    "It drops samples whole, at its rate, keeps the mean, and leaves evaluation alone"
    from timm.layers import DropPath
    model, *_ = parts_of('dino', drop_path_rate=.5)
    compile_blocks(model, 'eager')
    drop = next(m for m in model.student.modules() if isinstance(m, DropPath) and m.drop_prob)
    torch.manual_seed(0)
    y = drop(torch.ones(4000, 3, 2))
    assert ((y==0).all((1, 2)) | (y==1/(1-drop.drop_prob)).all((1, 2))).all()
    assert abs(y.mean().item()-1)<.1 and drop.drop_prob==.5
    assert (drop.eval()(torch.ones(9, 1))==1).all()
    assert drop(torch.ones(2, 1, dtype=torch.bfloat16)).dtype==torch.bfloat16 and drop.train()(torch.ones(2, 1, dtype=torch.bfloat16)).dtype==torch.bfloat16


# ---- the experiment

def test_the_experiment_in_miniature(tmp_path):
    "Every stage to its end, every check right, a table with all arms; it calls the library as it is now"
    r = subprocess.run([sys.executable, str(ROOT/'experiments/gpu.py'), '--tiny', '--out', str(tmp_path)], capture_output=True, text=True,
                       env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    assert r.returncode==0, r.stderr[-2000:]
    right, fast = (json.loads((tmp_path/f'{o}.json').read_text()) for o in ('right', 'fast'))
    assert not (wrong := {k: v for k,v in right.items() if not v.get('ok', True)}), wrong
    assert not (errors := {k: v for k,v in fast.items() if 'error' in v}), errors
    assert sum('images_per_second' in v for v in fast.values())>=4
    learns = json.loads((tmp_path/'learns.json').read_text())
    for arm in check.ARMS:
        assert learns[arm].get('steps', 0)>1, learns[arm]
        for name in (f'{arm}_half', arm):
            found = json.loads((tmp_path/f'scores_{name}.json').read_text())
            assert {'nearest neighbor', 'linear', 'correspondence'}<=found['scores'].keys(), found
            assert f'  {name:<22}' in r.stdout
        assert (tmp_path/f'modes_{arm}.png').stat().st_size>1000
    assert {'scores_start_vit_0.json', 'scores_start_cnn_0.json'}<={p.name for p in tmp_path.iterdir()}

def test_a_failed_check_is_told(tmp_path, capsys):
    "A check that raises is written down, the others go on, and the table says WRONG"
    record = check.Record(tmp_path/'right.json')
    def broken(): raise InputError('no such thing')
    record.measure('broken', broken)
    record.measure('sound', lambda: dict(ok=True))
    said = check.tables(tmp_path)
    assert 'broken                           WRONG  {"error": "InputError: no such thing"' in said and 'sound                            ok' in said

def test_arms_share_the_clock():
    "The schedules end when the seconds do, and what is scored half-way does not count"
    seen = []
    clock = check.ByTheClock(.6, lambda: (seen.append(clock.trained), time.sleep(1.)))
    class Look(Callback):
        order = 70
        def before_batch(self): self.rates.append(self.learn.pct_train)
        rates = []
    learn = check.small_learner('flsl', 'cpu', cbs=[clock, look := Look()])
    check.fit(learn, 10**5)
    assert len(seen)==1 and .3<seen[0]<=clock.trained and clock.trained<1.2
    assert look.rates==sorted(look.rates) and look.rates[0]==0 and .5<look.rates[-1]<=1
    assert clock.steps==len(look.rates)+1 and look.rates[:3]==[0, 0, 0]


# ---- with a card

CUDA = torch.device('cuda', 0)

@gpu
@needs_one
@pytest.mark.parametrize('method', METHODS)
def test_gpu_makes_the_same_views(method): assert (res := check.views_beside_cpu(method, CUDA))['ok'], res

@gpu
@needs_one
@pytest.mark.parametrize('how', check.PRECISIONS)
@pytest.mark.parametrize('method', METHODS)
def test_gpu_has_the_same_loss_and_gradients(method, how): assert (res := check.step_beside_cpu(method, how, CUDA))['ok'], res

@gpu
@needs_one
@pytest.mark.parametrize('how', ['fp32', 'tf32', 'bf16', 'to_fp16', 'to_bf16'])
@pytest.mark.parametrize('method', METHODS)
def test_gpu_trains(method, how): assert (res := check.learner_in(method, how, CUDA))['ok'], res

@gpu
@needs_one
@pytest.mark.parametrize('arch', ['vit_small_patch16_224', 'resnet50'])
def test_gpu_exports_with_tf32_convolutions(arch): assert check.export_from(arch, CUDA)['tf32']

@gpu
@needs_one
@pytest.mark.parametrize('method', METHODS)
def test_gpu_resumes_to_the_bit(method): assert (res := check.resume_on(method, CUDA))['ok'], res

@gpu
@needs_one
def test_gpu_scores(): assert (res := check.scores_beside_cpu(CUDA))['ok'], res

@gpu
@needs_one
def test_gpu_draws_pictures(): assert check.pictures_of(CUDA)['ok']

@gpu
@needs_one
@pytest.mark.parametrize('method', METHODS)
def test_gpu_waits_as_often_as_it_is_thought_to(method):
    "After a first fit, in which each library waits once"
    found = [check.waits_of(method, CUDA) for _ in range(2)]
    assert found[1]['sum']<=sum(STEP_WAITS.values()), found

@gpu
@needs_one
@pytest.mark.parametrize('method', METHODS)
def test_gpu_trains_the_same_when_it_is_looked_at_later(method):
    def losses(late):
        learn = check.small_learner(method, CUDA, n=24, bf16=False)
        learn.stop_if_not_finite.late = late
        return torch.tensor(check.fit(learn))
    assert_close(losses(True), losses(False), rtol=1e-4, atol=0)

@gpu
@needs_one
def test_gpu_names_a_bad_step_a_step_later():
    "With the weights of before it, while the card is a step ahead"
    class Spoil(Callback):
        def before_step(self):
            if self.train_iter!=2: return
            self.kept = [p.detach().clone() for p in self.learn.model.parameters()]
            self.learn.model.student.encoder.net.get_parameter('norm.weight').grad[1] = math.nan
    learn = check.small_learner('flsl', CUDA, n=24, cbs=[Spoil()], monitor_every=100)
    with pytest.raises(InputError, match='at step 2 of epoch 1.*encoder.net.norm.weight'): check.fit(learn)
    for p,q in zip(learn.model.parameters(), learn.spoil.kept, strict=True): assert torch.equal(p, q)

@gpu
@needs_one
@pytest.mark.parametrize('method', METHODS)
def test_gpu_trains_compiled(method):
    torch._dynamo.reset()
    plain, compiled = (check.fit(check.small_learner(method, CUDA, n=16, **kwargs)) for kwargs in ({}, dict(compile=True)))
    assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=.02, atol=0)
