"A run that is killed and resumed is the run that was never killed, to the last bit"
import csv, errno, gc, json, multiprocessing as mp, os, pty, random, resource, shutil, signal, subprocess, sys, threading, time, warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial

import numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.training import GradientAccumulation
from PIL import Image

from densessl.training import resume, runfile
from densessl.training.resume import RunStopped, SaveRun
from densessl.training.runfile import newest_checkpoint, read_checkpoint, read_header, run_checkpoints, writable_folder, write_checkpoint
from densessl.training.runstate import check_data, gather_state, numerics, restore_recorder, restore_state
from densessl.cli import pretrain
from densessl.training.arguments import absolute_paths, resumed
from densessl.ground.core import InputError
from densessl.data.images import image_dls, scene_dls
from densessl.training.learner import learner, methods
from processes import Script

pytestmark = [pytest.mark.skipif(sys.platform!='linux', reason='forks'), pytest.mark.usefixtures('one_thread')]
SMALL = dict(
    flsl = (dict(hidden_dim=32, bottleneck_dim=16, n_prototypes=16, drop_path_rate=.2, freeze_epochs=1, wd=(.04,.4)), 'vit_tiny_patch16_224', dict(patch_size=8, embed_dim=24, depth=2, num_heads=3)),
    clove = (dict(hidden_dim=32, out_dim=16, num_heads=2, n_local=2, optimizer='lars', lr=1.), 'test_resnet', dict(output_stride=8)),
    dino = (dict(hidden_dim=32, bottleneck_dim=16, n_prototypes=16, n_local=2), 'vit_tiny_patch16_224', dict(patch_size=8, embed_dim=24, depth=2, num_heads=3)))
EPOCHS, STEPS = 2, 6      # of an epoch


@pytest.fixture(autouse=True)
def interruptible():
    "SIGINT as a terminal has it: a shell starts background jobs with it ignored"
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, was)

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Thirty photographs, one of them no photograph; six are kept apart, the others are six batches"
    d = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    for i in range(30):
        (d/str(i%3)).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((40+i, 40), Image.Resampling.BICUBIC).save(d/str(i%3)/f'{i:02}.jpg')
    (d/'1'/'07.jpg').write_text('no photograph')
    return d


def make(method, photos=None, workers=0, accumulate=False, seed=0, bs=4):
    "A small learner; another seed gives other weights and other generators"
    m, (change, arch, kwargs) = methods[method], SMALL[method]
    config = replace(m.presets['scenes'], img_size=32, local_size=16, **change)
    random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
    dls = (scene_dls(4*STEPS, m.recipe(config), bs=bs, seed=0, num_workers=workers) if photos is None else
           image_dls(photos, m.recipe(config), bs=4, seed=0, num_workers=workers, valid_pct=.21))
    return learner(dls, arch, m, config, model_kwargs=kwargs, monitor_every=2, cbs=[GradientAccumulation(12)] if accumulate else [])


def with_fastais_bar(learn):
    "The bar of fastai in place of our own"
    learn.remove_cb(learn.progress)
    learn.add_cb(ProgressCallback())
    return learn


def fit(learn, *cbs):
    "Fit without a word; the code the fit leaves with"
    with learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: learn.fit(EPOCHS, cbs=list(cbs))
        except RunStopped as e: return e.code
    return 0


def everything(learn):
    "All that a run leaves: tensors, and the rest as text"
    r, opt = learn.recorder, learn.opt.state_dict()
    bad = learn.dls.bad_files
    return (dict(**learn.model.state_dict(), **{f'optimizer.{i}.{k}': torch.as_tensor(v) for i,s in opt['state'].items() for k,v in s.items()}, losses=torch.stack([*r.losses]), draws=torch.rand(4)),
            {k: repr(v) for k,v in dict(groups=opt['param_groups'], lrs=r.lrs, iters=list(r.iters), values=[list(v) for v in r.values], schedules=learn.schedules.history, monitor=learn.collapse_monitor.history,
                                        order=learn.dls.train.rng.getstate(), python=random.getstate(), numpy=np.random.get_state(), pct=learn.pct_train, bad=list(bad), seen=getattr(bad, 'seen', 0)).items()})


def assert_same(got, want):
    assert got[0].keys()==want[0].keys()
    names = [k for k in want[0] if not torch.equal(got[0][k], want[0][k])] + [k for k in want[1] if got[1][k]!=want[1][k]]
    assert not names, names[:10]


class At(Callback):
    "Do something when so many steps are done"
    run_valid = False
    def __init__(self, step, f): self.at, self.f = step, f
    def after_batch(self):
        if self.train_iter==self.at: self.f()


class Crash(Exception): pass
def crash(): raise Crash('a crash')
def term(): signal.raise_signal(signal.SIGTERM)


STRAIGHT = {}
def straight(method, photos, **kwargs):
    "What the run without a stop leaves"
    key = (method, photos, *kwargs.items())
    if key not in STRAIGHT:
        learn = make(method, photos, **kwargs)
        fit(learn)
        STRAIGHT[key] = everything(learn)
    return STRAIGHT[key]


