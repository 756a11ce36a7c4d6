"Detectors train as pretraining does: frozen or whole, in several processes, killed and resumed; and they learn"
import importlib.util, math, multiprocessing as mp, os, random, re, signal, sys, warnings
from dataclasses import replace
from statistics import median

import numpy as np, pytest, torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from test_distributed import run
from torch import nn
from torch.testing import assert_close

from densessl.ground.core import InputError
from densessl.methods.encoders import dense_encoder
from densessl.training.distributed import sync_batchnorm
from densessl.training.optim import ClipGrad
from densessl.training.precision import AutocastBF16
from densessl.training.resume import SaveRun
from densessl.transfer.detector import Detector, DetectorConfig
from densessl.transfer.finetune import (DetectionScore, detect, detection_dls, detection_learner, detection_scores,
    in_lists)
from densessl.transfer.instances import InstanceData, scene_instances
from densessl.transfer.recipe import FineTune

pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = DetectorConfig(channels=16, hidden=32, n_anchors=64, n_regions=16, n_before=(50,50), n_after=(50,20), mask_convs=1)
VIT = dict(patch_size=16, embed_dim=12, num_heads=1)
EPOCHS, STEPS = 2, 4     # of an epoch

def as_it_is(image, target): return image, target

def one_class(data):
    "All objects are 'object'"
    notes = [dict(n, category_id=1) for n in data.truth['annotations']]
    truth = data.truth | dict(annotations=notes, categories=[dict(id=1, name='object')])
    return InstanceData(truth, data.read, data.name)

def scenes(n, seed, **kwargs): return one_class(scene_instances(n, 64, seed, n_objects=(1,2), natural=True, noise=.05, **kwargs))

def encoder(arch='test_resnet', **kwargs): return dense_encoder(arch, 64, **kwargs)

def fit(learn, n=EPOCHS, *cbs):
    "Fit without a word"
    with learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(n, cbs=list(cbs))
    return learn

# ---- learning

@pytest.fixture(scope='module')
def many(): return scenes(64, 0), scenes(24, 1)

