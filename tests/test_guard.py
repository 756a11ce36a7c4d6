"A number that is no number never reaches the weights, whatever the method; too little memory is told in one sentence"
import math, pickle, warnings
from dataclasses import replace

import pytest, torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.training import GradientAccumulation
from torch.testing import assert_close

from densessl.training.guard import OutOfMemory, StopIfNotFinite
from densessl.methods.clove import clove_presets, clove_recipe
from densessl.ground.core import InputError
from densessl.data.images import scene_dls
from densessl.methods.dino import dino_presets, dino_recipe
from densessl.methods.flsl import flsl_presets, flsl_recipe
from densessl.training.learner import clove_learner, dino_learner, flsl_learner
from densessl.training.resume import SaveRun
from densessl.training.runfile import read_checkpoint, run_checkpoints
from pretend_gpu import pretend_gpu

VIT, CNN = dict(patch_size=8, embed_dim=12, depth=2, num_heads=2), dict(output_stride=8)
METHODS = dict(
    flsl = (flsl_learner, flsl_recipe, replace(flsl_presets['scenes'], img_size=32, local_size=16, hidden_dim=16, bottleneck_dim=8, n_prototypes=8), 'vit_tiny_patch16_224', VIT),
    clove = (clove_learner, clove_recipe, replace(clove_presets['scenes'], img_size=32, local_size=16, n_local=2, hidden_dim=16, out_dim=8, num_heads=2, k=4), 'test_resnet', CNN),
    dino = (dino_learner, dino_recipe, replace(dino_presets['scenes'], img_size=32, local_size=16, n_local=2, hidden_dim=16, bottleneck_dim=8, n_prototypes=16), 'vit_tiny_patch16_224', VIT))

def make(name, *cbs, skip=0, bf16=False, device='cpu', late=False):
    learner, recipe, config, arch, kwargs = METHODS[name]
    torch.manual_seed(0)
    learn = learner(scene_dls(32, recipe(config), bs=4, seed=1, device=device), arch, config, model_kwargs=kwargs, cbs=list(cbs), bf16=bf16)
    for cb in [o for o in learn.cbs if type(o).__name__ in ('StopIfNotFinite', 'OutOfMemory')]: learn.remove_cb(cb)
    return learn.add_cbs([StopIfNotFinite(skip, late), OutOfMemory()])

def fit(learn, n=1):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(n)
    return learn

def state(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}

class Spoil(Callback):
    "Spoil the fourth step: its images, the output of one module, or a gradient"
    order,run_valid = -5,False
    def __init__(self, what): self.what = what
    def before_batch(self):
        "Each step has random numbers of its own, so that one left out changes no other"
        torch.manual_seed(self.train_iter)
        if self.train_iter!=3: return
        if self.what=='images': next(iter(self.learn.xb[0].values())).images[0,0] = math.nan
        if self.what=='module':
            m = self.learn.model.student.encoder.net
            m = m.blocks[1].mlp.fc1 if hasattr(m, 'blocks') else m.layer2[0].conv1
            self.hook = m.register_forward_hook(lambda m, x, y: y*math.inf)
    def before_step(self):
        if self.what=='gradient' and self.train_iter==3: self.learn.model.student.encoder.net.get_parameter('norm.weight' if hasattr(self.learn.model.student.encoder.net, 'blocks') else 'bn1.weight').grad[1] = math.nan
    def after_batch(self):
        if hasattr(self, 'hook'): self.hook.remove(); del self.hook
        torch.manual_seed(100+self.train_iter)       # the next views are made now

class Never(Spoil):
    "The fourth batch is never shown"
    def before_batch(self):
        super().before_batch()
        if self.train_iter==3: self.learn.yb = (); raise CancelBatchException()

class Keep(Callback):
    "The state after three steps"
    order = 1
    def before_batch(self):
        if self.train_iter==3: self.kept = state(self.learn)

@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('what', ['images', 'module', 'gradient'])
def test_stops_and_names(name, what, device='cpu'):
    learn = make(name, Spoil(what), keep := Keep(), device=device)
    with pytest.raises(InputError) as e: fit(learn)
    text, names = str(e.value), [n for n,_ in learn.model.named_parameters()]
    assert 'at step 3 of epoch 1' in text and ('lower the learning rate (now ' in text or what=='images') and '\n' not in text, text
    assert dict(images='the views already hold', module='is student.encoder.net.blocks.1.mlp.fc1 (Linear)' if name!='clove' else 'is student.encoder.net.layer2.0.conv1 (Conv2d)',
                gradient='first in the parameter student.encoder.net.' + ('norm.weight' if name!='clove' else 'bn1.weight'))[what] in text, text
    assert what=='gradient' or 'from its term' in text, text
    now = learn.model.state_dict()
    for n in names: assert torch.equal(now[n], keep.kept[n]), f'{n} has moved'

