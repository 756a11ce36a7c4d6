"Scores while training: three methods, no influence, files that survive a kill, exact resume, two processes"
import os, warnings
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest, torch
import torch.distributed as dist
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from PIL import Image

from densessl.training.resume import SaveRun
from densessl.evaluation.network import prototype_head
from densessl.evaluation.report import ScoringData, score_network
from densessl.training.score import DenseScore
from densessl.methods.clove import clove_presets
from densessl.ground.core import InputError
from densessl.data.images import image_dls, scene_dls
from densessl.methods.dino import dino_presets
from densessl.data.labelled import SegmentationData
from densessl.evaluation.scores import read_scores
from densessl.methods.flsl import flsl_presets
from densessl.training.learner import learner as learner_of, methods
from densessl.ground.synthetic import CLASSES, draw_scenes
from densessl.methods.export import load_backbone
from processes import in_ranks, run_script

VIT = 'vit_tiny_patch16_224', dict(patch_size=8, embed_dim=24, depth=1, num_heads=2)
TINY = dict(
    flsl=(replace(flsl_presets['scenes'], img_size=32, local_size=16, n_local=1, hidden_dim=32, bottleneck_dim=16, n_prototypes=8, momentum=(.5,.5), drop_path_rate=.1), *VIT),
    dino=(replace(dino_presets['scenes'], img_size=32, local_size=16, n_local=1, hidden_dim=32, bottleneck_dim=16, n_prototypes=32, momentum=(.5,.5), drop_path_rate=.1), *VIT),
    clove=(replace(clove_presets['scenes'], img_size=32, local_size=16, n_local=1, hidden_dim=32, out_dim=16, num_heads=2, k=4), 'test_resnet', dict(output_stride=8, stem_width=8, channels=[16,16,16,24])))

x, m = draw_scenes(12, 32, seed=9, natural=True, noise=.1)
LABELLED = [SegmentationData(x[i], m[i], len(CLASSES), name='scenes') for i in (slice(0,8), slice(8,12))]

class Watch(Callback):
    "Every loss; every module's mode and every gradient at the start of an epoch's training"
    order = 90
    def before_fit(self): self.values, self.modes, self.grads = [], [], []
    def before_train(self):
        self.modes.append([o.training for o in self.model.modules()])
        self.grads.append([p.grad is None or not p.grad.any() for p in self.model.parameters()])
    def after_loss(self): self.values.append(self.learn.loss.item())

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "24 photographs as files, six of them to be kept apart"
    d = tmp_path_factory.mktemp('photos')
    for i,im in enumerate(draw_scenes(24, 40, seed=1)[0]): Image.fromarray(im[:,:32].permute(1,2,0).numpy()).save(d/f'{i:02}.png')
    return d

def said(scores): return [str(s) for s in scores]   # with nan equal to nan

def learner(method, dls=None, *cbs, **kwargs):
    config, arch, model_kwargs = TINY[method]
    torch.manual_seed(0); np.random.seed(0)
    if dls is None: dls = scene_dls(32, methods[method].recipe(config), bs=8, canvas=32)
    elif not hasattr(dls, 'train'): dls = image_dls(dls, methods[method].recipe(config), bs=8, num_workers=0, valid_pct=.26, seed=0, canvas=32, device='cpu')
    return learner_of(dls, arch, methods[method], config, model_kwargs=model_kwargs, monitor_every=1, cbs=cbs, **kwargs)

def fit(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(*args, **kwargs)
    return learn

@pytest.mark.parametrize('method,bf16', [('flsl', False), ('clove', False), ('dino', False), ('flsl', True), ('clove', True)])
def test_training_is_the_same_to_the_last_bit(method, bf16, photos, tmp_path):
    "With the validation of fastai, dropped paths, labels, a folder"
    a = fit(learner(method, photos, Watch(), DenseScore(labelled=LABELLED, linear=True, out=tmp_path, verbose=False), bf16=bf16), 2)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist()
    b = fit(learner(method, photos, Watch(), bf16=bf16), 2)
    assert len(a.watch.values)==2*(2+1)        # two steps and one batch of the validation set in each epoch
    assert a.watch.values==b.watch.values
    n = len(b.recorder.values[0])              # the score has a column of its own at the end
    assert [list(v)[:n] for v in a.recorder.values]==[list(v) for v in b.recorder.values]
    assert {len(v) for v in a.recorder.values}=={n+1}
    assert all(torch.equal(p, q) for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))
    assert torch.equal(after[0], torch.get_rng_state()) and after[1]==np.random.get_state()[1].tolist()
    assert a.watch.modes==b.watch.modes and any(a.watch.modes[0]) and all(map(all, a.watch.grads))
    assert a.dense_score.scores[0].protocol['data']=='photographs kept apart (6)'

