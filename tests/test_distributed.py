"Several processes train what one process with the joined batch trains; they stop together, and alone they do not hang"
import importlib.util, os, re, shutil, signal, socket, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest, torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from torch import nn
from torch.testing import assert_close

from densessl.data.augment import make_views
from densessl.training.resume import SaveRun
from densessl.ground.ranks import from_first_rank
from densessl.training.score import DenseScore
from densessl.training.guard import StopIfNotFinite
from densessl.methods.clove import CLoVE, CLoVELoss, clove_presets, clove_recipe
from densessl.ground.core import InputError
from densessl.data.images import scene_dls
from densessl.methods.dino import DINO, DINOLoss, dino_presets, dino_recipe
from densessl.training.distributed import ManyProcesses, sync_batchnorm
from densessl.methods.encoders import dense_encoder
from densessl.methods.flsl import FLSL, FLSLLoss, flsl_presets, flsl_recipe
from densessl.training.learner import clove_learner, dino_learner, flsl_learner
from densessl.training.optim import adamw
from densessl.ground.synthetic import draw_scenes
from densessl.data.views import View
from processes import server

pytestmark = [pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason='needs gloo'),
              pytest.mark.skipif(importlib.util.find_spec('accelerate') is None, reason='needs accelerate')]

WORLDS, TOTAL, EPOCHS = (2, 3), 6, 2   # photographs in a step, over all processes
VIT, CNN = dict(patch_size=8, embed_dim=12, depth=1, num_heads=2), dict(output_stride=8)
flsl_config = replace(flsl_presets['scenes'], img_size=32, local_size=16, hidden_dim=16, bottleneck_dim=8, n_prototypes=8, random_query=False)
clove_config = replace(clove_presets['scenes'], img_size=32, local_size=16, n_local=2, hidden_dim=16, out_dim=8, num_heads=2, k=4, optimizer='lars', threshold=0.3)   # so near that some pairs of views have no match
dino_config = replace(dino_presets['scenes'], img_size=32, local_size=16, n_local=2, hidden_dim=16, bottleneck_dim=8, n_prototypes=16)
METHODS = dict(
    flsl = (FLSL, FLSLLoss, flsl_config, flsl_recipe, flsl_learner, 'vit_tiny_patch16_224', VIT),
    clove = (CLoVE, CLoVELoss, clove_config, clove_recipe, clove_learner, 'test_resnet', CNN),
    dino = (DINO, DINOLoss, dino_config, dino_recipe, dino_learner, 'vit_tiny_patch16_224', VIT))

# ---- running in processes

def child(rank, world, port, out, work, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), OMP_NUM_THREADS='1')
    torch.set_num_threads(1)
    torch.save(work(rank, world, *args), f'{out}/{rank}.pt')
    if dist.is_initialized(): dist.barrier(); dist.destroy_process_group()

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def start(work, world, out, *args):
    "Processes that run `work(rank, world, *args)`; the modules are imported once for all"
    port = free_port()
    ps = [server().Process(target=child, args=(r, world, port, str(out), work, args), daemon=True) for r in range(world)]
    for p in ps: p.start()
    return ps

def run(work, world, out, *args, limit=400):
    "What each process returns"
    out.mkdir(exist_ok=True)
    ps = start(work, world, out, *args)
    for p in ps: p.join(limit)
    codes = [p.exitcode for p in ps]
    for p in ps:
        if p.exitcode is None: p.kill()
    assert codes==[0]*world, f'exit codes {codes}'
    return [torch.load(out/f'{r}.pt', weights_only=True) for r in range(world)]

# ---- one step, the same views

def make_model(name):
    model, loss, config, recipe, _, arch, kwargs = METHODS[name]
    torch.manual_seed(3)
    return model(dense_encoder(arch, img_size=config.img_size, **kwargs), config).double(), loss(config)

def make_batch(name):
    "Views of `TOTAL` scenes, in float64"
    recipe = METHODS[name][3](METHODS[name][2])
    torch.manual_seed(7)
    views = make_views(recipe, draw_scenes(TOTAL, 40, seed=2)[0], torch.full((TOTAL, 2), 40))
    return {k: View(v.images.double(), v.boxes) for k,v in views.items()}

