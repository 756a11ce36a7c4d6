"""fastai works as ever: what its `Learner`, callbacks and mixed precision do with the three methods, or the sentence that says what to use"""
import copy, math, pickle, sys, types, warnings
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
import fastai.callback.channelslast
from fastai.callback.core import Callback, CancelBatchException, FetchPredsCallback, GatherPredsCallback
from fastai.callback.data import CollectDataCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.learner import Metric
from fastai.metrics import Dice, accuracy
from fastai.optimizer import SGD, Optimizer
from fastai.vision.data import ImageDataLoaders
from fastcore.foundation import L
from fastcore.imports import noop
from PIL import Image
from torch.amp import GradScaler
from torch.testing import assert_close

import densessl.all as D
from densessl.training.progress import show_progress
from densessl.ground.core import InputError
from densessl.training.precision import AutocastBF16, autocast_depth

matplotlib.use('Agg')
METHODS = 'flsl', 'clove', 'dino'
TINY = dict(
    flsl=replace(D.flsl_presets['scenes'], img_size=32, local_size=16, hidden_dim=32, bottleneck_dim=16, n_prototypes=8),
    clove=replace(D.clove_presets['scenes'], img_size=32, local_size=16, n_local=2, hidden_dim=32, out_dim=16, num_heads=2),
    dino=replace(D.dino_presets['scenes'], img_size=32, local_size=16, n_local=2, hidden_dim=32, bottleneck_dim=16, n_prototypes=32))

@pytest.fixture(autouse=True)
def precision_as_it_was(one_thread):
    "After each test the global precision is as it should be"
    yield
    assert autocast_depth()==0 and not torch.is_autocast_enabled('cpu')

def learner(method='flsl', dls=None, **kwargs):
    "Twelve scenes in batches of four, a tiny network"
    torch.manual_seed(0)
    c = TINY[method]
    if dls is None: dls = D.scene_dls(12, getattr(D, f'{method}_recipe')(c), bs=4, canvas=40)
    arch = ('test_resnet', dict(output_stride=8)) if method=='clove' else ('vit_tiny_patch16_224', dict(patch_size=8, embed_dim=24, depth=2, num_heads=2))
    learn = getattr(D, f'{method}_learner')(dls, arch[0], c, model_kwargs=arch[1], **kwargs)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
    learn.logger = noop
    return learn

def photos(folder, n=12, **kwargs):
    "DataLoaders of a folder, with photographs kept apart"
    for i,x in enumerate(D.draw_scenes(n, 40, 0)[0]): Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder/f'{i}.png')
    return D.image_dls(folder, D.flsl_recipe(TINY['flsl']), bs=4, num_workers=0, seed=0, **kwargs)

def weights(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}
def losses(learn): return torch.stack(list(learn.recorder.losses))
def encoder(learn): return torch.cat([p.detach().flatten() for p in learn.model.student.encoder.parameters()])

def fit(learn, n=1, **kwargs):
    "The same draws for every learner"
    torch.manual_seed(1)
    learn.fit(n, **kwargs)
    return learn

class Kinds(Callback):
    "What the forward pass computes in, how often the teacher moved, the largest gradient the optimizer gets"
    run_valid, order = False, 40
    def before_fit(self):
        self.kinds, self.largest, self.moved = set(), 0., 0
        first = next(m for m in self.learn.model.student.encoder.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)))
        self.hook = first.register_forward_hook(lambda m, i, o: self.kinds.add(o.dtype))
        update = self.learn.model.update_teacher
        def count(momentum):
            self.moved += 1
            update(momentum)
        self.learn.model.update_teacher = count
    def before_step(self): self.largest = max([self.largest, *(p.grad.norm().item() for p in self.learn.model.parameters() if p.grad is not None)])
    def after_fit(self):
        self.hook.remove()
        del self.learn.model.update_teacher

class ScaledOnCPU(MixedPrecision):
    "fastai's fp16 as it is with CUDA: autocast and a loss scale, here on the CPU"
    kind, scale = torch.bfloat16, 2.**14
    def before_fit(self):
        self.autocast, self.learn.scaler, self.scales = torch.autocast('cpu', dtype=self.kind), GradScaler('cpu', init_scale=self.scale), L()

