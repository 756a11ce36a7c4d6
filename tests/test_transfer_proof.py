"A backbone that is pretrained for less than a minute makes a better detector than its own random start: views, loss, export, load, Mask R-CNN, AP"
from dataclasses import replace

import fastai.callback.progress   # `learn.no_bar`
import pytest
import torch
from fastai.torch_core import set_seed

from densessl.evaluation.verdict import gather_statistics
from densessl.job import scene_data
from densessl.methods.clove import clove_method
from densessl.methods.export import export_backbone, load_backbone
from densessl.training.choices import parse_kwargs
from densessl.training.learner import learner
from densessl.transfer.detector import DetectorConfig
from densessl.transfer.finetune import DetectionScore, detection_dls, detection_learner
from densessl.transfer.instances import scene_instances
from densessl.transfer.recipe import FineTune

SMALL = DetectorConfig(taps=(4,4), strides=(4,8), channels=32, hidden=64, n_anchors=64, n_regions=16,
                       n_before=(100,100), n_after=(50,30), mask_convs=1)
SEED, LEAST = 0, .02   # of the detector; by how much AP50 rises, which is .03 to .05 with other seeds


def pretrain(folder, seed=0):
    "Files of a small CNN before and after 160 steps of CLoVE"
    set_seed(seed, reproducible=True)
    config = replace(clove_method.presets['scenes'], lr=32e-3)
    dls = scene_data(clove_method.recipe(config), 16, seed, 512)[0]
    learn = learner(dls, clove_method.scene_arch, clove_method, config, model_kwargs=parse_kwargs(clove_method.scene_kwargs), bf16=False)
    export_backbone(learn, folder/'start.safetensors')
    with learn.no_bar(), learn.no_logging(): learn.fit(5)
    export_backbone(learn, folder/'end.safetensors')

def with_statistics_of(encoder, scenes):
    "What images alone change in a network with batch norm"
    mean, std = (torch.tensor(v).view(3,1,1) for v in ((.485,.456,.406), (.229,.224,.225)))
    images = torch.stack([image.as_subclass(torch.Tensor) for image,_ in scenes])/255
    return gather_statistics(encoder, ((images-mean)/std).split(16))

def fine_tune(encoder, dls, seed):
    "Box and mask AP50 of Mask R-CNN on a frozen encoder after 60 steps"
    set_seed(seed, reproducible=True)
    recipe = FineTune(batch=8, rate=3e-3, decay=.01, undecayed=(), milestones=(), warmup=0, frozen=True)
    learn = detection_learner(dls, encoder, SMALL, recipe, cbs=DetectionScore(every=3))
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    return {k: learn.scores[f'{k} AP50'] for k in ('box', 'mask')}

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')   # so few steps
def test_pretrained_beats_its_start(tmp_path, one_thread):
    pretrain(tmp_path)
    train, test = (scene_instances(n, 64, seed, natural=True) for n,seed in ((160, 4003), (100, 4004)))
    dls, found = detection_dls(train, test, batch_size=8), {}
    for name in ('start', 'end'):
        encoder = load_backbone(tmp_path/f'{name}.safetensors')
        if name=='start': with_statistics_of(encoder, [train[i] for i in range(96)])
        found[name] = fine_tune(encoder, dls, SEED)
    for kind in ('box', 'mask'): assert found['end'][kind]>found['start'][kind]+LEAST, (kind, found)
