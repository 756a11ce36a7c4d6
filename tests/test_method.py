"A method is one record: two that the library does not know are trained, resumed, exported, counted and run from the command line"
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from fastai.callback.core import Callback
from torch import Tensor, nn
from torch.testing import assert_close

from densessl import cli
from densessl.cost import cost
from densessl.data.images import scene_dls
from densessl.data.views import CropSpec, Recipe
from densessl.ground.core import InputError
from densessl.methods.export import export_backbone, load_backbone
from densessl.methods.method import Method
from densessl.methods.student_teacher import StudentTeacher
from densessl.theory.schedules import cosine, warmup_cosine
from densessl.training import pictures   # `learn.show_modes`
from densessl.training.choices import parse_kwargs
from densessl.training.learner import learner, methods
from densessl.training.resume import SaveRun

CNN = 'test_resnet', dict(output_stride=8, stem_width=8, channels=[8, 8, 8, 16])

@dataclass(frozen=True)
class Config:
    img_size:int=32
    lr:float=.1
    temp:tuple=(1.,.5)
    momentum:tuple=(.9,1.)

class Parts(NamedTuple):
    distance:Tensor
    spread:Tensor

class Loss(nn.Module):
    "Two views of a photograph alike, photographs apart"
    def __init__(self, config):
        super().__init__()
        self.temp, self.parts = config.temp[0], None
    def forward(self, out, *targets):
        (p1, t1), (p2, t2) = out
        distance = (p1-t2).square().mean() + (p2-t1).square().mean()
        spread = torch.relu(1-torch.cat([p1, p2]).std(0)).mean()
        self.parts = Parts(distance.detach(), spread.detach())
        return distance/self.temp + spread

class NoTeacher(StudentTeacher):
    "Both views by the student"
    def __init__(self, encoder, config):
        super().__init__(dict(encoder=encoder, head=nn.Linear(encoder.embed_dim, 8)), teacher=False)
        self.config = config
    def encode(self, side, x): return side.head(side.encoder.tokens(x).mean(1))
    def forward(self, views): return [2*(self.encode(self.student, x),) for x in views['view'].images]

class OwnStatistics(StudentTeacher):
    "A predictor of the student alone, and a teacher whose batch norm sees its own batches"
    def __init__(self, encoder, config):
        projector = nn.Sequential(nn.Linear(encoder.embed_dim, 8), nn.BatchNorm1d(8))
        super().__init__(dict(encoder=encoder, projector=projector, predictor=nn.Linear(8, 8)),
                         teacher=('encoder', 'projector'), teacher_mode='train', buffers=False, keep='student')
        self.config = config
    def encode(self, side, x): return side.projector(side.encoder.tokens(x).mean(1))
    def forward(self, views):
        x = views['view'].images
        with torch.no_grad(): targets = [self.encode(self.teacher, o) for o in x]
        return [(self.student.predictor(self.encode(self.student, o)), t) for o,t in zip(x, targets)]

def record(name, model):
    return Method(name, dict(paper=Config(), scenes=Config()), lambda c: Recipe((CropSpec('view', c.img_size, (.4, 1.), count=2),)),
                  model, Loss, metrics=('distance', 'spread'), schedules=lambda c: dict(lr=warmup_cosine(1., .1), temp=cosine(*c.temp)),
                  arch=CNN[0], scene_arch=CNN[0], scene_kwargs='output_stride=8,stem_width=8,channels=[8,8,8,16]', scene_epochs=1)

TOYS = [record('no_teacher', NoTeacher), record('own_statistics', OwnStatistics)]
toys = pytest.mark.parametrize('method', TOYS, ids=lambda m: m.name)

def make(method, **kwargs):
    torch.manual_seed(0)
    dls = scene_dls(16, method.recipe(Config()), bs=4, canvas=40, seed=0)
    learn = learner(dls, CNN[0], method, model_kwargs=CNN[1], monitor_every=1, **kwargs)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
    learn.logger = lambda o: None
    return learn

def fit(learn, *cbs):
    torch.manual_seed(1)
    learn.fit(2, cbs=list(cbs))
    return learn

class StopAt(Callback):
    def after_batch(self):
        if self.train_iter==6: raise KeyboardInterrupt