@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('what', ['images', 'module', 'gradient'])
def test_a_step_left_out_leaves_no_trace(name, what, device='cpu'):
    "As if the batch had never been there: weights, statistics, center, teacher"
    learn, want = fit(make(name, Spoil(what), skip=1, device=device)), state(fit(make(name, Never(what), device=device)))
    assert [(o['step'], o['what']) for o in learn.stop_if_not_finite.skipped]==[(3, 'gradient' if what=='gradient' else 'loss')]
    for k,v in state(learn).items(): assert_close(v, want[k], rtol=0, atol=0, msg=lambda m: f'{k}: {m}')
    assert all(math.isfinite(float(o)) for o in learn.recorder.losses)

@pytest.mark.skipif(torch.cuda.is_available(), reason='pretends to have a GPU')
@pytest.mark.parametrize('name', ['clove', 'dino'])
@pytest.mark.parametrize('what', ['images', 'module', 'gradient'])
def test_the_same_on_a_gpu(name, what):
    "There the loss is looked at together with the gradients, after the backward pass"
    with pretend_gpu():
        test_stops_and_names(name, what, 'cuda')
        test_a_step_left_out_leaves_no_trace(name, what, 'cuda')

class Ill(Spoil):
    "What spoils a step spoils the next ones, too; counts forward passes"
    def before_batch(self):
        self.at = self.train_iter
        super().before_batch()
    def after_pred(self): self.forward = self.at
    def after_batch(self): pass

def late(name, what, *cbs):
    "A learner on a GPU whose fourth step is bad, and which looks at a step when the next one begins"
    return make(name, ill := Ill(what), keep := Keep(), *cbs, device='cuda', late=True), ill, keep

def is_kept(learn, keep): return [n for n,p in learn.model.named_parameters() if not torch.equal(p, keep.kept[n])]==[]

on_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='pretends to have a GPU')

@on_no_gpu
@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('what', ['images', 'module', 'gradient'])
def test_a_step_later_it_is_still_named(name, what):
    "The weights are those before the bad step, whose number, module or parameter is told; no other step was begun"
    with pretend_gpu() as gpu:
        learn, ill, keep = late(name, what)
        with gpu.counted() as seen, pytest.raises(InputError) as e: fit(learn)
        text = str(e.value)
        assert 'at step 3 of epoch 1' in text and ill.forward==3, text
        where = dict(images='the views already hold', gradient='first in the parameter student.encoder.net.' + ('norm.weight' if name!='clove' else 'bn1.weight'),
                     module='is student.encoder.net.' + ('blocks.1.mlp.fc1 (Linear)' if name!='clove' else 'layer2.0.conv1 (Conv2d)'))
        assert where[what] in text, text
        assert is_kept(learn, keep) and not learn.opt.opt.state and learn.stop_if_not_finite.unread is None
        assert seen.events=={'guard.read': 4} and 'ranks.ranks_where' not in seen.waits
        if what!='gradient' or name!='dino': return
        learn.remove_cb(ill)
        learn.opt.zero_grad()
        assert all(math.isfinite(float(o)) for o in fit(learn).recorder.losses)           # the same learner again

class At(Callback):
    "Does something after the fourth step, which was bad; a save is due, the epoch ends, or somebody interrupts"
    order,run_valid = 100,False
    def __init__(self, f): self.f = f
    def after_batch(self):
        if self.train_iter==4: self.f(self.learn)

def interrupt(learn): raise KeyboardInterrupt
def cancel(learn): raise CancelFitException
def broken(learn): raise ValueError('of a number that is none')

@on_no_gpu
@pytest.mark.parametrize('f', [interrupt, cancel, broken, lambda learn: learn.save('bad'), lambda learn: learn.validate(dl=learn.dls.train)],
                         ids=['interrupt', 'cancel', 'broken', 'save', 'validate'])
def test_no_bad_weights_are_left(f, tmp_path):
    with pretend_gpu():
        learn, _, keep = late('clove', 'gradient', At(f))
        learn.path = tmp_path
        with pytest.raises(InputError, match='at step 3 of epoch 1'): fit(learn)
        assert is_kept(learn, keep) and not [*tmp_path.rglob('*.pth')]

@on_no_gpu
def test_a_bad_step_is_not_saved(tmp_path):
    "The newest checkpoint is the one of the step before"
    with pretend_gpu():
        learn, _, keep = late('dino', 'module', SaveRun(tmp_path, every=1))
        with pytest.raises(InputError, match='at step 3 of epoch 1'): fit(learn)
        header, saved = read_checkpoint(run_checkpoints(tmp_path)[0])
        assert header['step']==3
        for n,_ in learn.model.named_parameters(): assert torch.equal(saved['model'][n], keep.kept[n].cpu())