@pytest.mark.parametrize('method,step', (*(('flsl', s) for s in (2, STEPS-1, STEPS, STEPS+1, 2*STEPS)),   # step 2 is the middle of an accumulation
                                         ('clove', STEPS-1), ('dino', STEPS+1)))
def test_stop_and_resume(method, step, photos, tmp_path):
    "Told to stop inside an epoch, at its last batch and after the first of the next; with accumulation, a validation set, two workers before and none after"
    want = straight(method, photos, accumulate=True)
    assert fit(make(method, photos, workers=2, accumulate=True), SaveRun(tmp_path/'run'), At(step, term))==143
    path, header, state = newest_checkpoint(tmp_path/'run')
    assert header['epoch']*STEPS+header['batch']==step and bool(state['grads'])==(step%3!=0)
    learn = make(method, photos, accumulate=True, seed=1)
    assert fit(learn, SaveRun(tmp_path/'run', resume=True))==0
    assert_same(everything(learn), want)


@pytest.mark.parametrize('method', SMALL)
def test_crash_and_resume_twice(method, tmp_path):
    "An error in the middle of a step, two times; the checkpoints are older than the crash"
    want = straight(method, None)
    for step in (4, 8):
        with pytest.raises(Crash): fit(make(method, seed=step-4), SaveRun(tmp_path/'run', every=3, resume=step==8), At(step, crash))
    learn = make(method, workers=2, seed=1)
    fit(learn, SaveRun(tmp_path/'run', every=3, resume=True))
    assert_same(everything(learn), want)
    assert [p.name for p in run_checkpoints(tmp_path/'run')]==['step-00000012.run', 'step-00000009.run']


def test_the_same_learner_goes_on(tmp_path):
    "After Ctrl-C the learner at hand can go on, and an error leaves nothing behind that would disturb the next fit"
    learn, was = make('flsl'), [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    assert fit(learn, SaveRun(tmp_path/'run'), At(4, partial(signal.raise_signal, signal.SIGINT)))==130
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]==was
    with pytest.raises(Crash): fit(learn, SaveRun(tmp_path/'run', resume=True), At(5, crash))
    with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)       # no fit is running: not noted, obeyed
    fit(learn, SaveRun(tmp_path/'run', resume=True))
    assert_same(everything(learn), straight('flsl', None))
    assert len(learn.recorder.losses)==EPOCHS*STEPS and not {'_with_events', 'one_batch'} & vars(learn).keys()


def in_child(f, *args):
    "Start `f` in a process of its own, in a group of its own"
    def g():
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)
        f(*args)
    p = mp.get_context('fork').Process(target=g)
    p.start()
    return p


def train(method, photos, folder, workers, cbs=(), resume=False, every=1):
    sys.exit(fit(make(method, photos, workers=workers, accumulate=True, seed=os.getpid() if resume else 0), SaveRun(folder, every=every, resume=resume), *cbs))


def children(pid):
    "Processes of the group of `pid` that still run"
    alive = []
    for d in os.listdir('/proc'):
        if d.isdigit():
            try: stat = open(f'/proc/{d}/stat').read().rpartition(')')[2].split()
            except OSError: continue
            if int(stat[3])==pid and stat[0]!='Z': alive.append(int(d))
    return alive


def gone(pid, seconds=20):
    until = time.time()+seconds
    while children(pid) and time.time()<until: time.sleep(.1)
    return not children(pid)


@pytest.mark.parametrize('method,workers', (('flsl', 2), ('clove', 0)))
def test_kill_9(method, workers, photos, tmp_path):
    "Killed twice at random moments, then left to end"
    rng = random.Random(method)
    for i in range(2):
        n = len(run_checkpoints(tmp_path/'run'))
        p = in_child(train, method, photos, tmp_path/'run', workers, (), i>0)
        before = newest_step(tmp_path/'run')
        while p.is_alive() and newest_step(tmp_path/'run') in (None, before): time.sleep(.002)
        time.sleep(rng.random()*.15)
        os.kill(p.pid, signal.SIGKILL)
        p.join()
    assert gone(p.pid)                         # workers notice that their parent is gone
    learn = make(method, photos, accumulate=True, seed=3)
    fit(learn, SaveRun(tmp_path/'run', resume=True))
    assert_same(everything(learn), straight(method, photos, accumulate=True))
    assert not list((tmp_path/'run').glob('*.part'))


def test_workers_do_not_keep_the_folder(tmp_path):
    "A run that was killed may be resumed at once: its workers, which live on for seconds, hold no lock"
    read, write = os.pipe()
    run = os.fork()
    if not run:
        with runfile.one_process(tmp_path):
            worker = os.fork()
            if worker: os.write(write, str(worker).encode())
            time.sleep(60)
        os._exit(0)
    worker = int(os.read(read, 20))
    try:
        with pytest.raises(InputError, match='another process'):
            with runfile.one_process(tmp_path, patience=0): pass
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        with runfile.one_process(tmp_path, patience=0): pass
    finally: os.kill(worker, signal.SIGKILL)