def numbers(name, views, wrap=lambda m: m, average=lambda x: x):
    "Loss, gradients and buffers of a step in training"
    model, loss_func = make_model(name)
    net = wrap(model.train())
    loss = loss_func(net(views))
    loss.backward()
    missing = [n for n,p in model.named_parameters() if p.requires_grad and p.grad is None]
    return dict(loss=average(loss.detach().clone()), missing=missing, grads={n: p.grad.clone() for n,p in model.named_parameters() if p.grad is not None},
                buffers={n: b.clone() for n,b in model.named_buffers()})

def one_step(rank, world):
    def average(x): dist.all_reduce(x); return x/world
    res = {}
    for name in METHODS:
        B = TOTAL//world
        mine = {k: View(*(t[:,rank*B:(rank+1)*B] for t in (v.images, v.boxes))) for k,v in make_batch(name).items()}
        for synced in (True, False):
            def wrap(m): return nn.parallel.DistributedDataParallel(sync_batchnorm(m, 'cpu') if synced else m)
            res[name, synced] = numbers(name, mine, wrap, average)
    return res

def largest(a, b):
    "Largest difference of two dictionaries of tensors, relative to the largest number of each"
    assert a.keys()==b.keys()
    return max([((a[k]-b[k]).abs().max()/b[k].abs().max().clamp_min(1e-6)).item() for k in a if a[k].is_floating_point()], default=0.)

def everything(rank, world): return dict(runs=whole_runs(rank, world), steps=one_step(rank, world))

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "What each of two and of three processes found, started once for all tests"
    return {world: run(everything, world, tmp_path_factory.mktemp('ranks')/'out') for world in WORLDS}

@pytest.mark.parametrize('world', WORLDS)
def test_step_equals_one_process(results, world, record_property):
    got = [o['steps'] for o in results[world]]
    for name in METHODS:
        want = numbers(name, make_batch(name))
        assert not want['missing'], 'DistributedDataParallel waits for the gradient of every parameter'
        for r in got:
            r = r[name, True]
            record_property(f'{name} {world}', max(largest(r['grads'], want['grads']), largest(r['buffers'], want['buffers'])))
            assert_close(r['loss'], want['loss'], rtol=1e-10, atol=1e-12)
            for k in ('grads', 'buffers'):
                for n in want[k]: assert_close(r[k][n], want[k][n], rtol=1e-8, atol=1e-11, msg=lambda m: f'{name} {k} {n}: {m}')
    # without synchronized batch norm CLoVE is another computation, the others have no batch norm
    want = numbers('clove', make_batch('clove'))
    assert (got[0]['clove', False]['loss']-want['loss']).abs()>1e-3

@pytest.mark.parametrize('arch,kwargs', [('vit_tiny_patch16_224', VIT), ('test_resnet', CNN)])
@pytest.mark.parametrize('name', METHODS)
def test_every_parameter_has_a_gradient(name, arch, kwargs):
    "Either method with either kind of encoder needs no find_unused_parameters"
    model, loss, config, *_ = METHODS[name]
    m = model(dense_encoder(arch, img_size=32, **kwargs), config).double()
    loss(config)(m(make_batch(name))).backward()
    assert not [n for n,p in m.named_parameters() if p.requires_grad and p.grad is None]

# ---- whole runs through the learner

class Fixed(Callback):
    "The whole photograph in every view, in float64, so that a run does not depend on who cuts the views"
    order,run_valid = -5,False
    def before_batch(self):
        def whole(v): return View(v.images.double(), torch.tensor([0., 0., 1., 1.]).expand_as(v.boxes))
        self.learn.xb = ({k: whole(v) for k,v in self.learn.xb[0].items()},)
    def after_loss(self): self.learn.loss = self.learn.loss.float()     # fastai's recorder has float32

class Note(Callback):
    "What each step saw, and a random number of it"
    order,run_valid = 90,False
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append((self.learn.xb[0][next(iter(self.learn.xb[0]))].images.sum((0, 2, 3, 4)), torch.rand(())))