def learned(train, test, steps, milestones=(.6, .85)):
    "Scores before and after so many steps of at most eight images"
    torch.manual_seed(0)
    random.seed(0)
    dls = detection_dls(train, test, min(len(train), 8), as_it_is)
    recipe = FineTune(batch=dls.train.bs, rate=3e-3, decay=.01, milestones=milestones, warmup=0)
    learn = detection_learner(dls, encoder(), replace(SMALL, channels=32, hidden=64), recipe, DetectionScore(10**6))
    start = detection_scores(learn.model.config, detect(learn.model, dls.valid, test), test)
    fit(learn, steps//len(dls.train))
    return start, learn.scores

def test_one_image_is_learned_by_heart(many):
    one = many[0].subset(lambda entry: entry['id']==many[0].truth['images'][3]['id'])
    start, end = learned(one, one, 800, (.5, .8))
    assert start['box AP']<.3
    for kind in ('box', 'mask'): assert end[f'{kind} AP75']>.99 and end[f'{kind} AP']>.94, (kind, end)

def test_targets_of_other_images_teach_nothing(many):
    train, test = many
    truth = train.truth
    places = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    moved = [dict(n, image_id=places[n['image_id']]) for n in truth['annotations']]
    start, shuffled = learned(InstanceData(truth | dict(annotations=moved), train.read), test, 48)
    _, right = learned(train, test, 48)
    assert shuffled['box AP']<start['box AP']+.03 and right['box AP']>start['box AP']+.2, (start['box AP'], shuffled['box AP'], right['box AP'])

# ---- the recipe

def test_layer_decay_moves_each_layer_by_its_rate():
    "One plain step: what a parameter moves is its gradient times its rate"
    data = scene_instances(2, 64, 0, n_objects=(2,2))
    def moved(**change):
        random.seed(1); torch.manual_seed(1)
        vit = encoder('vit_tiny_patch16_224', depth=12, positions='learned', **VIT)
        recipe = FineTune(optimizer='sgd', rate=100., momentum=0., decay=0., warmup=0, batch=2, **change)
        config = replace(SMALL, pyramid='simple', img_size=64, masks=False)
        learn = detection_learner(detection_dls(data, batch_size=2, augment=as_it_is), vit, config, recipe)
        before = {k: p.detach().clone() for k,p in learn.model.named_parameters()}
        torch.manual_seed(2)
        fit(learn, 1)
        return {k: (p.detach()-before[k]).double() for k,p in learn.model.named_parameters()}
    plain, decayed = moved(), moved(layer_decay=.7)
    seen = set()
    for k,d in plain.items():
        layer = 13
        if 'pos_embed' in k or 'patch_embed' in k: layer = 0
        elif found := re.search(r'net\.blocks\.(\d+)\.', k): layer = int(found[1])+1
        if d.norm()<1e-3: continue
        assert_close(decayed[k].norm()/d.norm(), torch.tensor(.7**(13-layer)).double(), rtol=.02, atol=0, msg=lambda m: f'{k}: {m}')
        seen.add(layer)
    assert seen=={*range(14)}

@pytest.mark.parametrize('optimizer', ('adamw', 'sgd'))
def test_norms_and_positions_do_not_decay(optimizer):
    "A step with a decay so large that it alone decides"
    data, found = scene_instances(2, 64, 0, n_objects=(2,2)), {}
    for decay in (0., 1.):
        random.seed(1); torch.manual_seed(1)
        vit = encoder('vit_tiny_patch16_224', depth=2, positions='learned', **VIT)
        recipe = FineTune(optimizer=optimizer, rate=.1, decay=decay, warmup=0, batch=2)
        config = replace(SMALL, pyramid='simple', img_size=64, masks=False)
        learn = detection_learner(detection_dls(data, batch_size=2, augment=as_it_is), vit, config, recipe)
        before = {k: p.detach().clone() for k,p in learn.model.named_parameters()}
        torch.manual_seed(2)
        fit(learn, 1)
        found[decay] = {k: p.detach().clone() for k,p in learn.model.named_parameters()}
    for k,was in before.items():
        if was.abs().max()==0: continue         # decay of zero is zero
        decays = not ('norm' in k or 'pos_embed' in k or re.search(r'levels\.\d\.(1|\d+)\.(weight|bias)$', k) and was.ndim==1 and 'bias' not in k)
        difference = (found[1.][k]-found[0.][k]).norm()/was.norm()
        if decays: assert_close(difference, torch.tensor(.1), rtol=.02, atol=1e-3, msg=lambda m: f'{k}: {m}')
        else: assert difference<1e-6, k

@pytest.mark.parametrize('arch,kwargs', (('test_resnet', {}), ('vit_tiny_patch16_224', dict(depth=2, drop_path_rate=.3, **VIT))))
def test_frozen_encoder(arch, kwargs):
    "No tensor of the encoder changes, buffers included; without it they do"
    dls = detection_dls(scene_instances(8, 64, 0), batch_size=4)
    for frozen in (True, False):
        torch.manual_seed(0)
        net = encoder(arch, **kwargs)
        before = {k: v.clone() for k,v in net.state_dict().items()}
        learn = detection_learner(dls, net, SMALL, FineTune(rate=1e-2, frozen=frozen, precise_bn=8))
        heads = {k: v.clone() for k,v in learn.model.heads.state_dict().items()}
        fit(learn, 1)
        same = [torch.equal(v, before[k]) for k,v in net.state_dict().items()]
        assert all(same) if frozen else not any(s for s,k in zip(same, before) if 'running' in k or 'qkv' in k)
        assert not all(torch.equal(v, heads[k]) for k,v in learn.model.heads.state_dict().items())

def test_frozen_batch_norm():
    "The encoder's statistics and factors stay, its other weights train; the detector's own norms do not freeze"
    dls, net = detection_dls(scene_instances(8, 64, 0), batch_size=4), encoder()
    learn = detection_learner(dls, net, replace(SMALL, norm='sync'), FineTune(rate=1e-2, norm='frozen'))
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    fit(learn, 1)
    changed = {k for k,v in learn.model.state_dict().items() if not torch.equal(v, before[k])}
    in_norm = {f'pyramid.taps.net.{k}.{o}' for k,m in net.net.named_modules() if 'BatchNorm' in type(m).__name__ for o in ('weight', 'bias', 'running_mean', 'running_var')}
    assert in_norm and not in_norm & changed
    assert 'pyramid.taps.net.layer4.0.conv1.weight' in changed and any('fpn' in k and 'running_mean' in k for k in changed)

def test_out_of_memory_names_the_settings():
    class Full(Callback):
        def before_batch(self): raise torch.OutOfMemoryError('CUDA out of memory')
    dls = detection_dls(scene_instances(4, 64, 0), batch_size=2)
    with pytest.raises(InputError, match=r'add AutocastBF16\(\) to cbs, lower bs \(now 2.*checkpoint=True.*smaller in augment'):
        fit(detection_learner(dls, encoder(), SMALL, cbs=Full()), 1)
    with pytest.raises(InputError) as e: fit(detection_learner(dls, encoder(), SMALL, FineTune(checkpoint=True), [Full(), AutocastBF16()]), 1)
    assert 'checkpoint' not in str(e.value) and 'AutocastBF16' not in str(e.value) and 'img_size' not in str(e.value)

def test_keypoints_are_scored():
    "A detector that says the truth has AP 1 in boxes, masks and keypoints"
    data = scenes(3, 0)
    truth = data.truth
    for n in truth['annotations']:
        x, y, w, h = n['bbox']
        n |= dict(keypoints=[x+w/2, y+h/2, 2, x+w/4, y+h/4, 2]*8+[x, y, 2], num_keypoints=17)
    said = [{k: n[k] for k in ('image_id', 'category_id', 'bbox', 'segmentation', 'keypoints')} | dict(score=.9) for n in truth['annotations']]
    config = replace(SMALL, n_keypoints=17)
    scores = detection_scores(config, said, data)
    assert scores['box AP']==scores['mask AP']==pytest.approx(1.) and scores['keypoint AP50']==pytest.approx(1.)

def test_keypoints_other_than_coco_s_need_sigmas():
    "Without them a fit does not begin; with them a detector that says the truth has AP 1"
    data = scenes(4, 0)
    for n in data.truth['annotations']:
        x, y, w, h = n['bbox']
        n |= dict(keypoints=[x, y, 2, x+w/2, y+h/2, 2], num_keypoints=2)
    data = InstanceData(data.truth, data.read, kinds=('masks', 'keypoints'))
    said, config = [dict(n, score=.9) for n in data.truth['annotations']], replace(SMALL, n_keypoints=2)
    dls = detection_dls(data, data, 2)
    with pytest.raises(InputError, match='2 keypoints cannot be scored with 17 sigmas'):
        fit(detection_learner(dls, encoder(), config, cbs=DetectionScore()), 1)
    learn = fit(detection_learner(dls, encoder(), config, cbs=DetectionScore(sigmas=(.05, .05))), 1)
    assert 0<=learn.scores['keypoint AP']<1==pytest.approx(detection_scores(config, said, data, (.05, .05))['keypoint AP50'])

# ---- killed and resumed

KINDS = dict(
    cnn = ('test_resnet', {}, FineTune(batch=2, rate=1e-3, precise_bn=4), ()),
    vit = ('vit_tiny_patch16_224', dict(depth=4, **VIT), FineTune(batch=2, rate=1e-3, layer_decay=.7, drop_path=.5, checkpoint=True), (AutocastBF16, ClipGrad)),
    sgd = ('test_resnet', {}, FineTune(batch=2, rate=1e-2, optimizer='sgd', power=1.), (lambda: GradientAccumulation(6),)))

def make(kind, cbs=(), seed=0, train=None, change=None):
    "A small learner; another seed gives other weights and other generators"
    arch, kwargs, recipe, own = KINDS[kind]
    random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
    dls = detection_dls(train or scene_instances(2*STEPS, 64, 0, n_objects=(1,2)), scene_instances(4, 64, 1, n_objects=(1,2)), 2)
    recipe = replace(recipe, **(change or {}))
    return detection_learner(dls, encoder(arch, **kwargs), SMALL, recipe, [DetectionScore(), *(c() for c in own), *cbs])

def everything(learn):
    "All that a run leaves: tensors, and the rest as text"
    r, opt = learn.recorder, learn.opt.state_dict()
    moments = {f'optimizer.{i}.{k}': torch.as_tensor(v) for i,s in opt['state'].items() for k,v in s.items()}
    rest = dict(groups=opt['param_groups'], lrs=r.lrs, values=[list(v) for v in r.values], rates=learn.rate_schedule.history,
                scores=learn.detection_score.history, order=learn.dls.train.rng.getstate(), python=random.getstate())
    return dict(**learn.model.state_dict(), **moments, losses=torch.stack([*r.losses]), draws=torch.rand(4)), {k: repr(v) for k,v in rest.items()}

class At(Callback):
    "Do something when so many batches are done"
    run_valid = False
    def __init__(self, at, f): self.at, self.f = at, f
    def after_batch(self):
        if self.train_iter==self.at: self.f()

def save(folder, **kwargs): return SaveRun(folder, minutes=None, every=3, **kwargs)

def killed(kind, folder, at): fit(make(kind, [save(folder)]), EPOCHS, At(at, lambda: os.kill(os.getpid(), signal.SIGKILL)))

@pytest.mark.skipif(sys.platform!='linux', reason='forks')
@pytest.mark.parametrize('kind', KINDS)
def test_killed_and_resumed_bit_for_bit(kind, tmp_path):
    want = everything(fit(make(kind)))
    for at in (5, 7):        # in both the newest checkpoint lies within an epoch
        child = mp.get_context('fork').Process(target=killed, args=(kind, tmp_path/str(at), at))
        child.start()
        child.join(120)
        assert child.exitcode==-signal.SIGKILL
        got = everything(fit(make(kind, [save(tmp_path/str(at), resume=True)], seed=5)))
        assert got[0].keys()==want[0].keys()
        assert not [k for k in want[0] if not torch.equal(got[0][k], want[0][k])]
        assert not [k for k in want[1] if got[1][k]!=want[1][k]]
    assert len(eval(want[1]['scores'], dict(nan=math.nan)))==EPOCHS

def test_other_data_and_settings_are_refused_on_resume(tmp_path):
    fit(make('cnn', [save(tmp_path)]), 1)
    def told(**kwargs):
        with pytest.raises(InputError) as e: fit(make('cnn', [save(tmp_path, resume=True)], **kwargs), 1)
        return str(e.value)
    data = scene_instances(2*STEPS, 64, 0, n_objects=(1,2))
    names = [dict(c) for c in data.truth['categories']]
    names[1]['name'] = 'cat'
    other = InstanceData(data.truth | dict(categories=names), data.read)
    was = data.truth['categories'][1]['name']
    with pytest.raises(InputError, match="those to score on"): detection_dls(other, data)
    learn = make('cnn', [save(tmp_path, resume=True)])
    learn = detection_learner(detection_dls(other, InstanceData(other.truth, other.read), 2), encoder(), SMALL, KINDS['cnn'][2], [save(tmp_path, resume=True)])
    with pytest.raises(InputError, match=f"classes.1 was '{was}', now 'cat'"): fit(learn, 1)
    assert 'fit.rate was 0.001, now 0.002' in told(change=dict(rate=2e-3))
    assert 'data.hash was' in told(train=scene_instances(2*STEPS, 64, 3, n_objects=(1,2)))

# ---- several processes

gloo = [pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason='needs gloo'),
        pytest.mark.skipif(importlib.util.find_spec('accelerate') is None, reason='needs accelerate')]