def newest_step(folder): return next((p.name for p in run_checkpoints(folder)), None)


@pytest.mark.parametrize('where', ('write', 'fsync', 'replace', 'unlink'))
def test_kill_9_inside_a_write(where, photos, tmp_path):
    "The process dies in the middle of a checkpoint: in its bytes, before they are on the disk, before the rename, before the old one is removed"
    def dying(*args):
        def die(real, n):
            def f(*a, **k):
                n[0] -= 1
                if not n[0]: os.kill(os.getpid(), signal.SIGKILL)
                return real(*a, **k)
            return f
        if where=='write': runfile._Hashed.write = die(runfile._Hashed.write, [900])
        elif where=='unlink': runfile.Path.unlink = die(runfile.Path.unlink, [4])     # one after each write, and that of the old one
        else: setattr(os, where, die(getattr(os, where), [9]))
        train(*args)
    p = in_child(dying, 'flsl', photos, tmp_path/'run', 0)
    p.join()
    assert p.exitcode==-signal.SIGKILL
    names = sorted(q.name for q in (tmp_path/'run').iterdir())
    assert any(n.endswith('.part') for n in names)==(where in ('write', 'fsync', 'replace'))
    for q in run_checkpoints(tmp_path/'run'): read_checkpoint(q)             # whole, every one
    learn = make('flsl', photos, accumulate=True, seed=3)
    fit(learn, SaveRun(tmp_path/'run', resume=True))
    assert_same(everything(learn), straight('flsl', photos, accumulate=True))


@pytest.mark.parametrize('slow', (0, 1))
def test_signal_to_the_whole_group(slow, photos, tmp_path):
    "A cluster tells all processes of a job, workers too, even those that are about to start: the state is saved, the exit code says why, and nobody is left"
    def unprepared(*args):
        real = resume._shielded
        def late(wif, parent): time.sleep(slow); real(wif, parent)
        resume._shielded = late
        train(*args)
    p = in_child(unprepared, 'flsl', photos, tmp_path/'run', 2, (), False, 10**6)
    while newest_step(tmp_path/'run') is None: time.sleep(.002)
    while len(children(p.pid))<3: time.sleep(.002)
    os.killpg(p.pid, signal.SIGTERM)
    p.join()
    assert p.exitcode==128+signal.SIGTERM
    assert gone(p.pid)
    header = read_header(run_checkpoints(tmp_path/'run')[0])
    assert header['step']>0
    learn = make('flsl', photos, accumulate=True, seed=3)
    fit(learn, SaveRun(tmp_path/'run', resume=True))
    assert_same(everything(learn), straight('flsl', photos, accumulate=True))


def test_second_signal_interrupts_at_once(photos, tmp_path):
    "A step that never ends cannot be finished"
    def never(): time.sleep(60)
    p = in_child(train, 'flsl', photos, tmp_path/'run', 0, [At(2, never)], False, 10**6)
    while newest_step(tmp_path/'run') is None: time.sleep(.01)
    time.sleep(1)
    os.kill(p.pid, signal.SIGTERM)
    time.sleep(.5)
    assert p.is_alive()
    os.kill(p.pid, signal.SIGTERM)
    p.join(20)
    assert p.exitcode==-signal.SIGTERM