def make_learner(name, bs, n=20, fixed=True, cbs=(), many=True, skip=0, **changes):
    model, _, config, recipe, learner, arch, kwargs = METHODS[name]
    config = replace(config, **changes)
    if fixed:
        crops = tuple(replace(c, scale=(1., 1.), ratio=(1., 1.), flip=0., augment=None) for c in recipe(config).crops)
        recipe = replace(recipe(config), crops=crops)
    else: recipe = recipe(config)
    torch.manual_seed(5)
    dls = scene_dls(n, recipe, bs=bs, seed=1)
    kw = {} if name=='clove' else dict(opt_func=partial(adamw, eps=1e-3))
    learn = learner(dls, arch, config, model_kwargs=kwargs, cbs=[*cbs, *([Fixed()] if fixed else [])], **kw)
    if fixed: learn.model.double()
    for cb in [o for o in learn.cbs if type(o).__name__ in ('ManyProcesses', 'StopIfNotFinite')]: learn.remove_cb(cb)
    return learn.add_cbs([StopIfNotFinite(skip), *([ManyProcesses()] if many else [])])

def fit(learn, n=EPOCHS, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, **kwargs)
    return learn

def state(learn): return {k: v.clone() for k,v in getattr(learn.model, 'module', learn.model).state_dict().items()}

def said(f):
    try: f()
    except InputError as e: return str(e)
    return ''

class NanLoss(Callback):
    "The loss of one step is no number, in one process"
    order,run_valid = 1,False
    def __init__(self, rank, at=1): self.rank,self.at = rank,at
    def after_loss(self):
        if self.train_iter==self.at and dist.get_rank()==self.rank: self.learn.loss = self.learn.loss*float('nan'); self.learn.loss_grad = self.learn.loss_grad*float('nan')

class NanGradient(NanLoss):
    "The gradient of one step is no number, in one process"
    def after_loss(self): pass
    def before_step(self):
        if self.train_iter==self.at and dist.get_rank()==self.rank: next(p for p in self.learn.model.module.student.parameters() if p.grad is not None).grad[0] = float('nan')

def scored_cnn(rank, world):
    learn = make_learner('clove', 4, fixed=False, cbs=[DenseScore(verbose=False, starts=2)])
    with learn.distrib_ctx(cpu=True): fit(learn, 1)
    return [h['epoch'] for h in learn.dense_score.history]

def test_one_process_scores_a_cnn(tmp_path):
    "Batch norm over all processes exchanges nothing while one of them gathers the statistics of the start"
    assert run(scored_cnn, 2, tmp_path/'scores', limit=120)==[[0,1], []]

def whole_runs(rank, world):
    res, bs = {}, TOTAL//world
    for name in METHODS:
        learn = make_learner(name, bs, cbs=[note := Note()])
        with learn.distrib_ctx(cpu=True): fit(learn)
        assert not hasattr(learn.model, 'module') and type(learn.dls.train).__name__=='ViewLoader', 'fastai puts model and data back'
        res[name] = dict(state=state(learn), losses=torch.stack([torch.as_tensor(float(o)) for o in learn.recorder.losses]), seen=torch.stack([s for s,_ in note.seen]),
                         random=torch.stack([r for _,r in note.seen]), monitored=len(learn.collapse_monitor.history), lr=learn.opt.hypers[-1]['lr'], pct=learn.schedules.history[-1]['lr'])
    if world==2: res['random'], res['exchanges'] = random_views(bs), exchanges(bs)
    # numbers that go wrong in the last process only
    for what,bad in (('loss', NanLoss), ('gradient', NanGradient))[:4-world]:
        learn = make_learner('clove', bs, cbs=[bad(world-1)])
        with learn.distrib_ctx(cpu=True): text = said(lambda: fit(learn))
        res[f'stop {what}'] = dict(text=text, state=state(learn))
        learn = make_learner('clove', bs, skip=1, cbs=[bad(world-1)])
        with learn.distrib_ctx(cpu=True): fit(learn)
        res[f'skip {what}'] = dict(state=state(learn), skipped=[(o['step'], o['ranks']) for o in learn.stop_if_not_finite.skipped], losses=[float(o) for o in learn.recorder.losses])
    if world==2:
        learn = make_learner('dino', bs, skip=1, cbs=[NanLoss(0), GradientAccumulation(2*bs)])
        with learn.distrib_ctx(cpu=True): fit(learn)
        res['skip accumulated'] = dict(state=state(learn), skipped=len(learn.stop_if_not_finite.skipped))
    # bad input
    for what,learn in dict(few=make_learner('dino', bs, n=TOTAL-1), unequal=make_learner('dino', bs, n=20+rank), sizes=make_learner('dino', bs+rank)).items():
        with learn.distrib_ctx(cpu=True): res[what] = said(lambda: fit(learn))
    res['alone'] = said(lambda: fit(make_learner('dino', bs)))
    return res