@pytest.mark.parametrize('method', TINY)
def test_best_checkpoint_gives_its_score(method, photos, tmp_path):
    learn = fit(learner(method, photos, DenseScore(labelled=LABELLED, best_by='separation', out=tmp_path, verbose=False)), 3)
    cb = learn.dense_score
    assert cb.best['separation']==max(h['separation'] for h in cb.history[1:]) and [h['epoch'] for h in cb.history]==[0,1,2,3]
    kept, label = load_backbone(tmp_path/'best.safetensors'), f'epoch {cb.best["epoch"]}'
    recorded = [s for s in cb.scores if s.model==label]
    assert said(cb.score_network(kept, label))==said(s for s in recorded if s.probe!='prototype use')
    assert said(read_scores(tmp_path/'scores_by_epoch.json'))==said(cb.scores) and f'separation {100*cb.best["separation"]:.2f} %' in (tmp_path/'best.txt').read_text()
    assert ('prototype use' in {s.probe for s in recorded})==(method!='clove')==(prototype_head(learn.model) is not None)
    assert not list(tmp_path.glob('*.part')) and {p.name for p in tmp_path.iterdir()}=={'best.safetensors', 'best.txt', 'start.safetensors', 'scores_by_epoch.json'}

def test_prototype_head_is_the_methods_own():
    "Logits of the teacher for its own tokens, as the method would assign them"
    from densessl.theory.attention import mean_shift, unit_vectors
    f, d = (learner(o).model.eval() for o in ('flsl', 'dino'))
    v = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        head, temp = prototype_head(f)
        Z = unit_vectors(f.teacher.encoder.tokens(v))
        want = f.teacher.head(mean_shift(Z, Z, f.config.beta_ca)*24**.5)
        torch.testing.assert_close(head(f.backbone.tokens(v)), want.flatten(0, 1)); assert temp==f.config.temp_t[1]
        d.center.normal_()
        head, temp = prototype_head(d)
        torch.testing.assert_close(head(d.backbone.tokens(v)), d.teacher.head(d.backbone.tokens(v).mean(1))-d.center)

KILLED = '''import os, signal, sys, warnings
warnings.simplefilter('ignore')
sys.path.insert(0, sys.argv[2])
from test_score import *
class Kill(Callback):
    order = 95
    def after_batch(self):
        if self.epoch==2 and self.iter==1: os.kill(os.getpid(), signal.SIGKILL)
fit(learner('dino', None, Kill(), DenseScore(labelled=LABELLED, out=sys.argv[1])), 5)
'''
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs SIGKILL')
def test_killed_run_keeps_its_curve(tmp_path):
    (tmp_path/'killed.py').write_text(KILLED)
    r = run_script('killed.py', [tmp_path/'run', os.path.dirname(__file__)], tmp_path)
    assert r.returncode==-9, r.stderr
    scores = read_scores(tmp_path/'run/scores_by_epoch.json')
    assert list(dict.fromkeys(s.model for s in scores))==['before training', 'epoch 1', 'epoch 2']
    lines = r.stdout.splitlines()
    assert [l.split(':')[0].split(' of ')[0] for l in lines]==['before training', 'epoch 1', 'epoch 2'] and all('nearest neighbor' in l for l in lines)
    value = {s.model: s.value for s in scores if s.probe=='nearest neighbor'}
    best = max(('epoch 1', 'epoch 2'), key=value.get)
    data = ScoringData(LABELLED, (x, torch.full((12,2), 32), 32))
    got, = score_network(load_backbone(tmp_path/'run/best.safetensors'), data, 'nearest neighbor')
    assert got.probe=='nearest neighbor' and got.value==value[best]

def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    cb = fit(learner('dino', None, DenseScore(out=tmp_path, verbose=False)), 1).dense_score
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    def full(scores, path):
        path.write_text('[{"mod')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('densessl.training.curve.write_scores', full)
    with pytest.warns(UserWarning, match='could not be written'): cb._score()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()}==before

class Stop(Exception): pass
class StopAt(Callback):
    order = 2000
    def __init__(self, step): self.step_to_stop = step
    def after_batch(self):
        if self.train_iter==self.step_to_stop: raise Stop('cut')

@pytest.mark.parametrize('step', [2, 6, 8, 11])   # in the first epoch, in the middle of the second, at its end before it is scored, in the last
def test_exact_resume(step, tmp_path):
    "Cut anywhere, taken up by a new learner: the same curve, the same best"
    score = lambda name: DenseScore(labelled=LABELLED, out=tmp_path/name, verbose=False)
    save = lambda **kw: SaveRun(tmp_path/'run', minutes=None, every=1, **kw)
    whole = fit(learner('flsl', None, score('whole')), 3).dense_score
    with pytest.raises(Stop): fit(learner('flsl', None, score('cut'), save(), StopAt(step)), 3)
    again = fit(learner('flsl', None, score('cut'), save(resume=True)), 3).dense_score
    assert again.history==whole.history and again.best==whole.best and said(again.scores)==said(whole.scores)
    assert said(read_scores(tmp_path/'cut/scores_by_epoch.json'))==said(whole.scores)
    same = [load_backbone(tmp_path/d/'best.safetensors').state_dict().values() for d in ('whole', 'cut')]
    assert all(torch.equal(a, b) for a,b in zip(*same)) and again.start is not None
    assert again.conclusion==whole.conclusion and again.first_losses==whole.first_losses
    assert len(again.epoch_losses)==4 and again.epoch_losses==whole.epoch_losses