@on_no_gpu
def test_a_bad_step_is_not_measured():
    "The monitor has the step looked at before it reads its outputs"
    measured = []
    with pretend_gpu():
        learn, _, keep = late('flsl', 'module')
        learn.collapse_monitor.every, learn.collapse_monitor.measure = 1, lambda learn: measured.append(learn.train_iter) or {}
        with pytest.raises(InputError, match='at step 3 of epoch 1'): fit(learn)
        assert is_kept(learn, keep) and measured==[1, 2, 3]

@on_no_gpu
def test_a_bad_last_step_ends_no_epoch():
    "Neither validation nor what comes at the end of an epoch sees its weights"
    class End(Callback):
        ended = False
        def after_epoch(self): self.ended = True
    with pretend_gpu():
        learn, _, keep = late('clove', 'gradient', End())
        learn.dls.train.n = 16
        learn.remove_cb(learn.collapse_monitor)        # it looks at the last step
        with pytest.raises(InputError, match='at step 3 of epoch 1'): fit(learn)
        assert is_kept(learn, keep) and not learn.end.ended

@on_no_gpu
def test_steps_looked_at_later_are_the_same_steps():
    with pretend_gpu(): at_once, later = ((state(o), torch.stack(o.recorder.losses)) for o in (fit(make('dino', device='cuda', late=late)) for late in (False, True)))
    for k,v in at_once[0].items(): assert torch.equal(v.inner, later[0][k].inner), k
    assert torch.equal(at_once[1], later[1]) and len(later[1])==8

@on_no_gpu
def test_who_looks_at_once():
    "On a CPU, where steps may be skipped, where gradients are accumulated, and while a learning rate is sought"
    class Look(Callback):
        def before_step(self):
            self.late = self.learn.stop_if_not_finite.reads_late
            raise CancelFitException
    def reads_late(*cbs, **kwargs): return fit(make('dino', look := Look(), *cbs, late=True, **kwargs)), look.late
    assert not reads_late()[1]
    with pretend_gpu():
        learn, late = reads_late(device='cuda')
        assert late
        class Finder(Callback): name = 'lr_finder'
        assert not fit(learn.add_cb(Finder())).look.late
        assert not reads_late(device='cuda', skip=1)[1] and not reads_late(GradientAccumulation(4), device='cuda')[1]

def test_bf16_is_named():
    with pytest.raises(InputError, match='or train in float32'): fit(make('flsl', Spoil('module'), bf16=True))
    assert not torch.is_autocast_enabled('cpu')

class Full(Callback):
    "An allocator that gives up in the backward pass"
    run_valid = False
    def before_backward(self): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')

@pytest.mark.parametrize('name', METHODS)
def test_out_of_memory_names_settings(name):
    config = METHODS[name][2]
    with pytest.raises(InputError) as e: fit(learn := make(name, Full()))
    for part in ('cpu is out of memory at step 0 of epoch 1', 'pass bf16=True', 'bs (now 4;', f'img_size (now {config.img_size})', f'n_local (now {config.n_local})'): assert part in str(e.value), str(e.value)
    assert e.value.__context__ is None, 'the old error would hold the tensors of the step'
    with pytest.raises(InputError) as e: fit(make(name, Full(), GradientAccumulation(8), bf16=True))
    assert 'accumulated to 8' in str(e.value) and 'bf16=True' not in str(e.value)
    learn.remove_cb(Full)
    assert len(fit(learn).recorder.losses)==8

@pytest.mark.parametrize('name', METHODS)
def test_one_callback_or_several(name):
    "As fastai's Learner takes them, and in their place among the others"
    learner, recipe, config, arch, kwargs = METHODS[name]
    dls = scene_dls(8, recipe(config), bs=4)
    for n,cbs in ((0, None), (0, ()), (1, Full()), (1, [Full()]), (1, (Full(),)), (2, (Full(), Keep()))):
        for bf16 in (False, True):
            learn = learner(dls, arch, config, model_kwargs=kwargs, cbs=cbs, bf16=bf16)
            assert [type(o) for o in learn.cbs if isinstance(o, (Full, Keep))]==[Full, Keep][:n]

class Complain(Callback):
    def before_batch(self): raise InputError('mean is 3: choose less')

def test_a_sentence_stays_a_sentence():
    "fastai names callback and event in every error; not in one for the user, whatever callback it comes from and wherever it is sent"
    with pytest.raises(InputError) as e: fit(make('clove', Complain()))
    assert str(e.value)=='mean is 3: choose less'==str(pickle.loads(pickle.dumps(e.value)))