def test_nothing_is_left_behind(photos, tmp_path):
    "No file handles, no processes, no attributes"
    learn = make('flsl', photos, workers=2)
    def handles():
        gc.collect()
        return sorted(os.readlink(f'/proc/self/fd/{d}') for d in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{d}'))
    fit(learn, SaveRun(tmp_path/'run', every=2), At(3, term))
    before = handles()
    for step in (5, 8): fit(learn, SaveRun(tmp_path/'run', every=2, resume=True), At(step, term))
    after = handles()
    assert len(after)<=len(before), (before, after)
    assert not mp.active_children() and signal.pthread_sigmask(signal.SIG_BLOCK, [])==set()
    assert not {'get_idxs', 'sample'} & vars(learn.dls.train).keys() and getattr(learn.dls.train.wif, 'func', None) is None


def test_the_folder_of_photographs_may_move_but_not_change(photos, tmp_path):
    fit(make('flsl', photos), SaveRun(tmp_path/'run'), At(3, term))
    moved = tmp_path/'elsewhere'
    shutil.copytree(photos, moved)
    learn = make('flsl', moved, seed=1)
    fit(learn, SaveRun(tmp_path/'run', resume=True))
    got, want = everything(learn), straight('flsl', photos)
    for e in (got, want): e[1].pop('bad', None)
    assert_same(got, want)
    shutil.copy(moved/'0'/'00.jpg', moved/'0'/'000.jpg')
    before = {p: p.read_bytes() for p in (tmp_path/'run').iterdir()}
    with pytest.raises(InputError, match='data.hash'): fit(make('flsl', moved), SaveRun(tmp_path/'run', resume=True))
    assert before=={p: p.read_bytes() for p in (tmp_path/'run').iterdir()}


def test_one_process_at_a_time(tmp_path, monkeypatch):
    "A run that is resumed while it runs is refused, and nothing in its folder changes; a process that was killed locks nothing"
    monkeypatch.setattr(runfile, 'one_process', partial(runfile.one_process, patience=0))
    def meanwhile():
        before = {p: p.read_bytes() for p in (tmp_path/'run').iterdir()}
        with pytest.raises(InputError, match='another process is writing to .*run'): fit(make('flsl'), SaveRun(tmp_path/'run', resume=True))
        assert before=={p: p.read_bytes() for p in (tmp_path/'run').iterdir()}
    learn = make('flsl')
    fit(learn, SaveRun(tmp_path/'run', every=1), At(3, meanwhile))
    assert learn.train_iter==EPOCHS*STEPS


def test_another_method_or_kind_of_run_is_refused(tmp_path):
    fit(make('flsl'), SaveRun(tmp_path/'run'), At(3, term))
    before = {p: p.read_bytes() for p in (tmp_path/'run').iterdir()}
    with pytest.raises(InputError, match='^.*is a run of FLSL, but this learner trains CLoVE'): fit(make('clove'), SaveRun(tmp_path/'run', resume=True))
    with pytest.raises(InputError, match=r'accumulation was \[\], now \[12\]'): fit(make('flsl', accumulate=True), SaveRun(tmp_path/'run', resume=True))
    with pytest.raises(InputError, match='holds checkpoints already'): fit(make('flsl'), SaveRun(tmp_path/'run'))
    assert before=={p: p.read_bytes() for p in (tmp_path/'run').iterdir()}
    for p in run_checkpoints(tmp_path/'run'): p.write_bytes(b'\0'*100)
    with pytest.raises(InputError, match='no checkpoint that can be read'): fit(make('flsl'), SaveRun(tmp_path/'run', resume=True))
    assert all(p.read_bytes()==b'\0'*100 for p in run_checkpoints(tmp_path/'run'))


def test_a_folder_that_cannot_be_written_is_noticed_at_once(tmp_path, monkeypatch):
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    learn = make('flsl')
    with pytest.raises(InputError, match='No space left'): fit(learn, SaveRun(tmp_path/'run'))
    assert not list((tmp_path/'run').iterdir()) and learn.train_iter==0


def test_gradient_scaler_and_recorder_survive(tmp_path):
    "fastai has a scaler on a GPU only; one of the CPU stands in"
    learn = make('flsl')
    learn.create_opt()
    learn('before_fit')
    learn.scaler = torch.amp.GradScaler('cpu', init_scale=64., growth_interval=2)
    learn.scaler.scale(torch.ones(()))
    learn.scaler._growth_tracker.fill_(1)
    write_checkpoint(tmp_path/'a.run', {}, gather_state(learn))
    other = make('flsl', seed=1)
    other.create_opt()
    other('before_fit')
    other.scaler = torch.amp.GradScaler('cpu', init_scale=2.)
    restore_state(read_checkpoint(tmp_path/'a.run')[1], other)
    assert other.scaler.state_dict()==learn.scaler.state_dict() and other.scaler.get_scale()==64.


def test_the_format_of_a_checkpoint(tmp_path):
    "What a checkpoint of format 1 holds: another version of the code must write and find the same names, or count the format up"
    fit(make('flsl', accumulate=True), SaveRun(tmp_path/'run'), At(3, term))
    path, header, state = newest_checkpoint(tmp_path/'run')
    assert path.read_bytes().startswith(b'densessl-run {"format": 1, "version": ')
    assert header.keys()=={'format', 'version', 'method', 'epoch', 'epochs', 'batch', 'batches', 'step', 'processes', 'loader', 'settings', 'versions'}
    assert state.keys()=={'model', 'opt', 'loss_func', 'grads', 'scaler', 'callbacks', 'accumulated', 'recorder', 'step', 'pct', 'ranks', 'bad_files', 'rows', 'seconds'}
    assert state['ranks'][0].keys()=={'now', 'loaders', 'start'} and state['ranks'][0]['start'].keys()=={'loader', 'random'}
    assert state['ranks'][0]['now'].keys()=={'python', 'numpy', 'torch', 'cuda'}
    assert state['recorder'].keys()=={'lrs', 'losses', 'iters', 'values', 'smooth', 'metrics', 'seconds'}
    assert {k: v for k,v in header['settings'].items() if k in ('method', 'epochs', 'batch', 'shuffle', 'drop_last', 'accumulation', 'data.images')}==dict(
        method='FLSL', epochs=EPOCHS, batch=4, shuffle=True, drop_last=True, accumulation=[12], **{'data.images': 4*STEPS})


def test_file_names_of_any_bytes(tmp_path):
    "Names that are not UTF-8 are written and read as they are"
    name = os.fsdecode(b'caf\xe9\n.jpg')
    write_checkpoint(tmp_path/'a.run', {}, dict(names=[tmp_path/name], reasons={name: 'damaged'}))
    assert read_checkpoint(tmp_path/'a.run')[1]==dict(names=[str(tmp_path/name)], reasons={name: 'damaged'})


def many(rank, world, port, folder, out, step, resume, bs):
    "One process of several"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    from densessl.training.distributed import ManyProcesses
    import fastai.distributed
    learn = make('flsl', seed=int(resume), bs=bs)
    learn.add_cb(ManyProcesses())
    cbs = [SaveRun(folder, minutes=None, resume=resume)] if folder else []
    if step and rank==world-1: cbs.append(At(step, term))          # one process is told, all stop
    with learn.distrib_ctx(cpu=True) if world>1 else nullcontext(): code = fit(learn, *cbs)
    tensors, rest = everything(learn)
    torch.save((tensors, {k: rest[k] for k in ('order', 'schedules', 'python', 'pct', 'lrs')}), f'{out}-{rank}')
    sys.exit(code)


def together(world, tmp_path, folder=None, step=None, resume=False, name='out'):
    "Exit codes and results of several processes"
    with __import__('socket').socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    ps = [in_child(many, r, world, port, folder, tmp_path/name, step, resume, 4//world) for r in range(world)]
    for p in ps: p.join(120)
    return [p.exitcode for p in ps], [torch.load(tmp_path/f'{name}-{r}', weights_only=True) for r in range(world)]


@pytest.mark.skipif(__import__('importlib').util.find_spec('accelerate') is None, reason='needs accelerate')
def test_two_processes(tmp_path):
    "A signal to one process stops both; two go on exactly, one goes on with what is the same for any number"
    codes, want = together(2, tmp_path)
    assert codes==[0, 0]
    codes, _ = together(2, tmp_path, tmp_path/'run', step=8)
    assert codes==[143, 143]
    # told after the exchange of step 8, so all stop after the next one
    assert [p.name for p in run_checkpoints(tmp_path/'run')]==['step-00000009.run', 'step-00000000.run']
    shutil.copytree(tmp_path/'run', tmp_path/'copy')
    codes, got = together(2, tmp_path, tmp_path/'run', resume=True)
    assert codes==[0, 0]
    for a,b in zip(got, want): assert_same(a, b)
    codes, (alone,) = together(1, tmp_path, tmp_path/'copy', resume=True)
    assert codes==[0] and alone[1]['lrs']==want[0][1]['lrs']


def test_shards(photos, tmp_path):
    "Photographs in tar files: exact with any number of workers"
    from densessl.data.shards import shard_dls, write_shards
    write_shards(photos, tmp_path/'tars', per_shard=10)
    m, (change, arch, kwargs) = methods['flsl'], SMALL['flsl']
    config = replace(m.presets['scenes'], img_size=32, local_size=16, **change)
    def shards(workers=2, seed=0):
        torch.manual_seed(seed)
        dls = shard_dls(tmp_path/'tars', m.recipe(config), bs=4, seed=0, num_workers=workers, shuffle=8)
        return learner(dls, arch, m, config, model_kwargs=kwargs, monitor_every=2)
    learn = shards()
    fit(learn)
    want = everything(learn)[0]
    for k in ('run', 'copy'): assert fit(shards(), SaveRun(tmp_path/k), At(3, term))==143
    for folder,workers in (('run', 2), ('copy', 0)):
        learn = shards(workers, seed=1)
        fit(learn, SaveRun(tmp_path/folder, resume=True))
        got = everything(learn)[0]
        assert not [k for k in want if not torch.equal(got[k], want[k])]


def test_threads(tmp_path):
    "Two threads give the same bits as two threads, and another number is said aloud"
    torch.set_num_threads(2)
    learn = make('flsl')
    fit(learn)
    want = everything(learn)
    for k in ('run', 'copy'): assert fit(make('flsl'), SaveRun(tmp_path/k), At(STEPS+1, term))==143
    assert read_header(run_checkpoints(tmp_path/'run')[0])['versions']==numerics() | dict(threads=2)
    learn = make('flsl', seed=1)
    fit(learn, SaveRun(tmp_path/'run', resume=True))
    assert_same(everything(learn), want)
    torch.set_num_threads(1)
    learn = make('flsl', seed=1)
    with learn.no_logging(), pytest.warns(UserWarning, match='threads was 2, now 1.*last digits.*OMP_NUM_THREADS=2'):
        learn.fit(EPOCHS, cbs=SaveRun(tmp_path/'copy', resume=True))


class Bars(Callback):
    "Where the bars of fastai stand at the first batch"
    order = 2000
    def before_fit(self): self.seen = None
    def after_batch(self):
        if self.seen: return
        main, inner = self.progress.mbar.main_bar, self.progress.pbar
        self.seen = main.last_v, time.time()-main.start_t, inner.last_v, time.time()-inner.start_t


@pytest.mark.parametrize('step,epoch,batch', ((2, 0, 3), (STEPS, 1, 1), (STEPS+2, 1, 3)))
def test_bars_stand_where_the_run_stands(step, epoch, batch, tmp_path):
    "Epoch, batch and the time they took, so that the estimate of the rest counts all of it"
    fit(make('flsl'), SaveRun(tmp_path/'run'), At(step, term))
    path, header, state = newest_checkpoint(tmp_path/'run')
    assert 0<state['seconds']<60
    state['seconds'], state['recorder']['seconds'] = 1000., 100.
    write_checkpoint(path, header, state)
    bars, learn = Bars(), with_fastais_bar(make('flsl', seed=1))
    fit(learn, SaveRun(tmp_path/'run', resume=True), bars)
    assert bars.seen[0]==epoch and bars.seen[2]==batch
    assert 1000<bars.seen[1]<1060 and (100<bars.seen[3]<160 if step!=STEPS else bars.seen[3]<60)


def test_the_file_of_fastais_logger_loses_no_epoch(photos, tmp_path):
    def run(*cbs, seed=0):
        learn = with_fastais_bar(make('flsl', photos, seed=seed))
        learn.path = tmp_path
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: learn.fit(3, cbs=[CSVLogger(), *cbs])
            except RunStopped: pass
        return [row[:-1] for row in csv.reader(open(tmp_path/'history.csv'))]     # without the time
    want = run()
    for step in (STEPS+1, 2*STEPS, 2*STEPS+3): run(SaveRun(tmp_path/'run', resume=True), At(step, term), seed=step//(2*STEPS))
    assert run(SaveRun(tmp_path/'run', resume=True), seed=1)==want and len(want)==4


@contextmanager
def file_limit(size):
    "No file may be larger: what writing to a full disk is like"
    was, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, was[1]))
    try: yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
        signal.signal(signal.SIGXFSZ, heard)

@contextmanager
def small_disk(folder, size='2m'):
    "A file system of its own"
    folder.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', folder], capture_output=True).returncode: pytest.skip('may not mount')
    try: yield folder
    finally: subprocess.run(['umount', folder], check=True)


class Between(Callback):
    "Begin something at one step and end it at another"
    order, run_valid = 900, False
    def __init__(self, first, last, begin, end): self.at = {first: begin, last: end}
    def after_batch(self): self.at.get(self.train_iter, lambda: None)()


def test_full_disk_does_not_end_the_run(tmp_path):
    "A real write that fails in the middle of torch's: a warning for each, and the run is the run"
    want, learn, limit = straight('flsl', None), make('flsl'), file_limit(30_000)
    with learn.no_logging(), pytest.warns(UserWarning, match='step 4 could not be written .File too large.; step-00000003.run is whole'):
        learn.fit(EPOCHS, cbs=[SaveRun(tmp_path/'run', every=1), Between(4, 9, limit.__enter__, lambda: limit.__exit__(None, None, None))])
    assert_same(everything(learn), want)
    assert sorted(p.name for p in (tmp_path/'run').iterdir())==['step-00000011.run', 'step-00000012.run']
    with file_limit(30_000), pytest.raises(InputError, match='no checkpoint can be written.*File too large'): fit(make('flsl'), SaveRun(tmp_path/'new'))


def test_file_system_without_room(tmp_path):
    with small_disk(tmp_path/'disk') as disk:
        learn = make('flsl')
        fill = lambda: (disk/'other').write_bytes(bytes(os.statvfs(disk).f_bavail*os.statvfs(disk).f_frsize))
        with learn.no_logging(), pytest.warns(UserWarning, match='No space left on device'):
            learn.fit(EPOCHS, cbs=[SaveRun(disk/'run', every=1), Between(4, 9, fill, (disk/'other').unlink)])
        assert_same(everything(learn), straight('flsl', None))
        assert len(run_checkpoints(disk/'run'))==2


def test_folders_that_cannot_be_written_are_found_before_the_work(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError, match='file. is a file'): SaveRun(tmp_path/'file')
    with pytest.raises(InputError, match='file. is a file'): SaveRun(tmp_path/'file'/'a'/'b')
    if os.getuid():                                            # root may write anywhere but on what is read-only
        (tmp_path/'locked').mkdir(mode=0o500)
        with pytest.raises(InputError, match='cannot be written to'): SaveRun(tmp_path/'locked'/'run')
    else:
        with small_disk(tmp_path/'disk') as disk:
            subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
            with pytest.raises(InputError, match='cannot be written to'): SaveRun(disk/'run')
    assert writable_folder(tmp_path/'a'/'b')==tmp_path/'a'/'b' and not (tmp_path/'a').exists()


def test_files_have_the_mode_of_the_umask(tmp_path):
    from densessl.evaluation.scores import write_scores
    from densessl.methods.export import export_backbone
    was = os.umask(0o027)
    try:
        write_checkpoint(tmp_path/'a.run', {}, {})
        write_scores([], tmp_path/'a.json')
        export_backbone(make('clove').model, tmp_path/'a.safetensors')
    finally: os.umask(was)
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in tmp_path.iterdir()}==dict.fromkeys(('a.run', 'a.json', 'a.safetensors'), '0o640')


def test_scores_on_a_full_disk_do_not_end_the_run(photos, tmp_path):
    "The files of DenseScore cost a warning each; nothing half written stays"
    from densessl.training.score import DenseScore
    learn, limit, score = make('flsl', photos), file_limit(500), DenseScore(1, out=tmp_path/'out', verbose=False)
    with learn.no_logging(), pytest.warns(UserWarning, match='best.safetensors could not be written .File too large.'):
        learn.fit(EPOCHS, cbs=[score, Between(2, 2*STEPS+1, limit.__enter__, None)])
        limit.__exit__(None, None, None)
    assert len(score.history)==1+EPOCHS
    assert not [p.name for p in (tmp_path/'out').iterdir() if '.part' in p.name or p.name.startswith('.')]


def test_what_processes_share_is_where_the_network_is(monkeypatch):
    "nccl adds up tensors of a GPU only, but sums come back from a file, and fastai's loss before the first batch is a zero, both on the CPU; `meta` stands in"
    from types import SimpleNamespace as Stub
    from densessl.training.monitor import LossPart
    learn, devices = Stub(model=torch.nn.Linear(1, 1, device='meta'), loss=torch.zeros(()), train_iter=1), []
    cb = SaveRun('never')
    cb.learn, cb.last = learn, (0, time.monotonic())
    monkeypatch.setattr(resume, 'n_ranks', lambda: 2)
    monkeypatch.setattr(resume, 'ranks_where', lambda flags, device: devices.append(device.type) or ([], []))
    cb._save_or_stop(0, 1)
    part, other = LossPart('intra'), Stub()
    recorder = Stub(learn=learn, smooth_loss=other, metrics=[part])
    s = dict(lrs=torch.zeros(0), losses=torch.zeros(0), iters=[], values=[], seconds=0., smooth={}, metrics=[dict(total=torch.ones(()), count=1)])
    restore_recorder(recorder, s)
    assert devices==['meta'] and part.total.device.type=='meta'


def test_photographs_that_moved(photos, tmp_path):
    "Paths hold from any working directory; another list of files and a place that is gone are refused in a sentence"
    here = os.getcwd()
    os.chdir(photos.parent)
    try: old = absolute_paths(dict(folder=photos.name, labelled=None, baseline='resnet50', out=tmp_path, bs=4))
    finally: os.chdir(here)
    assert old==dict(folder=str(photos), labelled=None, baseline='resnet50', out=str(tmp_path), bs=4)
    out = tmp_path/'run'
    fit(make('flsl', photos), SaveRun(out/'checkpoints'), At(2, term))
    ds = make('flsl', photos).dls.train.dataset
    check_data(out/'checkpoints', ds)
    ds.paths = ds.paths[1:]
    with pytest.raises(InputError, match=r'other photographs \(\d+ then, \d+ now\)'): check_data(out/'checkpoints', ds)
    ds.paths = [*ds.paths, ds.paths[0].with_name('another.jpg')]
    with pytest.raises(InputError, match='as before, but with other names'): check_data(out/'checkpoints', ds)
    (out/'settings.json').write_text(json.dumps(dict(arguments=dict(folder=str(tmp_path/'gone'), labelled=None))))
    with pytest.raises(InputError, match="gone', .*densessl_pretrain NEW_PLACE --resume --out"): pretrain(out=str(out), resume=True)
    with pytest.raises(InputError, match="labelled was None, now '.*'; leave them out"): pretrain(str(photos), labelled=str(photos), out=str(out), resume=True)


# --- the command, as a user starts and stops it -------------------------------------------------------------------------------------------------------------

COMMAND = """import os, signal, sys, time
from densessl.training.teacher import TeacherEMA
from densessl.cli import densessl_pretrain
update = TeacherEMA.after_step
def after_step(self):
    update(self)
    time.sleep(.1)        # so that a signal hits the epoch that it is meant for
TeacherEMA.after_step = after_step
sys.exit(densessl_pretrain())
"""
RUN = ('--epochs 5 --bs 8 --workers 0 --preset scenes --img_size 32 --settings local_size=16,hidden_dim=32,bottleneck_dim=16,n_prototypes=16 --score_every 0 '
       '--arch vit_tiny_patch16_224 --model_kwargs patch_size=8,embed_dim=24,depth=2,num_heads=3').split()


class Process:
    "The command in a process, with a terminal or without; `says` is what it has printed"
    def __init__(self, home, args, threads, terminal, **env):
        (home/'command.py').write_text(COMMAND)
        env = os.environ | dict(PYTHONWARNINGS='ignore') | env
        self.ours, theirs = pty.openpty() if terminal else os.pipe()
        self.p = Script('command.py', args, home, env, threads, theirs if terminal else None, theirs, theirs)
        os.close(theirs)
        self.says, self.reader = '', threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        while True:
            try: part = os.read(self.ours, 4096)
            except OSError: part = b''            # a terminal whose other side is closed
            if not part: return os.close(self.ours)
            self.says += part.decode(errors='replace')

    def kill(self, signum, epoch, run):
        "Send a signal when so many epochs have been saved"
        def saved():
            epochs = [-1]
            for path in run_checkpoints(run/'checkpoints'):
                with suppress(FileNotFoundError): epochs.append(read_header(path)['epoch'])   # the run removes old ones
            return max(epochs)
        while self.p.poll() is None and saved()<epoch: time.sleep(.02)
        self.p.send_signal(signum)
        return self.end()

    def end(self):
        code = self.p.wait(200)
        self.reader.join(10)
        return code


def few_photos(folder):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(24): Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((40+i, 40), Image.Resampling.BICUBIC).save(folder/f'{i:02}.jpg')


def small_run(**changes):
    "Arguments of the command for a run of a few steps"
    small = dict(zip((o.removeprefix('--') for o in RUN[::2]), RUN[1::2]))
    return small | dict(epochs=1, bs=8, workers=0, img_size=32, score_every=0) | changes


@pytest.mark.parametrize('where', ('write', 'scoring', 'after', 'report'))
def test_interrupted_outside_the_steps(where, photos, tmp_path, monkeypatch, capsys):
    "In the first write of a checkpoint, while the start is scored, when the epoch is over, and while the report is written: one line that resumes the run"
    from densessl import cli
    from densessl.ground import commands
    from densessl.training import score
    places = dict(write=(runfile._Hashed, 'write'), scoring=(score.DenseScore, '_score_start'), after=(SaveRun, 'after_epoch'), report=(cli, 'run_report'))
    owner, name = places[where]
    real, run = getattr(owner, name), tmp_path/'run'
    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(owner, name, interrupted)
        with pytest.raises(SystemExit) as e: commands.densessl_pretrain(str(photos), out=str(run), **small_run())
    said = ''.join(capsys.readouterr())
    assert e.value.code==130 and said.count(f'To resume: densessl_pretrain --resume --out {run}\n')==1, said
    if where!='report': return
    commands.densessl_pretrain(resume=True, out=str(run))
    assert (run/'report.html').exists()


def test_the_report_is_not_written(photos, tmp_path, monkeypatch, capsys):
    "On a full disk the training is not lost: one sentence, the checkpoints stay, and the run can be resumed; started in Python, it is resumed in Python"
    from densessl import cli
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device', str(tmp_path/'run'/'report.html'))
    with monkeypatch.context() as m:
        m.setattr(cli, 'run_report', full)
        with pytest.raises(InputError, match="report.html' could not be written .No space left on device., but .*make room, then pretrain.out='.*run', resume=True"):
            pretrain(str(photos), out=str(tmp_path/'run'), **small_run())
    run = tmp_path/'run'
    assert run_checkpoints(run/'checkpoints')
    for name in ('start.safetensors', 'scores_by_epoch.json'): (run/name).unlink()    # that the report would read
    monkeypatch.setenv('HOME', str(tmp_path))
    pretrain(out='~/run', resume=True)
    assert (run/'report.html').exists() and not (run/'checkpoints').exists()
    assert 'start.safetensors is gone, so the pictures show the trained backbone alone' in capsys.readouterr().out

    def stopped(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:                           # before the first checkpoint of a run that overwrites this one
        m.setattr(cli, 'train', stopped)
        with pytest.raises(KeyboardInterrupt, match='To resume: pretrain'):
            pretrain(str(photos), out=str(run), overwrite=True, **small_run(seed=1))
    assert (run/'backbone.safetensors').exists() and not (run/'report.html').exists()
    assert resumed(dict(out='~/run'))['out']==str(run)     # and not: it is complete


@pytest.mark.parametrize('threads,terminal,plan', (
    (1, False, ((signal.SIGINT, 0), (signal.SIGTERM, 2), (signal.SIGKILL, 4))),
    (2, True, ((signal.SIGKILL, 0), (signal.SIGINT, 2), (signal.SIGTERM, 4)))))
def test_the_command_is_killed_and_resumed(threads, terminal, plan, tmp_path):
    "In the first, a middle and the last epoch, with other numbers of workers after each, from another working directory, and with photographs that have moved"
    home, here, out = tmp_path/'home', tmp_path/'here', tmp_path/'home'/'my run'
    for d in (home, here): d.mkdir()
    few_photos(home/'few')
    def start(*args, where=home): return Process(where, args, threads, terminal)
    whole = start('few', *RUN, '--out', 'whole')
    assert whole.end()==0, whole.says
    p = start('few', *RUN, '--save_minutes', '0.0001', '--out', 'my run')
    for i,(signum, epoch) in enumerate(plan):
        code = p.kill(signum, epoch, out)
        assert code==(-9 if signum==signal.SIGKILL else 128+signum) and 'Traceback' not in p.says, p.says
        assert read_header(run_checkpoints(out/'checkpoints')[0])['epoch']==epoch
        if signum!=signal.SIGKILL: assert f"To resume: densessl_pretrain --resume --out '{'my run' if i==0 else out}'" in p.says, p.says
        if i==1: (home/'few').rename(here/'moved')
        p = start('--resume', '--workers', str((2, 1, 0)[i]), '--out', str(out), *(['moved'] if i==1 else []), where=here)
    assert p.end()==0 and 'Traceback' not in p.says, p.says
    for name in ('backbone.safetensors', 'best.safetensors', 'history.csv', 'scores.json', 'scores_by_epoch.json'): assert (out/name).read_bytes()==(home/'whole'/name).read_bytes(), name
    assert not (out/'checkpoints').exists()