def test_a_batch_that_is_canceled_has_no_loss():
    class Leave(Callback):
        def before_batch(self):
            if self.iter==1: raise CancelBatchException
    score = fit(learner('clove', None, Leave(), DenseScore(verbose=False)), 1).dense_score
    assert len(score.epoch_losses)==3 and all(score.epoch_losses) and score.first_losses==score.epoch_losses

@pytest.mark.parametrize('broken', [False, True])
def test_a_plain_fit_after_a_resumed_one_counts_on(broken, tmp_path):
    "Whether the resumed fit came to its end or was broken off itself, the next one is a fit like any other"
    save = lambda **kw: SaveRun(tmp_path/'run', minutes=None, every=1, **kw)
    with pytest.raises(Stop): fit(learner('dino', None, DenseScore(verbose=False), StopAt(6)), 3, cbs=save())
    learn = learner('dino', None, DenseScore(verbose=False))
    with pytest.raises(Stop) if broken else nullcontext(): fit(learn, 3, cbs=[save(resume=True), *[StopAt(10)]*broken])
    fit(learn, 1)
    assert [(h['epoch'], h['step']) for h in learn.dense_score.history]==[(0,0), (1,4), (2,8), *([(3,14)] if broken else [(3,12), (4,16)])]

def test_labelled_folder(tmp_path):
    for split,n in (('train', 6), ('val', 3)):
        for kind in ('images', 'labels'): (tmp_path/'lab'/kind/split).mkdir(parents=True)
        for i,(im,mask) in enumerate(zip(*draw_scenes(n, 40, seed=n))):
            Image.fromarray(im.permute(1,2,0).numpy()).save(tmp_path/f'lab/images/{split}/{i}.png'); Image.fromarray(mask.byte().numpy()).save(tmp_path/f'lab/labels/{split}/{i}.png')
    learn = learner('dino', None, DenseScore(every=2, labelled=tmp_path/'lab', linear=True, verbose=False))
    fit(learn, 1)
    p = learn.dense_score.scores[-1]
    assert [h['epoch'] for h in learn.dense_score.history]==[0,1]            # the last epoch always
    assert p.probe=='linear' and 'lab-train (6) -> lab-val (3) | image 32x32 mask 32x32' in p.line
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        r = learn.dense_report(str(tmp_path/'lab'))
    assert [s.value for s in r if s.model=='before training']==[s.value for s in learn.dense_score.scores if s.model=='before training']

def test_bad_input_is_one_sentence():
    "Without fastai's words about events, and before any step"
    learn = learner('dino', None, Watch(), DenseScore(best_by='nearest neighbor'))
    with pytest.raises(InputError) as e: fit(learn, 1)
    assert str(e.value).startswith("best_by is 'nearest neighbor'") and 'values' not in vars(learn.watch)

class Break(Callback):
    "An epoch that ends in a network that sees nothing"
    order = 40   # before DenseScore looks
    def after_epoch(self):
        with torch.no_grad():
            for p in self.model.backbone.parameters(): p.zero_()

def test_verdict_is_said_at_the_end():
    learn = learner('clove', None, DenseScore(verbose=False), Break())
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match='Training harmed the features: correspondence -'): learn.fit(1)
    score = learn.dense_score
    assert score.conclusion.answer=='harmed' and 'helped' not in score.conclude()
    assert [h['token rank']>0 for h in score.history]==[True, False] and score.best['epoch']==1   # the start is no candidate

def test_a_run_that_is_stopped_gets_no_verdict():
    class Leave(Callback):
        def before_epoch(self):
            if self.epoch==1: raise CancelFitException
    learn = learner('clove', None, DenseScore(verbose=False), Break(), Leave())
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*Training|.*difference')
        learn.fit(2)
    assert [h['epoch'] for h in learn.dense_score.history]==[0,1]

def rank(i, world, init, out):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=init, rank=i, world_size=world)
    cb = fit(learner('dino', None, DenseScore(labelled=LABELLED, out=f'{out}/{i}', verbose=False)), 1).dense_score
    (torch.save(dict(history=cb.history, files=os.path.exists(f'{out}/{i}')), f'{out}/{i}.pt'))
    dist.barrier(); dist.destroy_process_group()

@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason='needs gloo')
def test_first_process_scores(tmp_path, world=2):
    in_ranks(rank, world, tmp_path)
    a, b = (torch.load(tmp_path/f'{i}.pt') for i in range(world))
    assert [h['epoch'] for h in a['history']]==[0,1] and a['files'] and b==dict(history=[], files=False)
