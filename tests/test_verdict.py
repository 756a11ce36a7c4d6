"Did training help? Runs that learnt nothing, broke or improved, through the commands a user calls"
import warnings
from dataclasses import replace
from pathlib import Path

import pytest, torch
from fastai.callback.core import Callback
from PIL import Image
from torch import nn

from densessl.training.score import DenseScore
from densessl.cli import pretrain
from densessl.methods.encoders import dense_encoder
from densessl.data.labelled import SegmentationData
from densessl.evaluation.probes import dense_scores
from densessl.evaluation.scores import Score
from densessl.evaluation.report import evaluate
from densessl.evaluation.run_report import MONITORED
from densessl.ground.synthetic import CLASSES, draw_scenes
from densessl.methods.export import export_backbone
from densessl.evaluation.verdict import GAUGE_NAMES, diverged_loss, gain_over_starts, gather_statistics, training_verdict, random_start
from test_score import LABELLED, TINY, fit, learner, photos

SMALL = dict(
    clove=dict(arch='test_resnet', model_kwargs='output_stride=8,stem_width=8,channels=[16,16,16,24]', settings='local_size=16,n_local=1,hidden_dim=32,out_dim=16,num_heads=2,k=4'),
    flsl=dict(arch='vit_tiny_patch16_224', model_kwargs='patch_size=8,embed_dim=24,depth=1,num_heads=2', settings='local_size=16,n_local=1,hidden_dim=32,bottleneck_dim=16,n_prototypes=8'))
SMALL['cnn with flsl'] = SMALL['flsl'] | dict(arch=SMALL['clove']['arch'], model_kwargs=SMALL['clove']['model_kwargs'])

def run(kind, out, capsys, **changes):
    "What the command prints at the end"
    args = dict(method=kind.split()[-1], preset='scenes', img_size=32, bs=16, n_scenes=80, epochs=2, out=out) | SMALL[kind] | changes
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pretrain(**args)
    said = capsys.readouterr().out
    return said[said.index('trained for'):], (Path(out)/'best.txt').read_text()

@pytest.mark.parametrize('kind', SMALL)
def test_a_training_that_changes_nothing_did_not_help(kind, tmp_path, capsys):
    said, best = run(kind, tmp_path/'run', capsys, lr=1e-12)
    assert 'cannot be told whether training made a difference' in said and 'over 5 seeds' in said
    assert 'helped' not in said+best and 'harmed' not in said+best and 'worth training' not in said
    if 'cnn' in kind or kind=='clove': return
    start, trained = ((l.split('|')[2].split()[0]) for l in said.splitlines() if l.startswith(('| random start', '| flsl')))
    assert abs(float(start)-float(trained))<10

@pytest.mark.parametrize('kind,lr', [('clove', 3e4), ('flsl', 1e4), ('flsl', 3e5)])
def test_a_training_that_diverges_did_not_help(kind, lr, tmp_path, capsys):
    from densessl.ground.core import InputError
    try: said, best = run(kind, tmp_path/'run', capsys, lr=lr)
    except InputError as e: said, best = str(e), ''     # a loss or features that are not finite: no verdict at all
    assert 'helped' not in said+best

@pytest.mark.parametrize('method', ['clove', 'flsl', 'dino'])
def test_learning_rate_zero(method):
    cb = fit(learner(method, None, DenseScore(labelled=LABELLED, verbose=False)), 2, lr=0., wd=0.).dense_score
    g = cb.conclusion.gains[0]
    assert cb.conclusion.answer=='cannot tell' and g.starts==5
    assert cb.learn.collapse_monitor.history[0].keys()-{'step', 'epoch', 'progress', 'loss', 'K'}==MONITORED[method].keys()   # the report explains each
    if method!='clove': assert cb.history[-1]['nearest neighbor']==cb.history[0]['nearest neighbor']    # one of the starts itself

def test_a_loss_that_rose_outweighs_scores():
    "A network that by luck scores well after a training whose loss went up"
    class Rising(Callback):
        order = -5                                    # before the loss is kept
        def after_loss(self): self.learn.loss = self.learn.loss + 10*self.epoch
    learn = learner('dino', None, DenseScore(labelled=LABELLED, verbose=False), Rising())
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match='the loss diverged, from .* in the first steps to .* in the last epoch'): learn.fit(2)
    cb = learn.dense_score
    better = [replace(s, value=.99, resampled=()) for s in cb.scores if s.model=='epoch 2']
    cb.scores = [s for s in cb.scores if s.model!='epoch 2']+better
    assert cb.verdict().answer=='cannot tell' and 'helped' not in cb.verdict().said