class Exchanges(Callback):
    "What each step exchanges beside numbers of the loss, and how the model is wrapped"
    order,run_valid = 2000,False
    def before_fit(self):
        self.plain,self.callers,self.flags,self.synced = dist.all_reduce,[],[],[]
        def noted(*args, **kwargs):
            self.callers.append(sys._getframe(1).f_code.co_name)
            return self.plain(*args, **kwargs)
        dist.all_reduce = noted
    def before_batch(self): self.callers.clear()
    def after_batch(self):
        self.flags.append(self.callers.count('ranks_where'))
        self.synced.append(self.learn.model.require_backward_grad_sync)
        self.buffers_sent = self.learn.model.broadcast_buffers
    def after_fit(self): dist.all_reduce = self.plain

def exchanges(bs):
    "With everything that talks; and with accumulated gradients"
    folder, res = from_first_rank(tempfile.mkdtemp), {}
    for name,cbs in dict(plain=[], accumulated=[GradientAccumulation(2*bs)]).items():
        learn = make_learner('dino', bs, cbs=[seen := Exchanges(), *cbs])
        with learn.distrib_ctx(cpu=True): fit(learn, cbs=[] if cbs else SaveRun(f'{folder}/run'))
        res[name] = dict(state=state(learn), flags=seen.flags, synced=seen.synced, buffers_sent=seen.buffers_sent)
    dist.barrier()
    if not dist.get_rank(): shutil.rmtree(folder)
    return res

def random_views(bs):
    "Another box in each process, the same weights in all"
    learn = make_learner('flsl', bs, fixed=False, freeze_epochs=1, cbs=[note := Note()])
    was = state(learn)
    with learn.distrib_ctx(cpu=True):
        fit(learn, 1); still = state(learn)
        fit(learn, 2)
    return dict(state=state(learn), random=torch.stack([r for _,r in note.seen]),
                rested=torch.equal(was[k := 'student.head.prototypes'], still[k]), moved=not torch.equal(still[k], state(learn)[k]))

@pytest.mark.parametrize('world', WORLDS)
def test_run_equals_one_process(results, world, record_property):
    got = [o['runs'] for o in results[world]]
    steps = 20//TOTAL*EPOCHS
    for name in METHODS:
        learn = fit(make_learner(name, TOTAL, cbs=[note := Note()], many=False))
        want = state(learn)
        assert_close(torch.stack([g[name]['seen'] for g in got], 1).flatten(1), torch.stack([s for s,_ in note.seen]), msg='the photographs of each step, process after process')
        for r,g in enumerate(got):
            for k in want: assert_close(g[name]['state'][k], want[k], rtol=1e-7, atol=1e-9, msg=lambda m: f'{name} {k} in process {r}: {m}')
            record_property(f'{name} {world}', largest(g[name]['state'], want))
            assert_close(g[name]['losses'], torch.stack([torch.as_tensor(float(o)) for o in learn.recorder.losses]), rtol=1e-5, atol=1e-6)
            assert len(g[name]['seen'])==steps and (g[name]['lr'], g[name]['pct'])==(learn.opt.hypers[-1]['lr'], learn.schedules.history[-1]['lr'])
        assert [g[name]['monitored']>0 for g in got]==[True]+[False]*(world-1), 'process 0 watches for all'
    for key in [k for k,v in got[0].items() if isinstance(v, dict) and 'state' in v]:
        for g in got[1:]:
            for k,v in got[0][key]['state'].items():
                if 'running_' in k: assert_close(g[key]['state'][k], v)       # the same numbers, added in another order
                else: assert torch.equal(g[key]['state'][k], v), f'{key}: {k} differs between processes'
    bad = world-1
    for g in got:
        text = g['stop loss']['text']
        assert text==got[0]['stop loss']['text'] and f'the loss is nan at step 1 of epoch 1 in process {bad} of {world}' in text, text
        assert g['skip loss']['skipped']==[(1, [bad])] and all(x==x for x in g['skip loss']['losses'])
        assert all(torch.isfinite(v).all() for v in g['skip loss']['state'].values())
        assert f'bs is {TOTAL//world} in each of {world} processes, {TOTAL} in all, but there are only {TOTAL-1} photographs' in g['few']
        assert 'see different numbers of photographs (20, 21' in g['unequal'] and 'batches of different size' in g['sizes']
        assert 'write `with learn.distrib_ctx(): learn.fit(...)`' in g['alone']