# ---------------------------------------------------------------- mixed precision
@pytest.mark.parametrize('method', METHODS)
def test_fastai_precision_trains_and_can_be_taken_back(method):
    plain, half, full = (learner(method) for _ in range(3))
    for f in (plain, half.to_bf16(), full.to_fp16()): fit(f)
    flag = fit(learner(method, bf16=True))
    assert torch.equal(losses(half), losses(flag)), 'to_bf16() and bf16=True are one thing'
    assert not torch.equal(losses(half), losses(plain))
    assert_close(losses(half), losses(plain), rtol=.05, atol=.05)
    assert torch.cuda.is_available() or torch.equal(losses(full), losses(plain))      # fastai's fp16 is for CUDA
    again = fit(learner(method).to_bf16().to_fp16().to_fp32())
    assert torch.equal(losses(again), losses(plain))
    seen = Kinds()
    half.fit(1, cbs=seen)
    assert seen.kinds=={torch.bfloat16}

@pytest.mark.parametrize('method', METHODS)
def test_the_loss_scale_of_fp16_changes_nothing(method):
    "Real outputs through fastai's `to_float`; gradients are unscaled, then looked at, then clipped, then used"
    class Plain(ScaledOnCPU):
        scale = 1.
    one, many, spy = learner(method, cbs=Plain()), learner(method, cbs=ScaledOnCPU()), Kinds()
    fit(one)
    fit(many, cbs=spy)
    assert spy.moved==3 and spy.kinds=={torch.bfloat16}
    for k,v in weights(one).items(): assert_close(v, many.model.state_dict()[k], rtol=1e-3, atol=1e-4)
    assert spy.largest<=1.01*getattr(TINY[method], 'clip', math.inf)

@pytest.mark.parametrize('method', METHODS)
def test_a_step_that_overflows_is_left_out(method):
    class Overflow(Callback):
        order, run_valid = 5, False
        def before_step(self):
            if self.iter==1: next(p for p in self.learn.model.parameters() if p.grad is not None).grad.fill_(math.inf)
    spy, learn = Kinds(), learner(method, cbs=ScaledOnCPU())
    learn.fit(1, cbs=[Overflow(), spy])
    assert spy.moved==2
    assert all(torch.isfinite(v).all() for v in weights(learn).values())

@pytest.mark.parametrize('precision', ['to_bf16', 'to_fp16', 'scaled'])
@pytest.mark.parametrize('error', [MemoryError('no more'), KeyboardInterrupt('Ctrl-C'), RuntimeError('other')], ids=['memory', 'key', 'other'])
def test_precision_ends_with_an_error(precision, error):
    learn = learner()
    if precision=='scaled': learn.add_cb(ScaledOnCPU())
    else: getattr(learn, precision)()
    forward, calls = learn.model.forward, []
    def broken(views):
        calls.append(1)
        if len(calls)==2: raise error
        return forward(views)
    learn.model.forward = broken
    with pytest.raises(InputError if isinstance(error, MemoryError) else type(error)): learn.fit(1)
    assert autocast_depth()==0 and not torch.is_autocast_enabled('cpu')
    assert all(m.fused_attn for m in learn.model.modules() if hasattr(m, 'fused_attn'))
    learn.to_fp32()
    if precision=='scaled': learn.remove_cbs(ScaledOnCPU)
    seen = Kinds()
    learn.fit(1, cbs=seen)
    assert seen.kinds=={torch.float32} and len(losses(learn))==3