# all anchors and all proposals count, so that nothing is drawn
SURE = replace(SMALL, n_anchors=4096, n_regions=400, norm='sync', box_convs=4)

def batch(): return in_lists([scene_instances(4, 64, 0, n_objects=(1,3))[i] for i in range(4)])

def step(rank, world):
    "Loss, gradients and statistics of one step, each process with its part of the images"
    torch.manual_seed(3)
    model = Detector(encoder(), 6, SURE).train()
    net = model
    if world>1: net = nn.parallel.DistributedDataParallel(sync_batchnorm(model, 'cpu'), broadcast_buffers=False)
    mine = [o[rank*4//world:(rank+1)*4//world] for o in batch()]
    loss = sum(net(*mine).values())
    loss.backward()
    loss = loss.detach()
    if world>1: dist.all_reduce(loss)
    return dict(loss=loss/world, grads={k: p.grad for k,p in model.named_parameters()}, buffers=dict(model.named_buffers()))

def distance(a, b):
    "Largest difference of two tensors, relative to the largest number"
    return (a.double()-b.double()).abs().max().item()/max(b.double().abs().max().item(), 1e-9)

def whole_run(rank, world):
    "Weights, losses and scores of a fit"
    random.seed(0); torch.manual_seed(0)
    dls = detection_dls(scene_instances(8, 64, 0, n_objects=(1,2)), scene_instances(5, 64, 1, n_objects=(1,2)), 4//world, as_it_is)
    recipe = FineTune(batch=4, rate=1e-2, optimizer='sgd', warmup=2, precise_bn=8)
    learn = detection_learner(dls, encoder(), SURE, recipe, DetectionScore())
    def go():
        with learn.no_bar(): fit(learn)
    if world>1:
        with learn.distrib_ctx(cpu=True): go()
    else: go()
    return dict(model=learn.model.state_dict(), scores=learn.scores, losses=[*learn.recorder.losses], lr=learn.lr)

def both(rank, world):
    if world>1: dist.init_process_group('gloo')
    first = step(rank, world)
    return dict(step=first, run=whole_run(rank, world))

@pytest.fixture(scope='module')
def two(tmp_path_factory): return run(both, 2, tmp_path_factory.mktemp('ranks')/'out')

class TestTwoProcesses:
    pytestmark = gloo
    def test_a_step(self, two):
        want = step(0, 1)
        for got in two:
            assert_close(got['step']['loss'], want['loss'], rtol=1e-5, atol=0)
            for part in ('grads', 'buffers'):
                assert got['step'][part].keys()==want[part].keys()
                off = {k: distance(got['step'][part][k], v) for k,v in want[part].items()}
                # a batch in another order is as far off: activations at the kink of a ReLU
                assert median(off.values())<1e-4 and max(off.values())<.02, (part, median(off.values()), max(off, key=off.get))
    def test_a_run(self, two):
        want = whole_run(0, 1)
        for got in two:
            got = got['run']
            assert got['lr']==want['lr']
            off = [distance(got['model'][k], v) for k,v in want['model'].items() if 'num_batches' not in k]
            assert median(off)<1e-3 and max(off)<.1, (median(off), max(off))
            assert_close(torch.stack([*got['losses']]), torch.stack([*want['losses']]), rtol=.02, atol=0)
            assert got['scores'].keys()==want['scores'].keys()
            for k,v in want['scores'].items(): assert got['scores'][k]==pytest.approx(v, abs=.02, nan_ok=True), k