@toys
def test_a_record_is_trained_resumed_and_exported(method, tmp_path):
    start = {k: v.clone() for k,v in make(method).model.state_dict().items()}
    whole = fit(make(method), SaveRun(tmp_path/'whole', minutes=None, every=2))
    names = ['epoch', 'train_loss', 'distance', 'spread', 'time']
    assert list(whole.recorder.metric_names)==names and len(whole.recorder.losses)==8
    h = whole.schedules.history
    assert [r['temp'] for r in h]==[cosine(1., .5)(i/8) for i in range(8)] and max(r['lr'] for r in h)<=.1*4/256
    assert [r['step'] for r in whole.collapse_monitor.history]==list(range(1, 9)) and 'spread' in whole.collapse_monitor.history[0]
    now = whole.model.state_dict()
    for k in ('student.encoder.net.conv1.0.weight', *(k for k in now if k.startswith('student.head'))): assert not torch.equal(now[k], start[k])
    with pytest.raises(KeyboardInterrupt): fit(make(method), SaveRun(tmp_path/'cut', minutes=None, every=2), StopAt())
    again = fit(make(method), SaveRun(tmp_path/'cut', minutes=None, every=2, resume=True))
    for k,v in again.model.state_dict().items(): assert torch.equal(v, now[k]), k
    export_backbone(whole, tmp_path/'backbone.safetensors')
    x = torch.randn(2, 3, 32, 32)
    assert_close(load_backbone(tmp_path/'backbone.safetensors').eval().tokens(x), whole.model.eval().backbone.tokens(x))

def test_without_a_teacher_nothing_asks_for_one():
    learn = fit(make(TOYS[0]))
    assert learn.model.teacher is None and not hasattr(learn, 'teacher_ema') and learn.model.backbone is learn.model.student.encoder
    assert 'teacher' not in str(learn.summary()) and 'student.head' in str(learn.summary())
    assert len(learn.show_modes(1).axes)==4
    learn.freeze()
    learn.unfreeze()

def test_a_teacher_in_training_mode_has_its_own_statistics():
    learn = make(TOYS[1])
    fit(learn)
    m = learn.model
    assert m.train().teacher.training and list(m.teacher)==['encoder', 'projector'] and not any(p.requires_grad for p in m.teacher.parameters())
    s, t = (side.projector[1] for side in (m.student, m.teacher))
    assert t.num_batches_tracked==s.num_batches_tracked==16 and not torch.equal(s.running_mean, t.running_mean)
    statistics, weight = t.running_mean.clone(), t.weight.clone()
    m.update_teacher(0.)
    assert torch.equal(t.running_mean, statistics) and torch.equal(t.weight, s.weight) and not torch.equal(t.weight, weight)

@toys
def test_cost_counts_a_record(method):
    got = cost(method, img_size=32, batch=8, model_kwargs=CNN[1])
    assert got.source=='roofline' and got.images_per_second>0

def test_the_command_line_runs_a_record_by_its_name(monkeypatch, tmp_path):
    monkeypatch.setitem(methods, 'no_teacher', TOYS[0])
    out = cli.pretrain(method='no_teacher', n_scenes=16, bs=8, epochs=1, out=tmp_path/'run')[0]
    assert (tmp_path/'run'/'backbone.safetensors').exists() and (tmp_path/'run'/'report.html').exists() and out

def test_names_of_methods():
    with pytest.raises(InputError, match="there is no method 'simclr': use one of flsl, clove, dino, byol, scrl"): learner(None, 'resnet50', 'simclr')
    for name,m in methods.items(): assert m.name==name and {'paper', 'scenes'} <= m.presets.keys()

def test_the_commands_name_every_method():
    from densessl.ground.commands import METHODS
    assert METHODS.split(', ')==list(methods)

@pytest.mark.parametrize('name', methods)
def test_every_method_takes_small_rates_in_early_layers(name):
    m = methods[name]
    config = replace(m.presets['scenes'], layer_decay=.5, img_size=64)
    learn = learner(scene_dls(8, m.recipe(config), bs=8, canvas=80, seed=0), m.scene_arch, m, config, model_kwargs=parse_kwargs(m.scene_kwargs))
    learn.layer_decay.before_fit()
    factor = {id(p): f for f,ps in learn.layer_decay.groups.items() for p in ps}
    early, late = [[factor.get(id(p), 1.) for k,p in learn.model.student.encoder.net.named_parameters() if p.requires_grad and k.startswith(start)]
                   for start in (('layer1', 'blocks.0'), ('layer4', 'blocks.2'))]
    assert max(early)<min(late)<=1

def test_frozen_batch_norm_keeps_the_statistics_of_the_encoder():
    "Those of the projector follow, the backbone's stay, in the teacher too"
    m = methods['byol']
    config = replace(m.presets['scenes'], freeze_norm=True)
    learn = learner(scene_dls(8, m.recipe(config), bs=8, canvas=80, seed=0), *CNN[:1], m, config, model_kwargs=CNN[1])
    def statistics(): return {k: v.clone() for k,v in learn.model.named_buffers() if 'running' in k}
    before = statistics()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    changed = {k for k,v in statistics().items() if not torch.equal(v, before[k])}
    assert changed and not any('encoder' in k for k in changed) and any('projector' in k for k in changed)