def test_precision_ends_with_a_canceled_batch():
    def cancel(cb): raise CancelBatchException
    for mixed in (AutocastBF16(), ScaledOnCPU()):
        learner(cbs=mixed).fit(1, cbs=Callback(after_pred=cancel))
        assert autocast_depth()==0 and not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('left_out', [(0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss'])
def test_batches_that_are_canceled(event, left_out):
    "Before there is a prediction or a loss, too; what the monitor sees is of whole batches alone"
    class Leave(Callback):
        order = -10
        def __call__(self, name):
            if name==event and self.training and self.iter in left_out: raise CancelBatchException
    learn, spy = learner(monitor_every=1), Kinds()
    for _ in range(2): learn.fit(1, cbs=[Leave(), spy])
    left = [i+1 for i in range(3) if i not in left_out]
    assert [h['step'] for h in learn.collapse_monitor.history]==2*left and spy.moved==len(left) and len(learn.recorder.values)==1

def test_channels_last(): learner('clove').to_channelslast().fit(1)

# ---------------------------------------------------------------- the finder
@pytest.mark.parametrize('method', METHODS)
def test_lr_find_leaves_no_trace(method, tmp_path):
    learn = learner(method, monitor_every=1, path=tmp_path, cbs=[D.DenseScore(n_photos=2, verbose=False), D.SaveRun(tmp_path/'run', minutes=None, every=1)])
    learn.collapse_monitor.diagnose = lambda m: ['All is lost.']
    learn.create_opt()
    before = weights(learn), [dict(h) for h in learn.opt.hypers], getattr(learn.loss_func, 'temp_t', None)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='epoch')
        found = learn.lr_find(num_it=7, show_plot=False)
    assert found.valley>0
    for k,v in weights(learn).items(): assert torch.equal(v, before[0][k]), k
    assert [dict(h) for h in learn.opt.hypers]==before[1] and getattr(learn.loss_func, 'temp_t', None)==before[2]
    assert not learn.opt.state_dict()['state']
    assert not learn.collapse_monitor.history and not learn.schedules.history and not learn.dense_score.history and not (tmp_path/'run').exists()
    with pytest.warns(UserWarning, match='All is lost'): learn.fit(1)
    assert len(learn.collapse_monitor.history)==3 and len(learn.schedules.history)==3

def test_lr_find_ends_where_gradients_break_down():
    class Break(Callback):
        order = -5
        def before_step(self):
            if self.train_iter==6: next(p for p in self.learn.model.parameters() if p.grad is not None).grad.fill_(math.nan)
    learn = learner(cbs=Break())
    before = weights(learn)
    learn.lr_find(num_it=20, show_plot=False, suggest_funcs=None)
    for k,v in weights(learn).items(): assert torch.equal(v, before[k]), k

# ---------------------------------------------------------------- what the optimizer gets
class Hypers(Callback):
    "The optimizer's values at each step"
    order, run_valid = 100, False
    def before_fit(self): self.seen = []
    def before_step(self): self.seen.append([dict(h) for h in self.opt.hypers])
    def of(self, k, group=-1): return [s[group][k] for s in self.seen]

@pytest.mark.parametrize('method', METHODS)
def test_weight_decay_given_to_fit(method):
    spy = Hypers()
    learn = learner(method, cbs=spy)
    learn.fit(2, wd=.3)
    assert spy.of('wd')==[.3]*6 and spy.of('wd', 0)==[0.]*6
    assert [h['wd'] for h in learn.schedules.history]==[.3]*6
    learn.fit_one_cycle(1, wd=.2)
    assert spy.of('wd')==[.2]*3
    learn.fit(1)
    assert spy.of('wd')==[learn.schedules.opt_values['wd'](i/3) for i in range(3)]        # the schedule again
    learn = learner(method, cbs=spy, wd=.1)
    learn.fit(1)
    assert spy.of('wd')==[.1]*3
    for wrong in (-1, math.nan, 'much', slice(0, 1), [.1, .2]):
        with pytest.raises(InputError, match='wd must be one number'): learn.fit(1, wd=wrong)

def test_a_run_is_resumed_with_its_weight_decay():
    a, b = learner().schedules, learner().schedules
    for begun,now in ((.3, None), (None, .3), (.3, .1)):
        a.fixed_wd, b.fixed_wd = begun, now
        with pytest.raises(InputError, match=f'begun with wd={begun}, now wd={now}'): b.load_state_dict(a.state_dict())
    b.fixed_wd = .3
    b.load_state_dict(a.state_dict())

def test_learning_rates():
    spy = Hypers()
    learn = learner(cbs=spy)
    learn.fit(2, lr=.01)
    factor = learn.schedules.lr
    assert spy.of('lr')==[.01*factor(i/6) for i in range(6)] and learn.recorder.lrs==spy.of('lr')
    learn.fit_one_cycle(2, .02)
    assert max(spy.of('lr'))==pytest.approx(.02, rel=.05) and spy.of('lr')[0]==pytest.approx(.02/25)
    assert len(set(spy.of('mom')))>3
    assert [h['lr'] for h in learn.schedules.history[-6:]]==pytest.approx(spy.of('lr'))    # what was set, not what was not
    learn.fit_flat_cos(1, .03)
    assert spy.of('lr')[0]==pytest.approx(.03)
    learn.fit(1, cbs=ParamScheduler({'lr': SchedCos(1e-3, 1e-4)}))
    assert spy.of('lr')[0]==pytest.approx(1e-3)
    for f in (lambda: learn.fit(1, lr=slice(1e-5, 1e-3)), lambda: learn.fit_one_cycle(1, slice(1e-3)), lambda: learn.fit_flat_cos(1, slice(1e-5, 1e-3))):
        with pytest.raises(InputError, match='lr must be one number'): f()

@pytest.mark.parametrize('wrong', [-.1, math.nan, math.inf, '1e-3', [1e-3, 1e-4]], ids=str)
def test_learning_rates_that_are_none(wrong):
    "None is that of the method; nothing was trained when the sentence comes"
    learn = learner()
    before = weights(learn)
    with pytest.raises(InputError, match='lr must be one number'): learn.fit(1, lr=wrong)
    if not isinstance(wrong, (str, list)):
        with pytest.raises(InputError, match='lr must be 0 or more'): learn.fit_one_cycle(1, wrong)
        learn = learner(lr=wrong)
        with pytest.raises(InputError, match='lr must be one number'): learn.fit(1)
    for k,v in weights(learn).items(): assert torch.equal(v, before[k])

@pytest.mark.parametrize('number', [torch.tensor(.01), np.float32(.01), np.float64(.01)], ids=lambda v: type(v).__name__)
def test_numbers_of_other_libraries(number):
    spy = Hypers()
    learner(cbs=spy).fit(1, lr=number, wd=number)
    assert spy.of('wd')==[pytest.approx(.01)]*3 and all(type(h) is float for h in spy.of('lr'))

@pytest.mark.parametrize('n', [-1, 1.5, '3', None])
def test_epochs_are_counted(n):
    learn = learner()
    with pytest.raises(InputError, match='number of epochs must be whole'): learn.fit(n)
    learn.fit(0)
    assert not len(learn.recorder.losses)

@pytest.mark.parametrize('method', METHODS)
def test_arguments_of_learner(method):
    "`lr`, `opt_func` and `metrics` as ever; what belongs to the method is refused"
    class Volume(Metric):
        "Of one's own, as fastai asks for it"
        def reset(self): self.seen = 0
        def accumulate(self, learn): self.seen += len(learn.pred)>0
        @property
        def value(self): return self.seen
    spy = Hypers()
    learn = learner(method, lr=.003, opt_func=SGD, metrics=Volume(), cbs=spy)
    learn.fit(2)
    assert max(spy.of('lr'))==pytest.approx(.003, rel=.05) and isinstance(learn.opt, Optimizer)
    assert learn.recorder.metric_names[-2]=='volume' and [v[-1] for v in learn.recorder.values]==[3, 3]
    for k,v in (('loss_func', torch.nn.MSELoss()), ('splitter', noop)):
        with pytest.raises(InputError, match=f'{k}: .*leave it out'): learner(method, **{k: v})
    for f in (lambda: learner(method, metrics=[accuracy]), lambda: setattr(learn, 'metrics', [accuracy, Dice]), lambda: learner(method, metrics=Dice())):
        with pytest.raises(InputError, match="'(accuracy|dice)' compares with targets"): f()

def test_each_fit_starts_its_schedules_again():
    learn = learner('clove')
    learn.fit(1)
    learn.fit(1)
    h = learn.schedules.history
    assert len(h)==6 and h[:3]==h[3:]
    assert all(len(v)==3 for v in learn.recorder.hps.values())

def test_the_monitor_keeps_fits_apart():
    means = []
    learn = learner(monitor_every=1)
    learn.collapse_monitor.diagnose = lambda m: means.append(m['loss']) or []
    for _ in range(2): learn.fit(1)
    of = [h['loss'] for h in learn.collapse_monitor.history]
    assert means==pytest.approx([sum(of[:3])/3, sum(of[3:])/3])

@pytest.mark.parametrize('method', METHODS)
def test_freeze_and_unfreeze(method):
    learn = learner(method)
    body, head = encoder(learn), {k: v for k,v in weights(learn).items() if k.startswith('student') and 'encoder' not in k and 'running' not in k and 'num_' not in k}
    fixed = [p for p in learn.model.student.encoder.parameters() if not p.requires_grad]
    learn.freeze()
    learn.fit(1)
    assert torch.equal(encoder(learn), body)
    assert any(not torch.equal(v, learn.model.state_dict()[k]) for k,v in head.items())
    learn.fit(1, reset_opt=True)
    assert torch.equal(encoder(learn), body)
    learn.unfreeze()
    learn.fit(1)
    assert not torch.equal(encoder(learn), body)
    assert not any(p.requires_grad for p in fixed)
    with pytest.raises(InputError, match='two parts'): learn.freeze_to(2)

def test_gradient_callbacks():
    learn, spy = learner(), Kinds()
    learn.fit(2, cbs=[GradientAccumulation(12), GradientClip(.01), spy])
    assert spy.moved==2

# ---------------------------------------------------------------- watching
def test_dense_scores_can_be_watched(tmp_path):
    learn = learner(path=tmp_path)
    learn.fit(3, cbs=[score := D.DenseScore(n_photos=3, verbose=False), SaveModelCallback('correspondence', fname='best'), CSVLogger()])
    names = list(learn.recorder.metric_names)
    got = [row[names.index('correspondence')-1] for row in learn.recorder.values]
    assert got==[h['correspondence'] for h in score.history if h['epoch']>0] and len(got)==3
    assert names[-1]=='time' and 'token rank' not in names
    assert (tmp_path/'models'/'best.pth').exists()
    best = learner(path=tmp_path).load('best')
    for k,v in weights(best).items(): assert torch.equal(v, learn.model.state_dict()[k])   # fastai loads the best at the end
    rows = (tmp_path/'history.csv').read_text().splitlines()
    assert rows[0].split(',')==names and len(rows)==4

def test_early_stopping_on_any_score():
    class Worse(D.DenseScore):
        def score_network(self, encoder, label='model', **kwargs):
            return [replace(s, value=.5-.1*self.done[0]) for s in super().score_network(encoder, label, **kwargs)]
    learn = learner(cbs=Worse(n_photos=3, verbose=False))
    learn.fit(5, cbs=EarlyStoppingCallback('token rank', patience=2))
    assert len(learn.recorder.values)==3
    assert 'token rank' in learn.recorder.metric_names

def test_scores_stay_between_two_scorings():
    learn = learner(cbs=D.DenseScore(every=2, n_photos=3, verbose=False))
    learn.fit(4)
    got = [row[-1] for row in learn.recorder.values]
    history = [h['correspondence'] for h in learn.dense_score.history]
    assert got==[history[0], history[1], history[1], history[2]]

def test_watching_what_is_not_there(tmp_path):
    for cb in (EarlyStoppingCallback(), SaveModelCallback('linear')):
        learn = learner(path=tmp_path, cbs=D.DenseScore(n_photos=3, verbose=False))
        with pytest.raises(InputError, match=f'watches {cb.monitor!r}, which this fit does not measure: use one of train_loss'): learn.fit(1, cbs=cb)
    learn = learner(dls=photos(tmp_path, valid_pct=.34))
    learn.path = tmp_path
    learn.fit(2, cbs=[EarlyStoppingCallback(), SaveModelCallback()])
    assert 'valid_loss' in learn.recorder.metric_names

# ---------------------------------------------------------------- looking
def test_validate(tmp_path):
    with pytest.raises(InputError, match='no validation set'): learner().validate()
    learn = learner(dls=photos(tmp_path, valid_pct=.34))
    got = learn.validate()
    assert len(got)==4 and all(math.isfinite(v) for v in got)
    learn = learner()
    assert len(learn.validate(dl=learn.dls.train))==4
    assert not learn.recorder.valid_metrics and not learn.schedules.history
    learn.fit(1)
    assert len(learn.recorder.values[0])==4

def test_curves(tmp_path):
    import matplotlib.pyplot as plt
    for dls,lines in ((None, 1), (photos(tmp_path, valid_pct=.34), 2)):
        learn = learner(dls=dls)
        learn.fit(3)
        assert len(learn.recorder.plot_loss(skip_start=0, ax=plt.figure().gca()).lines)==lines
        assert len(learn.recorder.plot_loss(0, with_valid=True, ax=plt.figure().gca()).lines)==lines
        assert len(learn.recorder.plot_loss(0, with_valid=False, ax=plt.figure().gca()).lines)==1
        learn.recorder.plot_sched()
        assert set(learn.recorder.hps)=={'lr', 'wd', 'temp_t'}
    plt.close('all')

@pytest.mark.parametrize('method', METHODS)
def test_summary_and_show_batch(method):
    learn = learner(method)
    said, student = str(learn.summary()), learn.model.student
    assert f'{sum(p.numel() for p in student.encoder.parameters()):,}' in said and 'stop_if_not_finite' in said
    learn.freeze()
    assert str(learn.summary()).splitlines()[4].split()[-1]=='0'
    views = sum(c.count for c in learn.dls.recipe.crops)
    assert len(learn.dls.show_batch(max_n=3).axes)==3*views
    assert len(learn.dls.train.show_batch(learn.dls.one_batch(), max_n=100).axes)==4*views

def test_saved_and_loaded(tmp_path):
    a, b = learner(path=tmp_path), learner(path=tmp_path)
    a.fit(1)
    a.save('mine')
    b.load('mine')
    for l in (a, b):
        torch.manual_seed(3)
        l.dls.rng.seed(3)
        l.fit(1)
    assert torch.equal(losses(a), losses(b))

def test_data_and_settings_of_another_kind(tmp_path):
    own = ImageDataLoaders.from_path_func(tmp_path, [photos(tmp_path).train.dataset.paths[0]]*4, lambda p: 'a', valid_pct=.25, bs=2, num_workers=0)
    for dls in (own, None, [1, 2], str(tmp_path), tmp_path):
        for method in METHODS:
            with pytest.raises(InputError, match=f'trains on DataLoaders of views, got a .*{method}_recipe'): getattr(D, f'{method}_learner')(dls)
    dls = learner().dls
    for config in (TINY['dino'], dict(lr=1), None):
        with pytest.raises(InputError, match='config must be a FLSLConfig or the name of a preset .paper, official, scenes., got a'): D.flsl_learner(dls, config=config)

def test_a_learner_is_pickled_and_copied():
    learn = fit(learner(cbs=D.DenseScore(n_photos=2, verbose=False)))
    for again in (pickle.loads(pickle.dumps(learn)), copy.deepcopy(learner())):
        assert again.model is not learn.model and len(again.cbs)
        again.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        same = pickle.loads(pickle.dumps(learn))
    for k,v in weights(learn).items(): assert torch.equal(v, same.model.state_dict()[k])

def test_the_device_as_a_word():
    learn = learner()
    learn.dls.to('cpu')
    for precision in ('to_fp32', 'to_bf16'): getattr(learn, precision)().fit(1)
    show_progress(learn).fit(1)

REFUSED = dict(
    FetchPreds=lambda l: l.fit(1, cbs=FetchPredsCallback()), GatherPreds=lambda l: l.add_cb(GatherPredsCallback()),
    get_preds=lambda l: l.get_preds(), predict=lambda l: l.predict(None), tta=lambda l: l.tta(), show_results=lambda l: l.show_results(),
    export=lambda l: l.export(), fine_tune=lambda l: l.fine_tune(1),
    MixUp=lambda l: l.fit(1, cbs=[Hypers(), MixUp()]), CutMix=lambda l: l.add_cb(CutMix()), ReduceLROnPlateau=lambda l: l.fit(1, cbs=ReduceLROnPlateau('train_loss')),
    ShowGraphCallback=lambda l: l.fit(1, cbs=ShowGraphCallback), BnFreeze=lambda l: l.fit(1, cbs=BnFreeze()), NonNativeMixedPrecision=lambda l: l.to_non_native_fp16())

@pytest.mark.parametrize('name', REFUSED)
def test_one_sentence_that_says_what_to_use(name, tmp_path):
    learn = learner(path=tmp_path)
    before = [cb.name for cb in learn.cbs]
    with pytest.raises(InputError) as e: REFUSED[name](learn)
    assert '\n' not in str(e.value) and ':' in str(e.value)
    assert [cb.name for cb in learn.cbs]==before and not list(tmp_path.iterdir())
    learn.fit(1)

@pytest.mark.parametrize('cb', [TerminateOnNaNCallback, ActivationStats, CollectDataCallback, ShortEpochCallback], ids=lambda cb: cb.__name__)
def test_other_callbacks_of_fastai(cb): learner().fit(1, cbs=cb())

def test_tensorboard(monkeypatch):
    "With stand-ins for the package, which is not needed otherwise"
    written = []
    class Writer:
        def __init__(self, log_dir=None): pass
        def add_scalar(self, name, value, step): written.append((name, float(value)))
        def close(self): pass
    board = types.ModuleType('torch.utils.tensorboard')
    board.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, 'tensorboard', types.ModuleType('tensorboard'))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', board)
    from fastai.callback.tensorboard import TensorBoardCallback
    learn = learner()
    for cb in (TensorBoardCallback, TensorBoardCallback(), TensorBoardCallback(trace_model=False)):
        with pytest.raises(InputError, match='pass trace_model=False, log_preds=False'): learn.fit(1, cbs=cb)
    learn.fit(1, cbs=TensorBoardCallback(trace_model=False, log_preds=False))
    assert {'train_loss', 'lr_1', 'wd_1'} <= {n for n,_ in written}

# ---------------------------------------------------------------- the compiler, errors, the same again
def test_compiled_in_place():
    plain, compiled = learner(), learner()
    with pytest.raises(InputError, match=r'learn.model.compile\(backend=.aot_eager.\)'): compiled.model = torch.compile(compiled.model)
    names = list(compiled.model.state_dict())
    compiled.model.compile(backend='eager')
    for l in (plain, compiled): fit(l)
    assert_close(losses(compiled), losses(plain))
    assert list(compiled.model.state_dict())==names and type(compiled.model) is type(plain.model)

def test_a_fit_after_an_error(tmp_path):
    class Boom(Callback):
        def after_batch(self):
            if self.train_iter==2: raise RuntimeError('boom')
    learn = learner(path=tmp_path)
    before = [cb.name for cb in learn.cbs]
    with pytest.raises(RuntimeError, match='boom'): learn.fit(1, cbs=[CSVLogger(), Boom()])
    assert learn.logger is noop and [cb.name for cb in learn.cbs]==before
    learn.fit(1)
    assert len(losses(learn))==3 and (tmp_path/'history.csv').read_text().count('\n')==1

def test_attributes_of_the_model_and_bars():
    learn = learner()
    assert learn.student is learn.model.student
    with learn.no_bar(), learn.no_logging(), learn.no_mbar(): learn.fit(1)
    assert len(learn.path.ls())>=0

def test_no_callback_shadows_the_learner(monkeypatch):
    "fastai warns of an attribute that both have; presets for photographs freeze the last layer at first"
    monkeypatch.setitem(TINY, 'flsl', replace(TINY['flsl'], freeze_epochs=1))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='You are shadowing')
        learner().fit(1)