def test_a_collapse_outweighs_scores():
    learn = learner('flsl', None, DenseScore(labelled=LABELLED, verbose=False))
    learn.collapse_monitor.diagnose = lambda m: ['The tokens vary along 1.0 directions: they have collapsed.']
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match=r'the monitor saw a collapse \(The tokens vary along 1.0 directions\)'): learn.fit(1)
    assert learn.dense_score.conclusion.answer!='helped'

class Oracle(nn.Module):
    "Features that know the color of a cell's class, and noise"
    def __init__(self, enc, noise, seed=0): super().__init__(); self.enc, self.noise, self.seed = enc, noise, seed
    def feature_map(self, x):
        g = torch.Generator().manual_seed(self.seed)
        z = nn.functional.avg_pool2d(x, 4)
        return z + self.noise*torch.randn(z.shape, generator=g)

def painted(n, seed, shuffled=False):
    "Masks of drawn scenes, and each as an image in the colors of its classes"
    m = draw_scenes(n, 32, seed=seed)[1]
    colors = (torch.rand(len(CLASSES), 3, generator=torch.Generator().manual_seed(3))*255).byte()
    masks = m[torch.randperm(n, generator=torch.Generator().manual_seed(1))] if shuffled else m
    return SegmentationData(colors[m.long()].permute(0,3,1,2).contiguous(), masks, len(CLASSES), name='painted', classes=CLASSES)

@pytest.mark.parametrize('shuffled,answer', [(False, 'helped'), (True, 'cannot tell')])
def test_an_improvement_is_told_from_labels_of_other_images(shuffled, answer):
    train, test = painted(30, 1, shuffled), painted(20, 2, shuffled)
    scores = [s for i in range(5) for s in dense_scores(Oracle(None, 3., i), train, test, 'random start', steps=50)]
    scores += dense_scores(Oracle(None, .3), train, test, 'trained', steps=50)
    v = training_verdict(scores, 'trained')
    assert v.answer==answer and len(v.gains)==2 and all(g.n==20 for g in v.gains)
    if shuffled: return
    assert all(g.images>0 for g in v.gains)
    good = [replace(s, model='random start') for s in scores if s.model=='trained']*3
    bad = [replace(s, model='trained') for s in scores[:2]]
    assert training_verdict(good+bad, 'trained').answer=='harmed'

def test_a_few_test_images_tell_less():
    train, test = painted(30, 1), painted(40, 2)
    half = []
    for data in (test[:4], test):
        a, b = (dense_scores(Oracle(None, n), train, data, probes='nearest neighbor')[0] for n in (1., .5))
        half.append(gain_over_starts(b, [a], fixed=True).images)
    assert half[0]>2*half[1]

def test_bootstrap_of_a_score_is_its_spread_over_test_sets():
    "Many test sets of 20 images score as differently as one, resampled, says"
    train = painted(30, 1)
    f = Oracle(None, 1.5)
    got = [dense_scores(f, train, painted(20, 100+i), probes='nearest neighbor')[0] for i in range(30)]
    real = torch.tensor([s.value for s in got]).std()
    said = torch.tensor([torch.tensor(s.resampled).std() for s in got]).mean()
    assert .6<said/real<1.6

def test_gauges_do_not_outvote_labels():
    def made(model, **values): return [Score(model, p.replace('_', ' '), v, (), 'p') for p,v in values.items()]
    starts = [s for v in (.19,.2,.21) for s in made('random start', correspondence=v, linear=v, position=v)]
    assert training_verdict(starts+made('t', correspondence=.9, linear=.05), 't').answer=='harmed'
    assert training_verdict(starts+made('t', correspondence=.9, linear=.19), 't').answer=='cannot tell'
    assert training_verdict(starts+made('t', correspondence=.01, linear=.9), 't').answer=='helped'
    assert training_verdict([s for s in starts if s.probe in GAUGE_NAMES]+made('t', correspondence=.9), 't').answer=='helped'