def test_two_processes_in_detail(results):
    got = [o['runs'] for o in results[2]]
    random = torch.stack([g['random']['random'] for g in got])
    assert len(random.unique())==random.numel(), 'each process draws its own numbers'
    for g in got:
        assert g['random']['rested'] and g['random']['moved'], 'prototypes rest in the first epoch only'
        text = g['stop gradient']['text']
        assert text==got[0]['stop gradient']['text'] and 'the gradient is not finite at step 1 of epoch 1 in process 1 of 2, first in the parameter student.encoder' in text, text
        assert [s for s,_ in g['skip gradient']['skipped']]==[1] and g['skip accumulated']['skipped']==1
        for key in ('skip gradient', 'skip accumulated'): assert all(torch.isfinite(v).all() for v in g[key]['state'].values())

def test_exchanges_of_a_step(results):
    "One for the flags of all callbacks; no buffers; with accumulated gradients these only with the last batch of a step, and the run is that of one process"
    steps = 20//TOTAL*EPOCHS
    want = state(fit(make_learner('dino', TOTAL, many=False, cbs=[GradientAccumulation(2*TOTAL)])))
    for g in [o['runs']['exchanges'] for o in results[2]]:
        assert g['plain']['flags']==[1]*steps and g['plain']['synced']==[True]*steps
        assert g['accumulated']['flags']==[1, 2]*(steps//2) and g['accumulated']['synced']==[False, True]*(steps//2)
        assert not g['plain']['buffers_sent']
        for k in want: assert_close(g['accumulated']['state'][k], want[k], rtol=1e-7, atol=1e-9, msg=lambda m: f'{k}: {m}')

# ---- a process that dies

def silent(rank, world, limit):
    "The last process stops without a word in its second step; the others' exchange ends after `limit` seconds"
    from datetime import timedelta
    from accelerate.utils import InitProcessGroupKwargs
    class Stop(Callback):
        def before_batch(self):
            if self.train_iter==1 and rank==world-1: os.kill(os.getpid(), signal.SIGSTOP)
    learn = make_learner('dino', TOTAL//world, cbs=[Stop()])
    began = time.time()
    try:
        with learn.distrib_ctx(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=limit))]): fit(learn)
    except RuntimeError as e: text = str(e)
    dist.destroy_process_group = lambda: None; dist.barrier = lambda: None      # nobody is left to say goodbye to
    return dict(text=text, seconds=time.time()-began)

def test_silent_process_is_noticed(tmp_path, record_property):
    "A machine that falls silent without closing its connections: the time limit of the exchange ends the wait"
    (out := tmp_path/'out').mkdir()
    ps = start(silent, 2, out, 3)
    ps[0].join(200)
    code = ps[0].exitcode
    for p in ps: p.kill()
    assert code==0
    got = torch.load(out/'0.pt', weights_only=True)
    record_property('seconds', got['seconds'])
    assert 2<got['seconds']<60 and ('imed out' in got['text'] or 'imeout' in got['text']), got