def test_one_class_is_no_success(tmp_path):
    for split,n in (('train', 6), ('val', 3)):
        for kind in ('images', 'labels'): (tmp_path/'lab'/kind/split).mkdir(parents=True)
        for i,im in enumerate(draw_scenes(n, 40, seed=n)[0]):
            Image.fromarray(im.permute(1,2,0).numpy()).save(tmp_path/f'lab/images/{split}/{i}.png')
            Image.new('L', (40,40), 0).save(tmp_path/f'lab/labels/{split}/{i}.png')
    (tmp_path/'lab/classes.txt').write_text('ground\nother')
    export_backbone(dense_encoder('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2), tmp_path/'b.safetensors')
    from densessl.ground.core import InputError
    try: said = evaluate(str(tmp_path/'b.safetensors'), tmp_path/'lab')[1]
    except InputError as e: said = str(e)
    assert ('one class' in said or 'two classes' in said) and 'helped' not in said

@pytest.mark.parametrize('published', [False, True])
def test_published_weights_are_their_own_start(published):
    learn = learner('clove', None, DenseScore(labelled=LABELLED, published=published, verbose=False))
    before = {k: v.clone() for k,v in learn.model.backbone.state_dict().items()}
    cb = fit(learn, 1, lr=0.).dense_score
    g = cb.conclusion.gains[0]
    assert cb.conclusion.answer=='cannot tell' and 'published weights' in cb.conclusion.said if published else 'random start' in cb.conclusion.said
    assert (g.starts, g.seeds==0.)==((1, True) if published else (5, False))
    same = [torch.equal(v, before[k]) for k,v in cb.start.state_dict().items()]
    assert all(same)==published                       # as published; or with the statistics of the training views

def test_a_second_fit_is_judged_against_its_own_start():
    "The callback comes late: the network is no random start any more"
    learn = fit(learner('clove'), 1)
    cb = DenseScore(labelled=LABELLED, verbose=False)
    fit(learn, 1, cbs=cb)
    assert cb.conclusion.gains[0].starts==1 and 'the start of this fit' in cb.conclusion.said

@pytest.mark.parametrize('method', ['clove', 'flsl'])
def test_report_after_a_fit_with_the_callback(method, photos):
    "Given to `fit` alone, as README does, the callback is gone afterwards; its start is not"
    learn = fit(learner(method, photos), 2, cbs=[DenseScore(every=10, labelled=LABELLED, verbose=False)])
    assert not hasattr(learn, 'dense_score')
    table = repr(learn.dense_report())
    assert [l.split('|')[1].strip() for l in table.splitlines()[2:4]]==['before training', 'after 2 epochs']

def test_statistics_are_those_of_training_views(photos):
    "Views, cropped and colored, of the photographs trained on; not those kept apart"
    from densessl.evaluation.network import training_views
    learn = learner('clove', photos)
    a, b = training_views(learn.dls), training_views(learn.dls, n=4)
    assert sum(map(len, a))==2*18 and sum(map(len, b))==2*4 and a[0].shape[1:]==(3,32,32)
    state = torch.get_rng_state()
    assert all(torch.equal(p, q) for p,q in zip(a, training_views(learn.dls))) and torch.equal(state, torch.get_rng_state())

def test_diverged_needs_a_rise():
    assert not diverged_loss(100., 99.) and diverged_loss(1., 1.2) and diverged_loss(-1., -.5) and diverged_loss(1., float('nan'))

def test_gathering_is_torchs_average_and_no_weight_changes():
    enc = random_start(dense_encoder('test_resnet', img_size=32))
    was = {k: v.clone() for k,v in enc.state_dict().items()}
    gather_statistics(enc, [torch.randn(4, 3, 32, 32)]*2)
    changed = {k.rsplit('.', 1)[1] for k,v in enc.state_dict().items() if not torch.equal(v, was[k])}
    assert changed=={'running_mean', 'running_var', 'num_batches_tracked'} and not enc.training

def test_a_learner_knows_that_its_weights_were_published(tmp_path):
    config, arch, kwargs = TINY['flsl']
    enc = dense_encoder(arch, img_size=32, pos_scale=config.pos_scale, **kwargs)
    export_backbone(random_start(enc, 5), tmp_path/'b.safetensors')
    cb = fit(learner('flsl', None, DenseScore(labelled=LABELLED, verbose=False), init=tmp_path/'b.safetensors'), 1, lr=0., wd=0.).dense_score
    assert 'against published weights' in cb.conclusion.said and cb.conclusion.gains[0].gain==0. and cb.conclusion.gains[0].seeds==0.