SCRIPT = """
import hashlib, os, signal, sys, time, torch
import torch.distributed as dist
from densessl.data.images import scene_dls
from densessl.training.distributed import ManyProcesses, share_batch
from densessl.methods.flsl import flsl_presets, flsl_recipe
from densessl.training.learner import flsl_learner
from dataclasses import replace
from fastai.callback.core import Callback
from fastai.torch_core import rank_distrib
import fastai.distributed

def say(*words): os.write(1, ('\\n'+' '.join(map(str, words))+'\\n').encode())   # in one piece: the progress bar of another process writes there too

class Die(Callback):
    "Process 1 is killed in the second step of the second fit"
    def before_batch(self):
        if self.learn.deadly and self.train_iter==1 and rank_distrib()==1: say('KILLED', time.time()); os.kill(os.getpid(), signal.SIGKILL)

def main():
    c = replace(flsl_presets['scenes'], img_size=32, local_size=16, hidden_dim=16, bottleneck_dim=8, n_prototypes=8)
    dls = scene_dls(16, flsl_recipe(c), bs=share_batch(8))
    learn = flsl_learner(dls, 'vit_tiny_patch16_224', c, model_kwargs=dict(patch_size=8, embed_dim=12, depth=1, num_heads=2), cbs=[Die()])
    if not hasattr(learn, 'many_processes'): learn.add_cb(ManyProcesses())
    learn.deadly = False
    with learn.distrib_ctx(cpu=True):
        learn.fit(1)
        say('WEIGHTS', hashlib.sha1(b''.join(p.detach().numpy().tobytes() for p in learn.model.parameters())).hexdigest(), rank_distrib(), dls.bs)
        learn.deadly = 'die' in sys.argv
        if learn.deadly: learn.fit(50)

if __name__=='__main__': main()
"""

def launch(cmd, tmp_path, *args, limit=400):
    "Run the script under a launcher"
    (script := tmp_path/'train.py').write_text(SCRIPT)
    env = {k: v for k,v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')} | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONWARNINGS='ignore')
    r = subprocess.run([sys.executable, '-m', *cmd, str(script), *args], env=env, capture_output=True, text=True, timeout=limit, cwd=tmp_path)
    return r, time.time()

def weights(*rs):
    said = sorted(o for r in rs for o in re.findall(r'WEIGHTS (\w+) (\d) (\d+)', r.stdout))
    assert len(said)==2, [(r.stdout, r.stderr) for r in rs]
    return said

def test_torchrun_trains_and_ends_when_one_is_killed(tmp_path, record_property):
    r, end = launch(['torch.distributed.run', '--standalone', '--nproc_per_node', '2'], tmp_path, 'die')
    (a, rank_a, bs), (b, rank_b, _) = weights(r)
    assert a==b and {rank_a, rank_b}=={'0', '1'} and bs=='4'
    assert r.stdout.count('epoch 1 of 1: loss')==1, f'process 0 alone prints: {r.stdout}'
    killed = float(re.search(r'KILLED ([\d.]+)', r.stdout)[1])
    record_property('seconds', end-killed)
    assert end-killed<60 and r.returncode and ('SIGKILL' in r.stderr or 'Signal 9' in r.stderr), r.stderr[-3000:]

def test_two_machines_train(tmp_path):
    "Two launchers that find each other, one process each, as on two machines"
    with socket.socket() as s: s.bind(('localhost', 0)); port = s.getsockname()[1]
    cmd = ['torch.distributed.run', '--nnodes', '2', '--nproc_per_node', '1', '--rdzv_backend', 'c10d', '--rdzv_endpoint', f'localhost:{port}', '--local_addr', 'localhost']
    for d in ('first', 'second'): (tmp_path/d).mkdir()
    with ThreadPoolExecutor(2) as pool: rs = [r for r,_ in pool.map(lambda d: launch(cmd, tmp_path/d), ('first', 'second'))]
    (a, rank_a, bs), (b, rank_b, _) = weights(*rs)
    assert a==b and {rank_a, rank_b}=={'0', '1'} and bs=='4' and not any(r.returncode for r in rs), rs

def test_accelerate_launch_trains(tmp_path):
    r, _ = launch(['accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no'], tmp_path)
    (a, *_), (b, *_) = weights(r)
    assert a==b and r.returncode==0
